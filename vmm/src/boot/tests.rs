use super::*;
use lodge_accel::state::VcpuState;
use lodge_devices::acpi::AcpiSetup;
use lodge_devices::pci::{ECAM_BASE, ECAM_SIZE, Windows, intx_gsi};
use std::path::PathBuf;

/// A directory that goes away with the test.
struct Files(PathBuf);

impl Files {
    fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("lodge-boot-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self.0.join(name)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Machine {
    ram: RamLayout,
    memory: std::sync::Arc<GuestMemory>,
}

impl Machine {
    fn new(bytes: u64) -> Self {
        let ram = RamLayout::new(bytes).unwrap();
        let memory = lodge_memory::allocate(&ram).unwrap();
        Self { ram, memory }
    }

    fn load(&self, boot: &DirectBoot<'_>) -> Result<EntryState, Error> {
        let acpi = AcpiTables::new(&AcpiSetup {
            vcpus: 2,
            windows: Windows::new(self.ram.bytes(), 40),
            ecam_base: ECAM_BASE,
            intx_gsi,
            serial: vec![lodge_devices::legacy::COM1],
            vga: false,
        });
        let smbios = SmbiosSetup {
            uuid: [7; 16],
            serial: String::new(),
            version: "1".into(),
            vcpus: 2,
            ram: self.ram.clone(),
        };
        let ecam = ECAM_BASE..ECAM_BASE + ECAM_SIZE;
        let reserved = [ecam];
        let platform =
            Platform { ram: &self.ram, reserved: &reserved, acpi: &acpi, smbios: &smbios };
        load(&self.memory, boot, &platform)
    }

    fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn number(&self, gpa: u64, len: usize) -> u64 {
        self.bytes(gpa, len).iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
    }
}

const PAYLOAD: usize = 1000;

/// A bzImage of version 2.15 with 64-bit entry, at 16 MiB, that asks for 4 MiB.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &(PAYLOAD as u32).div_ceil(16).to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &100u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x40_0000u32.to_le_bytes());
    image.extend((0..PAYLOAD).map(|i| (i * 7) as u8));
    image
}

fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = bzimage();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

/// An ELF kernel at 16 MiB with a note that has its entry.
fn elf() -> Vec<u8> {
    let mut image = vec![0; 64 + 2 * 56];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0]);
    put(32, &64u64.to_le_bytes());
    put(54, &[56, 0, 2, 0]);
    let mut header = |at: usize, kind: u32, values: [u64; 5]| {
        put(at, &kind.to_le_bytes());
        for (i, value) in [1, 3, 4, 5].into_iter().zip(&values[..4]) {
            put(at + 8 * i, &value.to_le_bytes());
        }
        put(at + 40, &values[4].to_le_bytes());
    };
    // Type; offset, physical address, bytes in the file and in memory.
    header(64, 1, [256, 0x100_0000, PAYLOAD as u64, 0, 0x2_0000]);
    header(120, 4, [176, 0, 40, 0, 40]);
    put(64 + 40, &0x2_0000u64.to_le_bytes());
    put(120 + 40, &40u64.to_le_bytes());
    for note in
        [&b"\x04\0\0\0\x03\0\0\0\x12\0\0\0GNU\0abc\0"[..], b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0"]
    {
        image.extend(note);
    }
    image.extend(0x100_0040u32.to_le_bytes());
    image.resize(256, 0);
    image.extend((0..PAYLOAD).map(|i| (i * 7) as u8));
    image
}

fn payload() -> Vec<u8> {
    (0..PAYLOAD).map(|i| (i * 7) as u8).collect()
}

#[test]
fn a_bzimage_starts_in_64_bit_mode() {
    let files = Files::new("bzimage");
    let kernel = files.put("vmlinuz", &bzimage());
    let initrd = files.put("initrd", &[0xab; 5000]);
    let machine = Machine::new(64 << 20);
    let boot = DirectBoot { kernel: &kernel, initrd: Some(&initrd), cmdline: "console=ttyS0 x" };
    let entry = machine.load(&boot).unwrap();
    assert_eq!((entry.rip, entry.gprs[6], entry.efer), (0x100_0200, 0x7000, 0x500));
    assert_eq!((entry.cr0, entry.cr3, entry.cr4), (0x8000_0011, 0x9000, 0x20));
    assert_eq!(machine.bytes(0x100_0000, PAYLOAD), payload());
    let zero_page = |at: u64, len| machine.number(0x7000 + at, len);
    assert_eq!(zero_page(0x202, 4), 0x5372_6448);
    assert_eq!(zero_page(0x210, 1), 0xff);
    assert_eq!(zero_page(0x214, 4), 0x100_0000);
    // 5000 bytes take two pages; memory ends at 64 MiB.
    assert_eq!((zero_page(0x218, 4), zero_page(0x21c, 4)), (0x3ff_e000, 5000));
    assert_eq!(machine.bytes(0x3ff_e000, 5000), vec![0xab; 5000]);
    let cmdline = zero_page(0x228, 4);
    assert_eq!(machine.bytes(cmdline, 16), b"console=ttyS0 x\0");
    assert_eq!(zero_page(0x70, 8), at::RSDP);
    assert_eq!(machine.bytes(at::RSDP, 8), b"RSD PTR ");
    assert_eq!(machine.bytes(at::SMBIOS, 5), b"_SM3_");
    assert_eq!(zero_page(0x1e8, 1), 5);
    assert_eq!((zero_page(0x2d0, 8), zero_page(0x2d8, 8), zero_page(0x2e0, 4)), (0, 0x9_fc00, 1));
    assert_eq!(machine.number(0x500 + 0x10, 8), 0x00af_9b00_0000_ffff);

    let mut state = VcpuState { rflags: 0x246, cr2: 5, ..VcpuState::default() };
    entry.apply(&mut state);
    assert_eq!((state.rip, state.rflags, state.cr2, state.efer), (0x100_0200, 2, 0, 0x500));
    assert_eq!((state.segments[1].selector, state.segments[3].selector), (0x10, 0x18));
}

#[test]
fn older_kernels_start_in_32_bit_mode_and_small_memory_moves_relocatable_ones() {
    let files = Files::new("older");
    let machine = Machine::new(64 << 20);
    let kernel = files.put("k", &patched(0x236, &[0, 0]));
    let boot = DirectBoot { kernel: &kernel, initrd: None, cmdline: "" };
    let entry = machine.load(&boot).unwrap();
    assert_eq!(
        (entry.rip, entry.cr0, entry.efer, entry.code.attributes),
        (0x100_0000, 0x11, 0, 0xc09b)
    );
    files.put("k", &patched(0x206, &[6, 2]));
    assert_eq!(machine.load(&boot).unwrap().rip, 0x10_0000);
    files.put("k", &bzimage());
    let small = Machine::new(8 << 20);
    assert_eq!(small.load(&boot).unwrap().rip, 0x20_0200);
    files.put("k", &patched(0x234, &[0]));
    let error = small.load(&boot).unwrap_err().to_string();
    assert!(error.contains("does not fit") && error.contains("/k'"), "{error}");
}

#[test]
fn an_elf_kernel_starts_by_pvh() {
    let files = Files::new("elf");
    let kernel = files.put("vmlinux", &elf());
    let initrd = files.put("initrd", &[1; 4096]);
    let machine = Machine::new(3 << 30);
    // What was there before must not be seen as zeroed memory.
    machine.memory.write_slice(&[0xff; 0x3000], GuestAddress(0x100_0000)).unwrap();
    let boot = DirectBoot { kernel: &kernel, initrd: Some(&initrd), cmdline: "quiet" };
    let entry = machine.load(&boot).unwrap();
    assert_eq!((entry.rip, entry.gprs[3], entry.cr0, entry.cr4), (0x100_0040, 0x6000, 0x11, 0));
    assert_eq!(machine.bytes(0x100_0000, PAYLOAD), payload());
    assert!(machine.bytes(0x100_0000 + PAYLOAD as u64, 0x2000).iter().all(|b| *b == 0));
    let info = |at: u64, len| machine.number(0x6000 + at, len);
    assert_eq!((info(0, 4), info(4, 4), info(12, 4)), (0x336e_c578, 1, 1));
    let module = info(16, 8);
    assert_eq!((machine.number(module, 8), machine.number(module + 8, 8)), (0x7fff_f000, 4096));
    assert_eq!(machine.bytes(info(24, 8), 6), b"quiet\0");
    assert_eq!((info(32, 8), info(48, 4)), (at::RSDP, 6));
    let last = info(40, 8) + 5 * 24;
    assert_eq!([0, 8].map(|at| machine.number(last + at, 8)), [1 << 32, 1 << 30]);
}

#[test]
fn what_is_no_kernel_is_told_so() {
    let files = Files::new("bad");
    let machine = Machine::new(64 << 20);
    let error = |name: &str, bytes: &[u8]| {
        let kernel = files.put(name, bytes);
        let boot = DirectBoot { kernel: &kernel, initrd: None, cmdline: "" };
        let error = machine.load(&boot).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    let mut efi = vec![0; 2000];
    efi[..2].copy_from_slice(b"MZ");
    let mut other = elf();
    other[18] = 183;
    let mut no_note = elf();
    no_note[120] = 0;
    for (bytes, wanted) in [
        (&b""[..], "empty"),
        (b"#!/bin/sh\n", "no Linux setup header"),
        (b"\x1f\x8b\x08", "gzip"),
        (&efi, "EFI"),
        (&other, "not for x86-64"),
        (&no_note, "without a PVH entry"),
        (&elf()[..40], "truncated"),
        (&elf()[..1000], "truncated"),
        (&bzimage()[..1500], "truncated"),
        (&bzimage()[..0x210], "zImage"),
        (&patched(0x206, &[3, 2]), "version 2.03"),
        (&patched(0x211, &[0]), "zImage"),
        (&patched(0x1f1, &[3]), "truncated"),
        (&patched(0x260, &[0xff; 4]), "does not fit"),
    ] {
        let text = error("the-file", bytes);
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    let kernel = files.put("k", &bzimage());
    let boot = |kernel: &Path, initrd: Option<&Path>, cmdline: &str| {
        machine.load(&DirectBoot { kernel, initrd, cmdline }).unwrap_err().to_string()
    };
    assert!(boot(&kernel, None, &"x".repeat(101)).contains("takes 100"));
    assert!(boot(&kernel, None, "a\0b").contains("zero byte"));
    assert!(boot(&files.0, None, "").contains("not a regular file"));
    assert!(boot(&kernel, Some(Path::new("/dev/null")), "").contains("not a regular file"));
    let text = boot(&files.0.join("missing"), None, "");
    assert!(text.contains("missing") && text.contains("cannot read"), "{text}");
    let sparse = files.put("sparse", b"");
    std::fs::File::options().write(true).open(&sparse).unwrap().set_len(1 << 40).unwrap();
    let text = boot(&kernel, Some(&sparse), "");
    assert!(text.contains("initrd") && text.contains("does not fit"), "{text}");
    assert!(boot(&sparse, None, "").contains("no Linux setup header"));
    assert!(
        Machine::new(4096)
            .load(&DirectBoot { kernel: &kernel, initrd: None, cmdline: "" })
            .is_err()
    );
}

/// Whatever bytes a kernel's headers have: an error, or a kernel within memory; never a panic.
#[test]
fn mutated_kernels_do_no_harm() {
    let files = Files::new("mutated");
    let machine = Machine::new(32 << 20);
    let initrd = files.put("initrd", &[0; 100]);
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut started = 0;
    for round in 0..3000 {
        let (mut image, interesting) =
            if round % 2 == 0 { (bzimage(), 0x1f1..0x270) } else { (elf(), 4..256) };
        for _ in 0..1 + next() % 4 {
            let at = interesting.start + (next() as usize) % interesting.len();
            image[at] = [next() as u8, 0, 0xff, 0x7f, 0x80][(next() % 5) as usize];
        }
        if next() % 8 == 0 {
            image.truncate((next() as usize) % image.len());
        }
        let kernel = files.put("k", &image);
        let boot = DirectBoot { kernel: &kernel, initrd: Some(&initrd), cmdline: "x" };
        started += usize::from(machine.load(&boot).is_ok());
    }
    assert!((100..2900).contains(&started), "{started}");
}

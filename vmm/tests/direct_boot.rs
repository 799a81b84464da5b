//! What direct boot leaves in guest memory, judged by Linux on another machine: QEMU's q35, which our
//! tables describe as well, runs our memory image on its software CPU.
//!
//! ```text
//!   boot::load --> guest memory --> file --> QEMU's RAM
//!          +-----> EntryState ----> a ROM that sets up the chipset and enters the kernel so
//! ```
//!
//! Needs `qemu-system-x86_64` (Debian: qemu-system-x86) and the guest `busybox`, for PVH
//! `linux-6.12`, from the cache (`cargo xtask guest`).

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use lodge_devices::acpi::{AcpiSetup, AcpiTables};
use lodge_devices::legacy::{COM1, COM2};
use lodge_devices::pci::{ECAM_BASE, ECAM_SIZE, Windows, intx_gsi};
use lodge_devices::smbios::SmbiosSetup;
use lodge_memory::RamLayout;
use lodge_vmm::boot::{DirectBoot, EntryState, Platform, load};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 256 << 20;
const VCPUS: u32 = 2;

/// Loads a kernel and writes guest memory to `image`.
fn prepare(kernel: &Path, initrd: &Path, image: &Path) -> EntryState {
    let ram = RamLayout::new(RAM).unwrap();
    let memory = lodge_memory::allocate(&ram).unwrap();
    let acpi = AcpiTables::new(&AcpiSetup {
        vcpus: VCPUS,
        windows: Windows::new(RAM, 40),
        ecam_base: ECAM_BASE,
        intx_gsi,
        serial: vec![COM1, COM2],
        vga: false,
    });
    let smbios = SmbiosSetup {
        uuid: [7; 16],
        serial: "S1".into(),
        version: "0.1".into(),
        vcpus: VCPUS,
        ram: ram.clone(),
    };
    let ecam = ECAM_BASE..ECAM_BASE + ECAM_SIZE;
    let platform = Platform { ram: &ram, reserved: &[ecam], acpi: &acpi, smbios: &smbios };
    let cmdline = "console=ttyS0 earlyprintk=ttyS0";
    let boot = DirectBoot { kernel, initrd: Some(initrd), cmdline };
    let entry = load(&memory, &boot, &platform).unwrap();
    let mut file = File::create(image).unwrap();
    file.set_len(RAM).unwrap();
    let mut page = vec![0; 1 << 16];
    for gpa in (0..RAM).step_by(page.len()) {
        memory.read_slice(&mut page, GuestAddress(gpa)).unwrap();
        if page.iter().any(|b| *b != 0) {
            file.seek(SeekFrom::Start(gpa)).unwrap();
            file.write_all(&page).unwrap();
        }
    }
    entry
}

/// The ROM at the end of the first 4 GiB; it is left at once.
const ROM: u32 = 0xffff_0000;

/// Machine code, and where it is.
struct Code(Vec<u8>);

impl Code {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }
    fn value(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_le_bytes())
    }
    /// A far jump, in 32-bit form, to the instruction behind it.
    fn jump_next(&mut self, prefix: &[u8], selector: u16) -> &mut Self {
        self.put(prefix).put(&[0xea]);
        let next = ROM + self.0.len() as u32 + 6;
        self.value(next).put(&selector.to_le_bytes())
    }
    /// mov ax, selector; mov ds, es, ss, fs, gs, ax
    fn load_segments(&mut self, selector: u16) -> &mut Self {
        self.put(&[0x66, 0xb8]).put(&selector.to_le_bytes());
        self.put(&[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0x8e, 0xe0, 0x8e, 0xe8])
    }
    /// out dx, eax
    fn out(&mut self, port: u32, value: u32) -> &mut Self {
        self.put(&[0xb8]).value(value).put(&[0xba]).value(port).put(&[0xef])
    }
    fn pci(&mut self, function: u32, register: u32, value: u32) -> &mut Self {
        self.out(0xcf8, 1 << 31 | function << 8 | register).out(0xcfc, value)
    }
}

/// A ROM that does what firmware does to a q35 (ECAM, PAM, PMBASE) and enters the kernel.
fn rom(entry: &EntryState) -> Vec<u8> {
    let mut code = Code(Vec::new());
    // Data first: descriptors of our own, their pseudo-descriptor, and the kernel's.
    code.put(&[0; 8]).put(&0x00cf_9b00_0000_ffff_u64.to_le_bytes());
    code.put(&0x00cf_9300_0000_ffff_u64.to_le_bytes());
    code.put(&23u16.to_le_bytes()).value(ROM);
    let gdtr = ROM + code.0.len() as u32;
    code.put(&entry.gdtr.limit.to_le_bytes()).value(entry.gdtr.base as u32);
    let start = code.0.len();
    // cli; lgdt cs:[18H], 32-bit form; mov eax, 11H; mov cr0, eax
    code.put(&[0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x18, 0x00]);
    code.put(&[0x66, 0xb8]).value(0x11).put(&[0x0f, 0x22, 0xc0]);
    // The operand size prefix makes this jump one byte longer, before its address.
    code.jump_next(&[0x66], 8);
    code.load_segments(0x10);
    const HOST_BRIDGE: u32 = 0;
    const LPC: u32 = 0x1f << 3;
    code.pci(HOST_BRIDGE, 0x64, 0).pci(HOST_BRIDGE, 0x60, ECAM_BASE as u32 | 1);
    code.pci(HOST_BRIDGE, 0x90, 0x3333_3330).pci(HOST_BRIDGE, 0x94, 0x0033_3333);
    code.pci(LPC, 0x40, 0x601).pci(LPC, 0x44, 0x80);
    // lgdt [gdtr]
    code.put(&[0x0f, 0x01, 0x15]).value(gdtr);
    if entry.efer != 0 {
        // mov cr4; mov cr3; wrmsr IA32_EFER without LMA; mov cr0
        code.put(&[0xb8]).value(entry.cr4 as u32).put(&[0x0f, 0x22, 0xe0]);
        code.put(&[0xb8]).value(entry.cr3 as u32).put(&[0x0f, 0x22, 0xd8]);
        code.put(&[0xb9]).value(0xc000_0080).put(&[0xb8]).value(entry.efer as u32 & !(1 << 10));
        code.put(&[0x31, 0xd2, 0x0f, 0x30]);
        code.put(&[0xb8]).value(entry.cr0 as u32).put(&[0x0f, 0x22, 0xc0]);
    }
    code.jump_next(&[], entry.code.selector);
    code.load_segments(entry.data.selector);
    // mov ebx; mov esi; mov eax; jmp eax (rax in 64-bit mode)
    code.put(&[0xbb]).value(entry.gprs[3] as u32).put(&[0xbe]).value(entry.gprs[6] as u32);
    code.put(&[0xb8]).value(entry.rip as u32).put(&[0xff, 0xe0]);
    let mut rom = code.0;
    rom.resize(0x1_0000, 0);
    // The reset vector: a jump to the start.
    let jump = (start as u16).wrapping_sub(0xfff3).to_le_bytes();
    rom[0xfff0..0xfff3].copy_from_slice(&[0xe9, jump[0], jump[1]]);
    rom
}

/// The directory of a test, which goes away with it.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs QEMU until its serial port has said `until`, and gives all it said; `None` if there is no QEMU.
fn run(kernel: &Path, initrd: &Path, until: &str) -> Option<String> {
    let name = format!("lodge-direct-boot-{}-{}", std::process::id(), kernel.display());
    let dir = Dir(std::env::temp_dir().join(name.replace('/', "-")));
    std::fs::create_dir_all(&dir.0).unwrap();
    let (image, firmware) = (dir.0.join("ram"), dir.0.join("rom"));
    let entry = prepare(kernel, initrd, &image);
    std::fs::write(&firmware, rom(&entry)).unwrap();
    let object =
        format!("memory-backend-file,id=ram,size={RAM},share=off,mem-path={}", image.display());
    let (memory, cpus) = ((RAM >> 20).to_string(), VCPUS.to_string());
    let child = Command::new("qemu-system-x86_64")
        .args(["-machine", "q35,accel=tcg,memory-backend=ram", "-object", &object])
        .args(["-m", &memory, "-smp", &cpus, "-cpu", "Nehalem", "-bios"])
        .arg(&firmware)
        .args(["-display", "none", "-vga", "none", "-net", "none", "-no-reboot"])
        .args(["-serial", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            println!("SKIPPED: qemu-system-x86_64: {error} (Debian: qemu-system-x86)");
            return None;
        }
    };
    let (sender, receiver) = mpsc::channel();
    let stdout = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout);
        let mut line = Vec::new();
        while lines.by_ref().read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&std::mem::take(&mut line)).into_owned();
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    let mut said = String::new();
    let end = Instant::now() + Duration::from_secs(300);
    while !said.contains(until) {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => said += &line,
            Err(_) => break,
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    drop(receiver);
    reader.join().unwrap();
    Some(said)
}

/// What Linux must and must not say.
fn judge(said: &str, wanted: &[&str]) {
    for wanted in wanted {
        assert!(said.contains(wanted), "not said: {wanted}\n{said}");
    }
    for bad in ["ACPI Error", "ACPI BIOS Error", "ACPI Warning", "ACPI BIOS Warning", "[Firmware"] {
        assert!(!said.contains(bad), "said: {bad}\n{said}");
    }
}

const ALWAYS: [&str; 6] = [
    "Command line: console=ttyS0 earlyprintk=ttyS0",
    "BIOS-e820: [mem 0x0000000000100000-0x000000000fffffff] usable",
    "BIOS-e820: [mem 0x00000000b0000000-0x00000000bfffffff] reserved",
    "ACPI: RSDP 0x00000000000F0000",
    "ACPI: INT_SRC_OVR (bus 0 bus_irq 9 global_irq 9 high level)",
    "Run /init as init process",
];

#[test]
fn debians_kernel_finds_its_way_from_a_bzimage() {
    let guest = lodge_guests::ready("busybox").unwrap();
    let until = "LODGE-GUEST-READY";
    let Some(said) = run(&guest.join("vmlinuz"), &guest.join("initrd.img"), until) else { return };
    judge(&said, &ALWAYS);
    let wanted = [
        until,
        "SMBIOS 3.6.0 present",
        "DMI: Lodge Lodge PC",
        "ACPI: PM-Timer IO Port: 0x608",
        "smp: Brought up 1 node, 2 CPUs",
        "MMCONFIG at [mem 0xb0000000-0xbfffffff] reserved in E820",
        "ACPI: PM: (supports S0 S5)",
        "_OSC: OS now controls [PCIeHotplug PME AER PCIeCapability]",
        "root bus resource [mem 0xc0000000-0xfebfffff window]",
        "pnp: PnP ACPI: found 6 devices",
        "ttyS0 at I/O 0x3f8 (irq = 4, base_baud = 115200) is a 16550A",
        "rtc_cmos 00:03: registered as rtc0",
    ];
    judge(&said, &wanted);
}

#[test]
fn slow_an_elf_kernel_finds_its_way_by_pvh_and_powers_off() {
    let guest = lodge_guests::ready("linux-6.12").unwrap();
    let until = "reboot: Power down";
    let Some(said) = run(&guest.join("vmlinux"), &guest.join("initrd.img"), until) else { return };
    judge(&said, &ALWAYS);
    judge(&said, &["LODGE-INIT-READY", "Preparing to enter system sleep state S5", until]);
}

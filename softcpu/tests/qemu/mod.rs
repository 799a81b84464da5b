//! Guests in a ROM, run by the software CPU and by QEMU's TCG: what they tell on port E9H must be the same.
//!
//! ```text
//!   ROM, 64 KiB at F_0000 and FFFF_0000     F0000 the test, 32-bit   FF000 GDT   FFF00 entry
//! ```

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use lodge_memory::{Bus, PageTable, RamLayout, allocate};
use lodge_softcpu::shared::{PhysRegion, attention};
use lodge_softcpu::{Exit, Shared, Tier, Vcpu};

/// Where the ROM is, and where its test begins.
pub const ROM: u64 = 0xf_0000;
/// Its size.
pub const ROM_BYTES: usize = 0x1_0000;
/// What is written to this port is compared.
pub const TELL: u32 = 0xe9;
/// A write to this port ends the guest.
pub const DONE: u32 = 0xf4;

/// Real mode: into flat 32-bit mode and to the test.
const ENTRY: [u8; 25] = [
    0xfa, // cli
    0x2e, 0x66, 0x0f, 0x01, 0x16, 0x80, 0xff, // lgdt cs:[ff80h], 32-bit
    0x0f, 0x20, 0xc0, // mov eax, cr0
    0x0c, 0x01, // or al, 1
    0x0f, 0x22, 0xc0, // mov cr0, eax
    0x66, 0xea, 0x00, 0x00, 0x0f, 0x00, 0x08, 0x00, // jmp 8:000f0000h
    0xf4, // hlt
];
const GDT: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// A ROM that holds nothing but the way from reset to `ROM`, in flat 32-bit mode.
pub fn blank() -> Vec<u8> {
    let mut rom = vec![0xf4; ROM_BYTES];
    for (i, entry) in GDT.iter().enumerate() {
        rom[0xf000 + 8 * i..][..8].copy_from_slice(&entry.to_le_bytes());
    }
    rom[0xff00..][..ENTRY.len()].copy_from_slice(&ENTRY);
    rom[0xff80..][..6].copy_from_slice(&[0x17, 0, 0x00, 0xf0, 0x0f, 0]);
    rom[0xfff0..][..3].copy_from_slice(&[0xe9, 0x0d, 0xff]); // jmp ff00h
    rom
}

#[derive(Default)]
struct Log {
    told: Mutex<Vec<u8>>,
    done: AtomicBool,
    shared: OnceLock<Arc<Shared>>,
}

impl Bus for Log {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        match u32::from(port) {
            TELL => self.told.lock().unwrap().extend_from_slice(data),
            DONE => {
                self.done.store(true, Ordering::SeqCst);
                self.kick();
            }
            _ => {}
        }
    }
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}

impl Log {
    fn kick(&self) {
        if let Some(shared) = self.shared.get() {
            shared.ports()[0].notify(attention::KICK);
        }
    }
}

/// ROM in page-aligned memory.
#[repr(C, align(4096))]
struct Aligned([u8; ROM_BYTES]);

/// What the guest tells on the software CPU.
pub fn here(rom: &[u8], tier: Tier) -> Vec<u8> {
    let mut copy = Box::new(Aligned([0; ROM_BYTES]));
    copy.0.copy_from_slice(rom);
    let host = copy.0.as_mut_ptr();
    let log = Arc::new(Log::default());
    let memory = allocate(&RamLayout::new(16 << 20).unwrap()).unwrap();
    let shared = Shared::new(memory, log.clone(), 1);
    assert!(log.shared.set(shared.clone()).is_ok());
    shared.set_overlays([ROM, 0xffff_0000].map(|gpa| PhysRegion {
        gpa,
        end: gpa + ROM_BYTES as u64,
        host,
        readonly: true,
        table: Arc::new(PageTable::new(gpa, ROM_BYTES as u64)),
        table_page: 0,
    }));
    let mut vcpu = Vcpu::new(shared, 0);
    vcpu.set_tier(tier);
    let (watched, stop) = (log.clone(), std::sync::mpsc::channel::<()>());
    let watchdog = std::thread::spawn(move || {
        if stop.1.recv_timeout(Duration::from_secs(60)).is_err() {
            watched.kick();
        }
    });
    let exit = vcpu.run();
    let told = log.told.lock().unwrap().clone();
    assert_eq!(exit, Exit::Kicked, "told {told:02x?}, at {:#x}", vcpu.cpu().rip);
    assert!(log.done.load(Ordering::SeqCst), "it hangs: told {told:02x?}");
    // The watchdog's channel is closed, or it has gone off; either way its thread ends.
    drop(stop.0);
    watchdog.join().unwrap();
    drop(copy);
    told
}

/// What the guest tells in QEMU, on its CPU `cpu`.
pub fn in_qemu(name: &str, cpu: &str, rom: &[u8]) -> Vec<u8> {
    let path = |what: &str| -> PathBuf {
        std::env::temp_dir().join(format!("lodge-{}-{name}.{what}", std::process::id()))
    };
    let (image, log) = (path("rom"), path("log"));
    std::fs::write(&image, rom).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args("-M q35,hpet=off -accel tcg -m 16 -display none -nodefaults".split(' '))
        .args([
            "-cpu",
            cpu,
            "-no-reboot",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=1",
            "-bios",
        ])
        .arg(&image)
        .arg("-debugcon")
        .arg(format!("file:{}", log.display()))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    let ended = loop {
        if qemu.try_wait().unwrap().is_some() {
            break true;
        }
        if begin.elapsed() > Duration::from_secs(60) {
            qemu.kill().unwrap();
            qemu.wait().unwrap();
            break false;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let told = std::fs::read(&log).unwrap_or_default();
    let _ = std::fs::remove_file(&image);
    let _ = std::fs::remove_file(&log);
    assert!(ended, "it hangs in QEMU: told {told:02x?}");
    told
}

/// Whether QEMU is here; says so when not.
pub fn qemu_for(name: &str) -> bool {
    let found = ["/usr/bin", "/usr/local/bin"]
        .iter()
        .any(|dir| Path::new(dir).join("qemu-system-x86_64").exists());
    if !found {
        eprintln!("SKIPPED: {name}: needs qemu-system-x86_64 (Debian: qemu-system-x86)");
    }
    found
}

//! A small Linux on the host's KVM, with the kernel's own interrupt controllers.
//!
//! On an ordinary host it boots in a second, its init says so and powers off. There are also hosts whose KVM
//! (the module `kvm_pvm`) emulates guest kernels at a million instructions a second, without some instructions,
//! which the software CPU completes. There the same kernel takes a minute or more, and its init cannot be heard by a
//! system call: SYSCALL leaves the program at privilege level 3 with RIP in the kernel, and INT n is #UD. What
//! works there is an exception. The jump into the kernel is a page fault, the kernel reports it with
//! the program's stack pointer, and the program has put its word there (`guests/linux-6.12/init.c`).
//! The end of PID 1 is the kernel's end, so there is no power-off there either.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use lodge_tests::{Guest, Run, host, skip};
use nix::sys::signal::Signal;

/// An emulated kernel may take this long, on a machine that does other things too.
const LONGEST: Duration = Duration::from_secs(25 * 60);
/// The exit code of a machine that was ended from outside.
const ENDED: i32 = 130;

/// Waits until the console shows one of `texts`; gives it.
fn wait_for<'a>(guest: &mut Guest, texts: &[&'a str]) -> &'a str {
    let end = Instant::now() + LONGEST;
    loop {
        // In this order: what came just before the end counts.
        let over = guest.has_ended() || Instant::now() > end;
        let shown = guest.text();
        if let Some(found) = texts.iter().find(|text| shown.contains(**text)) {
            return found;
        }
        assert!(!over, "the console does not show any of {texts:?}\n{}", guest.report());
        thread::sleep(Duration::from_millis(100));
    }
}

/// The first SIGTERM presses the power button, which a guest after its panic does not hear; the next one
/// ends the machine. Two that come at once are one.
fn end(guest: &mut Guest) {
    let last = Instant::now() + Duration::from_secs(60);
    while !guest.has_ended() && Instant::now() < last {
        guest.signal(Signal::SIGTERM);
        thread::sleep(Duration::from_millis(300));
    }
    guest.ends_with(ENDED);
}

#[test]
fn slow_linux_reaches_its_init_on_kvm() {
    if !Path::new("/dev/kvm").exists() {
        skip!("there is no /dev/kvm on this host");
    }
    let folder = host::guest("linux-6.12");
    let run = Run::new()
        .args(["--accel", "kvm", "--memory", "256M", "--kernel"])
        .arg(folder.join("vmlinux"))
        .arg("--initrd")
        .arg(folder.join("initrd.img"))
        .cmdline("console=ttyS0");
    let begin = Instant::now();
    let mut guest = run.start();
    wait_for(&mut guest, &["Run /init as init process"]);
    println!("init was started after {:.1} s", begin.elapsed().as_secs_f64());

    // A host with kvm_pvm loses system calls; any other one that does is broken, or we are.
    let emulated = Path::new("/sys/module/kvm_pvm").exists();
    let word = if emulated { "init[1]: segfault at" } else { "LODGE-INIT-READY" };
    wait_for(&mut guest, &[word, "Kernel panic"]);
    if emulated {
        // LODGE! in ASCII: the program itself has run.
        guest.expect(word);
        guest.expect("sp 00004c4f44474521");
        guest.expect("Kernel panic - not syncing: Attempted to kill init!");
        end(&mut guest);
    } else {
        guest.expect(word);
        guest.ends_with(0);
    }

    let shown = guest.text();
    // The kernel found and uses the chips that KVM has: an IOAPIC by ACPI's tables, timers, the serial port's IRQ.
    for line in ["ACPI: Using IOAPIC for interrupt routing", "ttyS0 at I/O 0x3f8 (irq = 4"] {
        assert!(shown.contains(line), "'{line}' is missing\n{shown}");
    }
    // And nothing on the way was wrong, such as registers that KVM cannot hold.
    for trouble in ["WARNING:", "BUG:", "Bad FPU state", "Oops", "timer doesn't work"] {
        assert!(!shown.contains(trouble), "'{trouble}'\n{shown}");
    }
}

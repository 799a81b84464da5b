//! A small Linux guest (Debian's cloud kernel, busybox) does what guests do; seconds each.
//! Disks are in `disks.rs`, networks in `networks.rs`, sudden ends in `sudden_ends.rs`.

use std::fs;

use lodge_tests::{Run, host, pvh_payload, skip};
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, Termios};

/// Boots with so many vCPUs, all of which the kernel must find and use.
fn boots_with(cpus: u32) {
    let commands = "set -e; nproc; for i in $(seq 0 $(($(nproc) - 1))); do taskset -p $((1 << i)) $$ > /dev/null; \
                    echo on $(cut -d ' ' -f 39 /proc/self/stat); done";
    let mut guest = Run::busybox().cpus(cpus).commands(commands).start();
    guest.expect(&format!("cpus={cpus} "));
    for index in 0..cpus {
        guest.expect(&format!("on {index}\n"));
    }
    guest.expect("LODGE-RUN-EXIT=0");
    guest.ends_with(0);
    assert!(guest.messages().starts_with("lodge: the accelerator is the software CPU"));
}

#[test]
fn one_vcpu_boots_and_powers_off() {
    boots_with(1);
}

#[test]
fn four_vcpus_boot_and_all_run() {
    boots_with(4);
}

#[test]
fn a_reboot_resets_the_machine_and_boots_again() {
    let mut guest = Run::busybox().cpus(2).start();
    for _ in 0..2 {
        guest.busybox_shell();
        assert_eq!(guest.run("test -e /tmp/here").status, 1, "memory is as after power-up");
        guest.ok("touch /tmp/here");
        guest.send("reboot -f\n");
    }
    guest.busybox_shell();
    guest.power_off("poweroff -f");
}

#[test]
fn a_kernel_panic_with_a_reboot_boots_again() {
    let commands = "echo CRASHING; echo c > /proc/sysrq-trigger";
    let mut guest = Run::busybox().cmdline("panic=-1").commands(commands).start();
    guest.expect("CRASHING");
    guest.expect("Kernel panic");
    guest.expect("CRASHING");
    assert!(!guest.has_ended());
}

/// The power button in Linux's ACPI: "STS" is the bit that it sets. (The guest has no driver for it, which would
/// clear the bit.)
const BUTTON: &str = "/sys/firmware/acpi/interrupts/ff_pwr_btn";

#[test]
fn sigterm_presses_the_power_button_and_the_guest_powers_off() {
    let wait = format!(
        "grep -q STS {BUTTON} && exit 1; echo WAITING; until grep -q STS {BUTTON}; do sleep 0.2; done; echo PRESSED"
    );
    let mut guest = Run::busybox().commands(&wait).start();
    guest.expect("WAITING");
    guest.signal(Signal::SIGTERM);
    guest.expect("PRESSED");
    guest.ends_with(0);
}

#[test]
fn a_second_sigterm_ends_a_guest_that_does_not_listen() {
    let mut guest = Run::busybox().start();
    guest.busybox_shell();
    guest.signal(Signal::SIGTERM);
    host::wait_until("the guest sees the button", || {
        guest.run(&format!("grep STS {BUTTON}")).status == 0
    });
    assert!(!guest.has_ended(), "the first one asks");
    guest.signal(Signal::SIGTERM);
    guest.ends_with(130);
    assert!(guest.messages().contains("the machine was ended"), "{}", guest.report());
}

/// Whether keys come one by one and are not echoed.
fn is_raw(terminal: &Termios) -> bool {
    !terminal.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
}

#[test]
fn ctrl_a_h_helps_and_ctrl_a_x_ends_and_the_terminal_is_as_before() {
    let mut guest = Run::busybox().in_terminal().start();
    guest.busybox_shell();
    assert!(is_raw(&guest.terminal()));
    guest.send("\x01h");
    guest.expect("Ctrl-A X ends the machine");
    guest.expect("Ctrl-A H shows this");
    // Ctrl-C is the guest's: it ends a command there, and not the machine.
    guest.send("echo SLEEP''ING; sleep 1000; echo IT IS $?\n");
    guest.expect("SLEEPING");
    guest.send("\x03");
    guest.expect(" # ");
    assert!(guest.ok("echo alive").contains("alive"));
    // A Ctrl-A of the guest's own.
    guest.send("head -c 1 | od -t x1\n\x01\x01\n");
    guest.expect("0000000 01");
    guest.send("\x01x");
    guest.ends_with(130);
    let after = guest.terminal();
    assert!(after.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG));
}

#[test]
fn the_terminal_is_as_before_after_a_power_off_and_after_an_error() {
    let mut guest = Run::busybox().in_terminal().commands("true").start();
    guest.expect("LODGE-RUN-EXIT=0");
    guest.ends_with(0);
    assert!(!is_raw(&guest.terminal()));
    let mut guest = Run::kernel("/dev/null".as_ref()).in_terminal().start();
    guest.ends_with(2);
    assert!(!is_raw(&guest.terminal()));
}

#[test]
fn a_terminal_that_goes_away_takes_the_machine_along() {
    let mut guest = Run::busybox().start();
    guest.expect("LODGE-GUEST-READY");
    guest.signal(Signal::SIGHUP);
    guest.ends_with(130);
}

#[test]
fn what_is_piped_in_is_typed_and_its_end_ends_nothing() {
    let mut guest = Run::busybox().start();
    guest.busybox_shell();
    // More than the serial port's FIFO has room for, and less than the shell's line editor.
    let long = "x".repeat(800);
    assert_eq!(guest.ok(&format!("printf %s {long} | wc -c")).trim(), "800");
    guest.send("sleep 1; echo STILL HERE; poweroff -f\n");
    guest.close_input();
    guest.expect("STILL HERE\n");
    guest.ends_with(0);
}

#[test]
fn console_file_gets_what_the_guest_prints_and_keeps_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("a,b.log");
    fs::write(&log, "before\n").unwrap();
    let console = format!("file=\"{}\"", log.display());
    let mut guest = Run::busybox().commands("echo I AM HERE").arg("--console").arg(console).start();
    guest.ends_with(0);
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.starts_with("before\n"), "{text}");
    assert!(text.contains("LODGE-GUEST-READY") && text.contains("I AM HERE"), "{text}");
    assert_eq!(guest.text(), "");
}

#[test]
fn console_none_prints_nothing() {
    let mut guest = Run::busybox().commands("echo I AM HERE").args(["--console", "none"]).start();
    guest.ends_with(0);
    assert_eq!(guest.text(), "");
}

#[test]
fn a_reader_that_goes_away_does_not_stop_the_guest() {
    // `lodge run | head -1`: the guest goes on, and what it prints is lost.
    let folder = tempfile::tempdir().unwrap();
    let disk = host::image(folder.path(), "raw", 1);
    let commands = "yes | head -n 20000; echo DONE > /dev/vda; sync";
    let mut command = Run::busybox().disk(&disk, "").commands(commands).command();
    let stdio = std::process::Stdio::piped;
    command.stdin(std::process::Stdio::null()).stdout(stdio()).stderr(stdio());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    host::assert_no_panic(&said);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(fs::read(&disk).unwrap().starts_with(b"DONE\n"));
}

#[test]
fn a_printed_spec_is_the_same_machine() {
    let folder = tempfile::tempdir().unwrap();
    let disk = host::image(folder.path(), "qcow2", 8);
    let shown = "nproc; cat /sys/block/vda/serial; echo; blockdev --getsize64 /dev/vda; grep MemTotal /proc/meminfo";
    let run = Run::busybox().cpus(3).disk(&disk, ",serial=PRINTED").commands(shown);
    let printed =
        host::output(run.clone().arg("--print-spec").command().current_dir(folder.path()));
    let spec = folder.path().join("machine.toml");
    fs::write(&spec, &printed.stdout).unwrap();
    let mut seen = Vec::new();
    for run in [run, Run::new().arg("--spec").arg(spec)] {
        let mut guest = run.start();
        guest.expect("LODGE-GUEST-READY");
        guest.expect("\n");
        seen.push(guest.expect("LODGE-RUN-EXIT=0"));
        guest.ends_with(0);
    }
    assert!(seen[0].starts_with("3\nPRINTED\n8388608\nMemTotal:"), "{}", seen[0]);
    assert_eq!(seen[0], seen[1]);
}

#[test]
fn memory_above_the_hole_is_seen() {
    if nix::sys::sysinfo::sysinfo().unwrap().ram_total() < 6 << 30 {
        skip!("a guest of 5 GiB needs a host with 6");
    }
    let mut guest = Run::busybox()
        .args(["--memory", "5G"])
        .commands("grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem")
        .start();
    guest.expect("MemTotal:");
    let total = guest.expect("kB");
    let total: u64 = total.trim().parse().unwrap();
    // The kernel keeps a part for itself: page structures, mostly.
    assert!((4_900_000..5 << 20).contains(&total), "{total} KiB\n{}", guest.report());
    guest.expect("100000000-");
    guest.ends_with(0);
}

#[test]
fn the_guest_knows_its_name_and_has_randomness() {
    let commands = "cat /sys/class/dmi/id/product_serial /sys/class/misc/hw_random/rng_current; \
                    dd if=/dev/hwrng bs=64 count=1 2>/dev/null | md5sum";
    let mut seen = Vec::new();
    for _ in 0..2 {
        let mut guest = Run::busybox().args(["--name", "web-7"]).commands(commands).start();
        guest.expect("web-7\nvirtio_rng.0\n");
        seen.push(guest.expect("LODGE-RUN-EXIT=0"));
        guest.ends_with(0);
    }
    assert_ne!(seen[0], seen[1]);
}

/// A guest of a few instructions.
fn payload(code: &[u8]) -> (tempfile::TempDir, Run) {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("payload.elf");
    fs::write(&kernel, pvh_payload(code)).unwrap();
    let run = Run::kernel(&kernel).args(["--memory", "64M"]);
    (folder, run)
}

#[test]
fn an_elf_kernel_starts_through_pvh_and_ends_by_the_debug_exit() {
    // cmp dword [ebx], 336EC578H (XEN_HVM_START_MAGIC_VALUE); setne al; add al, 7; out 0f4h, al; hlt
    let code = [0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x0f, 0x95, 0xc0, 0x04, 0x07, 0xe6, 0xf4, 0xf4];
    let (_folder, run) = payload(&code);
    run.arg("--debug-exit").start().ends_with(64 + 7);
}

#[test]
fn a_triple_fault_is_told_with_its_place_and_exit_code_5() {
    // lidt [CODE + 9], which is zeros; ud2
    let mut code = vec![0x0f, 0x01, 0x1d, 0x09, 0x10, 0x10, 0, 0x0f, 0x0b];
    code.extend([0; 8]);
    let (_folder, run) = payload(&code);
    let message = run.refused(5);
    assert!(message.contains("triple fault of vCPU 0 at RIP 0x101007"), "{message}");
}

#[test]
fn slow_a_vmlinux_boots_through_pvh() {
    let guest = host::guest("linux-6.12");
    for kernel in ["vmlinux", "bzImage"] {
        let mut guest = Run::linux(&guest.join(kernel), &guest.join("initrd.img"))
            .args(["--memory", "128M"])
            .start();
        guest.expect("LODGE-INIT-READY");
        guest.ends_with(0);
    }
}

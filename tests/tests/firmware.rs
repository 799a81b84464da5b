//! Machines that start as a PC does: BIOS and UEFI firmware, boot loaders, boot media.
//!
//! Needs the packages seabios, ovmf, memtest86+ (`cargo xtask setup`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lodge_tests::screen::Picture;
use lodge_tests::{Guest, Run, host};

const MEMTEST: &str = "/usr/lib/memtest86+/memtest86+x64.iso";

/// A machine with firmware, with no disk and no card.
fn firmware(kind: &str) -> Run {
    Run::new().args(["--accel", "soft", "--memory", "512M", "--firmware", kind])
}

/// The Debian guest's disk, started by GRUB that is on it.
fn debian(kind: &str, disk: &Path) -> Run {
    firmware(kind).args(["--video", "none"]).disk(disk, "")
}

fn overlay(folder: &Path) -> PathBuf {
    host::overlay(folder, &host::guest("debian").join("disk.qcow2"))
}

/// Waits until what is on the guest's screen contains all of `wanted`; gives the text.
fn wait_for_screen(guest: &mut Guest, name: &str, folder: &Path, wanted: &[&str]) -> String {
    let file = folder.join("screen.png");
    let mut text = String::new();
    host::wait_until(&format!("the screen shows {wanted:?}"), || {
        assert!(!guest.has_ended(), "the machine has ended: {}", guest.messages());
        let mut ctl = Command::new(host::lodge());
        ctl.args(["ctl", name, "screendump", host::text(&file)]);
        let said = host::output(ctl.env("XDG_RUNTIME_DIR", host::runtime()));
        // The socket is there a moment after the machine is.
        if !said.status.success() {
            return false;
        }
        let Some(picture) = Picture::read(&file) else { return false };
        text = picture.text();
        wanted.iter().all(|words| text.contains(words))
    });
    text
}

#[test]
fn a_bios_starts_debian_by_its_boot_loader() {
    let folder = tempfile::tempdir().unwrap();
    let disk = overlay(folder.path());
    let mut guest = debian("bios", &disk).cpus(2).start();
    guest.expect("SeaBIOS (version");
    guest.debian_login();
    assert_eq!(guest.ok("nproc").trim(), "2");
    assert_eq!(guest.ok("test -d /sys/firmware/efi || echo bios").trim(), "bios");
    // What the firmware passed on: ACPI, SMBIOS, all of the memory.
    assert_eq!(guest.ok("cat /sys/class/dmi/id/product_name").trim(), "Lodge PC");
    let kib = guest.ok("awk '/MemTotal/ { print $2 }' /proc/meminfo");
    assert!(kib.trim().parse::<u32>().unwrap() > 400 << 10, "{kib} KiB of 512 MiB");
    guest.power_off("poweroff");
    host::assert_clean(&disk);
}

#[test]
fn uefi_starts_debian_and_keeps_its_variables() {
    let folder = tempfile::tempdir().unwrap();
    let disk = overlay(folder.path());
    let variables = folder.path().join("vars.fd");
    let run = debian("uefi", &disk).cpus(2).arg("--uefi-vars").arg(&variables);
    let mut guest = run.start();
    guest.debian_login();
    assert_eq!(guest.ok("ls -d /sys/firmware/efi").trim(), "/sys/firmware/efi");
    // A variable of ours: four bytes of attributes (kept, for the system as well), then the value.
    let name = "/sys/firmware/efi/efivars/Lodge-12345678-1234-1234-1234-123456789abc";
    guest.ok("mountpoint -q /sys/firmware/efi/efivars || mount -t efivarfs efivarfs /sys/firmware/efi/efivars");
    guest.ok(&format!("printf '\\007\\000\\000\\000kept' > {name}"));
    guest.power_off("poweroff");

    let mut guest = run.start();
    guest.debian_login();
    assert_eq!(guest.ok(&format!("tail -c 4 {name}")).trim(), "kept");
    guest.power_off("poweroff");
    host::assert_clean(&disk);

    // Damaged variables are refused, with a way out that works.
    let mut bytes = fs::read(&variables).unwrap();
    bytes[40..44].fill(0);
    fs::write(&variables, &bytes).unwrap();
    let message = run.refused(2);
    assert!(message.contains("damaged") && message.contains("--reset-uefi-vars"), "{message}");
    assert_eq!(fs::read(&variables).unwrap(), bytes, "what is damaged is left alone");
    let mut guest = run.clone().arg("--reset-uefi-vars").start();
    guest.debian_login();
    guest.power_off("poweroff");
    assert_eq!(fs::read(folder.path().join("vars.fd.old")).unwrap(), bytes);
}

#[test]
fn variables_belong_to_one_machine() {
    let folder = tempfile::tempdir().unwrap();
    let variables = folder.path().join("vars.fd");
    let run = firmware("uefi").arg("--uefi-vars").arg(&variables);
    let guest = run.clone().args(["--video", "none"]).start();
    host::wait_until("the variables are made", || variables.exists());
    host::wait_until("they are locked", || {
        let file = fs::File::open(&variables).unwrap();
        file.try_lock().is_err()
    });
    let message = run.refused(4);
    assert!(message.contains("used by another machine"), "{message}");
    drop(guest);
}

/// A disk or a CD that is none says so on the screen, and the machine goes on.
#[test]
fn nothing_to_boot_is_told_on_the_screen() {
    let folder = tempfile::tempdir().unwrap();
    let iso = folder.path().join("not.iso");
    fs::write(&iso, vec![7; 4 << 20]).unwrap();
    let name = format!("empty-{}", std::process::id());
    let mut guest = firmware("bios").args(["--name", &name]).arg("--cdrom").arg(&iso).start();
    let text = wait_for_screen(&mut guest, &name, folder.path(), &["No bootable device"]);
    assert!(text.contains("SeaBIOS (version"), "{text}");
}

#[test]
fn a_bios_starts_memtest_from_a_cd() {
    let folder = tempfile::tempdir().unwrap();
    let name = format!("memtest-{}", std::process::id());
    let mut guest = firmware("bios").args(["--name", &name, "--cdrom", MEMTEST]).start();
    let wanted = ["Memtest86+ v6", "Testing", "Test #4"];
    let text = wait_for_screen(&mut guest, &name, folder.path(), &wanted);
    assert!(text.contains("Errors: 0"), "{text}");
}

//! `lodge run` as a user meets it: exit codes, messages, and what `lodge-vmm` gets.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use assert_cmd::Command;
use assert_cmd::cargo::cargo_bin;
use lodge_model::spec::{MachineSpec, Net};

fn lodge(args: &[&str]) -> Command {
    let mut command = Command::new(cargo_bin!("lodge"));
    command.args(args);
    command
}

/// Runs it, expects this exit code, returns what it wrote to its error output.
fn refused(args: &[&str]) -> String {
    let output = lodge(args).assert().code(2).get_output().clone();
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn bad_requests_name_the_thing_and_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let file = file.to_str().unwrap();
    let here = folder.path().to_str().unwrap();
    let kernel = |more: &[&str]| refused(&[&["run", "--kernel", file], more].concat());
    for (message, parts) in [
        (refused(&["run"]), ["boot:", "--kernel FILE"]),
        (refused(&["run", "--kernel", "/no/such"]), ["'/no/such' does not exist", "help:"]),
        (refused(&["run", "--kernel", here]), ["is a directory", "help:"]),
        (kernel(&["--disk", here]), ["disks[0].path", "is a directory"]),
        (kernel(&["--disk", "/no/such.img"]), ["disks[0].path", "does not exist"]),
        (kernel(&["--disk", "a,formats=raw"]), ["unknown key 'formats'", "did you mean 'format'"]),
        (kernel(&["--cpus", "0"]), ["cpus", "use 1 to 254"]),
        (kernel(&["--memory", "0"]), ["memory", "too little"]),
        (kernel(&["--memory", "1000T"]), ["memory", "more than the host has"]),
        (kernel(&["--memory", "much"]), ["'much' is not a size", "512M"]),
        (kernel(&["--net", "tap=lodge-none0"]), ["nets[0].tap.name", "ip tuntap add"]),
        (kernel(&["--net", "bridge=br0"]), ["unknown value 'bridge'", "user, tap"]),
        (kernel(&["--console", "tty"]), ["unknown value 'tty'", "stdio, file, none"]),
        (kernel(&["--accel", "hvf"]), ["unknown value 'hvf'", "auto, kvm, soft"]),
        (kernel(&["--spec", "/no/such.toml"]), ["/no/such.toml", "help:"]),
        (kernel(&["--spec", here]), [here, "help:"]),
        (refused(&["run", "--bogus"]), ["--bogus", "Usage"]),
    ] {
        for part in parts {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
    }
}

#[test]
fn a_spec_files_mistake_is_shown_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("m.toml");
    fs::write(&file, "cpus = 2\nmemories = \"1G\"\n").unwrap();
    let message = refused(&["run", "--spec", file.to_str().unwrap()]);
    assert!(message.contains("line 2") && message.contains("memories"), "{message}");
}

#[test]
fn several_problems_come_at_once() {
    let message = refused(&["run", "--cpus", "0", "--memory", "1", "--name", "a b"]);
    for field in ["name:", "cpus:", "memory:", "boot:"] {
        assert!(message.contains(field), "{field} is not in: {message}");
    }
}

#[test]
fn a_printed_spec_reads_back_from_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--cpus", "3", "--disk", "a.img,serial=S", "--net", "user,forward=2222:22"];
    let args = [&["run", "--print-spec"], flags.as_slice()].concat();
    let first = lodge(&args).current_dir(folder.path()).assert().success().get_output().clone();
    let file = folder.path().join("m.toml");
    fs::write(&file, &first.stdout).unwrap();
    let args = ["run", "--print-spec", "--spec", file.to_str().unwrap()];
    let second = lodge(&args).current_dir("/").assert().success().get_output().clone();
    assert_eq!(first.stdout, second.stdout);
    let spec = MachineSpec::from_toml(std::str::from_utf8(&second.stdout).unwrap()).unwrap();
    assert_eq!(spec.cpus, 3);
    assert!(spec.disks[0].path.is_absolute() && spec.disks[0].path.ends_with("a.img"));
    assert!(matches!(&spec.nets[0], Net::User(user) if user.forward[0].host == 2222));
}

#[test]
fn the_last_of_two_equal_flags_counts_and_lists_grow() {
    let args = ["run", "--print-spec", "--cpus", "2", "--disk", "a", "--cpus", "4", "--disk", "b"];
    let output = lodge(&args).assert().success().get_output().clone();
    let spec = MachineSpec::from_toml(std::str::from_utf8(&output.stdout).unwrap()).unwrap();
    assert_eq!((spec.cpus, spec.disks.len()), (4, 2));
}

/// A copy of `lodge` with a `lodge-vmm` of ours beside it.
fn with_vmm(folder: &Path, script: &str) -> Command {
    let lodge = folder.join("lodge");
    fs::copy(cargo_bin!("lodge"), &lodge).unwrap();
    let vmm = folder.join("lodge-vmm");
    fs::write(&vmm, script).unwrap();
    fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755)).unwrap();
    Command::new(lodge)
}

#[test]
fn the_vmm_gets_the_spec_and_its_exit_code_is_ours() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, "x").unwrap();
    let script = "#!/bin/sh\n[ \"$1\" = --spec-fd ] && cat /proc/self/fd/$2\nexit 7\n";
    let mut command = with_vmm(folder.path(), script);
    command.args(["run", "--memory", "64M", "--kernel"]).arg(&kernel);
    let output = command.assert().code(7).get_output().clone();
    let spec: MachineSpec = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(spec.memory, lodge_model::MemorySize::mib(64));
    assert_eq!(spec.boot.kernel.as_deref(), Some(kernel.as_path()));
}

#[test]
fn a_vmm_that_cannot_start_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = with_vmm(folder.path(), "#!/no/such/interpreter\n");
    command.args(["run", "--kernel"]).arg(folder.path().join("lodge"));
    let output = command.assert().code(1).get_output().clone();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("cannot start") && message.contains("lodge-vmm"), "{message}");
}

#[test]
fn a_missing_vmm_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = with_vmm(folder.path(), "");
    fs::remove_file(folder.path().join("lodge-vmm")).unwrap();
    command.env("PATH", folder.path());
    command.args(["run", "--kernel"]).arg(folder.path().join("lodge"));
    let output = command.assert().code(1).get_output().clone();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("lodge-vmm is not installed"), "{message}");
}

#[test]
fn the_help_tells_examples_and_exit_codes() {
    let output = lodge(&["run", "--help"]).assert().success().get_output().clone();
    let text = String::from_utf8(output.stdout).unwrap();
    for part in ["Examples:", "Exit codes:", "130", "the guest powered off", "Ctrl-A X"] {
        assert!(text.contains(part), "{part}");
    }
}

#[test]
fn host_check_reports_every_line_with_a_status() {
    let output = lodge(&["host", "check", "--json"]).output().unwrap();
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let mut any_missing = false;
    for finding in &findings {
        let status = finding["status"].as_str().unwrap();
        assert!(["ok", "warning", "missing"].contains(&status), "{finding}");
        assert!(status == "ok" || !finding["help"].as_str().unwrap().is_empty(), "{finding}");
        any_missing |= status == "missing";
    }
    assert_eq!(output.status.code(), Some(i32::from(any_missing)));
    for name in ["virtualization", "KVM", "IOMMU", "huge pages", "io_uring", "passt"] {
        assert!(findings.iter().any(|finding| finding["name"] == name), "{name}");
    }
}

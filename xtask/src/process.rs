//! Running other programs: said before, checked after.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The repository's root.
pub fn root() -> PathBuf {
    let xtask = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().map_or(xtask.clone(), PathBuf::from)
}

/// `cargo` with these arguments, in the repository's root.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// The command as one would type it.
pub fn shown(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    let program = program.rsplit('/').next().unwrap_or_default().to_owned();
    let args = command.get_args().map(|arg| {
        let arg = arg.to_string_lossy();
        if arg.contains([' ', '"', '\'']) { format!("'{arg}'") } else { arg.into_owned() }
    });
    [program].into_iter().chain(args).collect::<Vec<_>>().join(" ")
}

/// Says what it does, does it, and fails where it fails.
pub fn call(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    eprintln!("xtask: {shown}");
    let status = command.status().with_context(|| format!("cannot run `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed ({status}); what it printed says why");
    }
    Ok(())
}

/// Does it quietly and returns what it printed; `None` where it failed or is not there.
pub fn quiet(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_as_typed() {
        let mut command = Command::new("/usr/bin/echo");
        command.args(["a", "b c"]);
        assert_eq!(shown(&command), "echo a 'b c'");
    }

    #[test]
    fn failures_are_told() {
        assert!(call(&mut Command::new("true")).is_ok());
        let error = call(Command::new("sh").args(["-c", "exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c 'exit 3'") && error.contains("3"), "{error}");
        assert!(call(&mut Command::new("/no/such/program")).is_err());
        assert_eq!(quiet(Command::new("echo").arg("x")).as_deref(), Some("x\n"));
        assert_eq!(quiet(&mut Command::new("false")), None);
    }
}

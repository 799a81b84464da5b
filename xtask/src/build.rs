//! The programs as users get them: the release build.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::{call, cargo, quiet};

/// Builds `lodge` and `lodge-vmm` in release and returns the folder that they are in.
pub fn release() -> Result<PathBuf> {
    call(&mut cargo(&["build", "--release", "--locked", "-p", "lodge-cli", "-p", "lodge-vmm"]))?;
    Ok(target()?.join("release"))
}

/// The target directory, wherever the configuration puts it.
pub fn target() -> Result<PathBuf> {
    let metadata = ["metadata", "--format-version", "1", "--no-deps", "--offline"];
    let text = quiet(&mut cargo(&metadata)).context("`cargo metadata` failed")?;
    let metadata: Value =
        serde_json::from_str(&text).context("`cargo metadata` printed no JSON")?;
    let target = metadata["target_directory"].as_str();
    Ok(target.context("`cargo metadata` tells no target directory")?.into())
}

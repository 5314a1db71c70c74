//! `cargo xtask deny`: licences, sources and banned crates of everything that roost is made of, by cargo-deny and its `deny.toml`. Part of
//! `test --all` and of no ordinary run: building the tool takes longer than the rest of an ordinary run's checks.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::binaries::cargo;
use crate::cache;
use crate::step::{shown, step};

const VERSION: &str = "0.20.2";
/// Not advisories: their database is a repository, which not every machine reaches.
const CHECKS: [&str; 3] = ["licenses", "bans", "sources"];

/// Installs the tool where it is missing, and runs its checks.
///
/// # Errors
/// What it found, or that it cannot be installed.
pub(crate) fn run() -> Result<()> {
    let tool = installed()?;
    shown(
        Command::new(tool)
            .args(["--locked", "check"])
            .args(CHECKS)
            .current_dir(cache::workspace()),
    )
}

fn installed() -> Result<PathBuf> {
    let root = cache::dir()?.join(format!("cargo-deny-{VERSION}"));
    let tool = root.join("bin/cargo-deny");
    if !tool.is_file() {
        step("installing cargo-deny", || {
            let version = format!("cargo-deny@{VERSION}");
            shown(cargo().args(["install", "--locked", &version, "--root"]).arg(&root))
        })?;
    }
    Ok(tool)
}

//! `cargo xtask page`: the status page in a headless Chromium. Part of `test --all` and of no ordinary run: that program is large, and the page
//! changes seldom.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::binaries::cargo;
use crate::cache;
use crate::step::{shown, step};
use crate::test::TEST_FEATURES;

/// What it is called, by its own project and by distributions.
const NAMES: [&str; 5] = [
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "chrome-headless-shell",
];

/// Runs the page's tests.
pub(crate) fn run() -> Result<()> {
    let chromium = chromium().context(
        "the status page is NOT TESTED: it needs a Chromium on PATH (apt-get install chromium-headless-shell), or CHROMIUM=<path>",
    )?;
    let pictures = cache::target().join("page");
    std::fs::create_dir_all(&pictures).with_context(|| format!("cannot make {}", pictures.display()))?;
    step("the status page in Chromium", || {
        shown(
            cargo()
                .args(["test", "--workspace", "--features", TEST_FEATURES, "--test", "program"])
                .args(["--", "--ignored", "--nocapture", "page::"])
                .env("CHROMIUM", &chromium)
                .env("PICTURES", &pictures),
        )
    })?;
    println!("pictures are in {}", pictures.display());
    Ok(())
}

fn chromium() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("CHROMIUM") {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH")?;
    let directories: Vec<_> = std::env::split_paths(&path).collect();
    let places = NAMES
        .iter()
        .flat_map(|name| directories.iter().map(move |dir| dir.join(name)));
    places.into_iter().find(|place| {
        Command::new(place)
            .arg("--version")
            .output()
            .is_ok_and(|output| output.status.success())
    })
}

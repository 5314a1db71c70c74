//! `cargo xtask sdk`: client libraries of others, from their registry, against envd. Part of `test --all` and of no ordinary run, which
//! must not depend on that registry.

use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::binaries::cargo;
use crate::cache;
use crate::step::{shown, step};

/// Where the SDK looks for envd in its debug mode.
const ADDRESS: &str = "127.0.0.1:49983";
/// How long envd may take to listen.
const PATIENCE: Duration = Duration::from_secs(30);
const FILES: &[&str] = &["package.json", "package-lock.json", "envd.mjs"];

/// Runs the SDK's tests.
pub(crate) fn run() -> Result<()> {
    let dir = cache::target().join("sdk");
    step("fetching the SDK", || {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        for file in FILES {
            let from = cache::workspace().join("tests/sdk").join(file);
            fs::copy(&from, dir.join(file)).with_context(|| format!("cannot copy {}", from.display()))?;
        }
        shown(
            Command::new("npm")
                .args(["ci", "--no-audit", "--no-fund"])
                .current_dir(&dir),
        )
        .context("Node.js 20 or newer with npm is needed, and the registry")
    })?;
    step("building envd for the SDK", || {
        shown(cargo().args(["build", "--package", "roost-envd", "--bin", "envd"]))
    })?;
    step("E2B's SDK against envd", || {
        ensure!(
            TcpStream::connect(ADDRESS).is_err(),
            "something listens on {ADDRESS} already"
        );
        let envd = Command::new(cache::target().join("debug/envd"))
            .args(["--no-init", "--listen", ADDRESS])
            .spawn()
            .context("cannot start envd")?;
        let mut envd = Ended(envd);
        envd.wait_until_it_listens()?;
        let user = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).context("no users")?;
        let user = user.context("whoever runs this is no user of this machine")?.name;
        shown(
            Command::new("node")
                .arg("envd.mjs")
                .current_dir(&dir)
                .env("ROOST_USER", user),
        )
    })
}

/// A process that is ended with this value.
struct Ended(Child);

impl Ended {
    fn wait_until_it_listens(&mut self) -> Result<()> {
        let began = Instant::now();
        while TcpStream::connect(ADDRESS).is_err() {
            if let Some(status) = self.0.try_wait()? {
                bail!("envd ended: {status}");
            }
            ensure!(began.elapsed() < PATIENCE, "envd does not listen on {ADDRESS}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

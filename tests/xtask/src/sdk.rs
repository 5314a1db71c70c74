//! `cargo xtask sdk`: client libraries of others, from their registry: E2B's SDK against envd here, Connect's client for Node against the
//! agent in the rig. Part of `test --all` and of no ordinary run, which must not depend on that registry.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::binaries::{self, cargo};
use crate::step::{shown, step};
use crate::{cache, rig};

/// Where the SDK looks for envd in its debug mode.
const ADDRESS: &str = "127.0.0.1:49983";
/// How long envd may take to listen.
const PATIENCE: Duration = Duration::from_secs(30);
const FILES: &[&str] = &["package.json", "package-lock.json", "envd.mjs", "agent.mjs"];
/// What the client for Node is, and needs.
const MODULES: &[&str] = &["@connectrpc/connect", "@connectrpc/connect-node", "@bufbuild/protobuf"];
/// Time for the rig: everything is called four times, by a program that is emulated.
const RIG_SECONDS: u64 = 1800;

/// Runs the tests of all libraries.
pub(crate) fn run() -> Result<()> {
    let dir = cache::target().join("sdk");
    fetch(&dir)?;
    against_envd(&dir)?;
    against_agent(&dir)
}

fn fetch(dir: &Path) -> Result<()> {
    step("fetching client libraries", || {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        for file in FILES {
            let from = cache::workspace().join("tests/sdk").join(file);
            fs::copy(&from, dir.join(file)).with_context(|| format!("cannot copy {}", from.display()))?;
        }
        shown(
            Command::new("npm")
                .args(["ci", "--no-audit", "--no-fund"])
                .current_dir(dir),
        )
        .context("Node.js 20 or newer with npm is needed, and the registry")
    })
}

fn against_envd(dir: &Path) -> Result<()> {
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
                .current_dir(dir)
                .env("ROOST_USER", user),
        )
    })
}

fn against_agent(dir: &Path) -> Result<()> {
    let bundle = dir.join("rig");
    step("code of the API for Node", || {
        if bundle.exists() {
            fs::remove_dir_all(&bundle)?;
        }
        let generated = bundle.join("gen");
        fs::create_dir_all(&generated)?;
        let proto = cache::workspace().join("agent/proto");
        let plugin = dir.join("node_modules/.bin/protoc-gen-es");
        shown(
            Command::new("protoc")
                .arg(format!("--plugin=protoc-gen-es={}", plugin.display()))
                .arg(format!("--es_out={}", generated.display()))
                .args(["--es_opt=target=js", "-I"])
                .arg(&proto)
                .arg("hostagent.proto"),
        )?;
        for file in ["package.json", "agent.mjs"] {
            fs::copy(dir.join(file), bundle.join(file))?;
        }
        for module in MODULES {
            let to = bundle.join("node_modules").join(module);
            fs::create_dir_all(to.parent().expect("a path below the bundle has a parent"))?;
            shown(
                Command::new("cp")
                    .arg("-r")
                    .arg(dir.join("node_modules").join(module))
                    .arg(to),
            )?;
        }
        let node = Command::new("node").args(["-p", "process.execPath"]).output()?;
        let node = String::from_utf8(node.stdout).context("node is at an odd path")?;
        fs::copy(node.trim(), bundle.join("node")).context("cannot copy node")?;
        Ok(())
    })?;
    let binaries = binaries::build()?;
    let rig = rig::Options {
        add: vec![format!("{}:/root/sdk", bundle.display())],
        timeout: RIG_SECONDS,
        ..rig::Options::command(&["bash", "-c", "cd /root/sdk && ./node agent.mjs"])
    };
    let end = step("Connect's client against the agent", || {
        rig::run_with(&rig, Some(&binaries))
    })?;
    ensure!(end.status == 0, "Connect's client failed: status {}", end.status);
    Ok(())
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

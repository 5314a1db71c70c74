//! `cargo xtask fleet`: the manifests in `packaging/fleet`, read by what is to be had of their own tools without a cluster. Part of `test --all` and of
//! no ordinary run, which must not depend on the registry that these come from.
//!
//! Kubernetes' is held against the schemas of its API, which kubernetes-validate carries. Of Nomad's the syntax is read, and no more: what knows
//! its keys is Nomad itself.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache;
use crate::step::{quiet, shown, step};

/// What reads them, from PyPI.
const TOOLS: [&str; 2] = ["kubernetes-validate==1.37.0", "python-hcl2==8.1.4"];
/// Versions of Kubernetes: one that is old by now, and the newest that kubernetes-validate knows.
const KUBERNETES: [&str; 2] = ["1.34", "1.37"];

/// Reads all manifests.
pub(crate) fn run() -> Result<()> {
    let tools = cache::target().join("fleet");
    let manifests = cache::workspace().join("packaging/fleet");
    step("fetching what reads manifests", || {
        fs::create_dir_all(&tools).with_context(|| format!("cannot make {}", tools.display()))?;
        quiet(Command::new("python3").args(["-m", "venv"]).arg(&tools))
            .context("Python with venv is needed (apt-get install python3-venv)")?;
        quiet(
            Command::new(tools.join("bin/pip"))
                .args(["install", "--quiet", "--disable-pip-version-check"])
                .args(TOOLS),
        )
        .context("PyPI is needed")
    })?;
    step("the manifests of Kubernetes and Nomad", || {
        for version in KUBERNETES {
            shown(
                Command::new(tools.join("bin/kubernetes-validate"))
                    .args(["--strict", "--kubernetes-version", version])
                    .arg(manifests.join("kubernetes.yaml")),
            )?;
        }
        quiet(Command::new(tools.join("bin/hcl2tojson")).arg(manifests.join("roost.nomad.hcl"))).map(drop)
    })
}

//! `cargo xtask`: everything this repository does beyond `cargo build`.
//!
//! ```text
//! setup   Debian packages that the rest needs
//! guest   kernel, initramfs and the `minimal` template, under target/rig
//! package the Debian packages, under target/package
//! rig     a throw-away Debian host in QEMU with this build installed; runs one command in it
//! test    what CI checks, the end-to-end tests in the rig included
//! bench   figures of this build's speed, in the rig, each against a baseline
//! fleet   the manifests for Kubernetes and Nomad, by their schemas and syntax
//! deny    licences, sources and banned crates, by cargo-deny
//! fuzz    what the agent reads of others, by libFuzzer
//! page    the status page, in a headless Chromium
//! sdk     client libraries of others against envd
//! reference  docs/api.md, from the .proto files
//! demo    one sandbox from create to destroy, and what it left behind
//! ```
//!
//! Holds: this crate depends on no other crate of the workspace but `roost-initramfs`, which depends on none: it builds before any of them can.
//! Not here: what runs inside the rig (`tests/harness`, `tests/rig`, `tests/demo`).

mod bench;
mod binaries;
mod cache;
mod debian;
mod demo;
mod deny;
mod dependencies;
#[cfg(test)]
mod documents;
mod fleet;
mod fuzz;
mod guest;
mod host;
mod kernel;
mod package;
mod page;
mod qemu;
mod reference;
mod rig;
mod sdk;
mod series;
mod setup;
mod step;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Builds, guest image, rig, tests and demo of roost")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that builds and rig need (as root), or say which are missing
    Setup,
    /// Make the guest's kernel, initramfs and the minimal template
    Guest,
    /// Make the Debian images alone, which `test` does beside its first checks
    #[command(hide = true)]
    Images,
    /// Make the Debian packages
    Package(package::Options),
    /// Boot a throw-away Debian host with this build in it and run a command there as root
    Rig(rig::Options),
    /// Everything that CI checks
    Test(test::Options),
    /// Everything that can happen at every step of every operation, in the rig; takes long
    Faults,
    /// Figures of this build's speed, in the rig, each against a baseline of the same run
    Bench(bench::Options),
    /// What the agent reads of others, by libFuzzer
    Fuzz(fuzz::Options),
    /// Licences, sources and banned crates, by cargo-deny
    Deny,
    /// The manifests for Kubernetes and Nomad; needs Python and its registry
    Fleet,
    /// Client libraries of others against envd; needs Node.js and its registry
    Sdk,
    /// Write docs/api.md anew, from the .proto files
    Reference,
    /// The status page in a headless Chromium, which must be there
    Page,
    /// Show one sandbox from create to destroy, and that nothing is left of it
    Demo(demo::Options),
}

fn main() -> ExitCode {
    if let Some(error) = binaries::compile() {
        return finish(Err(error));
    }
    let outcome = match Cli::parse().task {
        Task::Setup => setup::run().map(|()| 0),
        Task::Guest => guest::run().map(|()| 0),
        Task::Images => host::run().map(|()| 0),
        Task::Package(options) => package::run(&options).map(|()| 0),
        Task::Rig(options) => rig::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Faults => test::run(&test::Options::all_faults()),
        Task::Bench(options) => bench::run(&options),
        Task::Fuzz(options) => fuzz::run(&options).map(|()| 0),
        Task::Deny => deny::run().map(|()| 0),
        Task::Fleet => fleet::run().map(|()| 0),
        Task::Sdk => sdk::run().map(|()| 0),
        Task::Reference => reference::run().map(|()| 0),
        Task::Page => page::run().map(|()| 0),
        Task::Demo(options) => demo::run(&options),
    };
    finish(outcome)
}

fn finish(outcome: Result<u8>) -> ExitCode {
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(rig::STATUS_RIG_FAILED)
        }
    }
}

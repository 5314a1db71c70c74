//! A stand-in for cloud-hypervisor in tests: the part of its command line and REST API that roost uses, over Debian's
//! `qemu-system-x86_64` with KVM.
//!
//! ```text
//! options  the command line      config  its VmConfig, as vm.info and config.json show it
//! api      HTTP on the passed listener  -->  vm  what there is and may happen  -->  qemu  the process and its QMP
//! events   the event monitor     sys     the one thing that needs unsafe
//! holes    what a snapshot misses of memory that was still being loaded
//! ```
//!
//! Holds: QEMU dies with this process (PDEATHSIG); this process ends when QEMU does. It opens no socket by path and
//! makes no file but a snapshot's, so it runs inside the confinement that is meant for the real one.
//! Not here: any claim that the real one behaves the same; that is for tests with `CLOUD_HYPERVISOR` set.

mod api;
mod config;
mod events;
mod holes;
mod options;
mod qemu;
mod sys;
mod vm;

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};

use crate::events::Events;
use crate::options::Options;
use crate::vm::Vmm;

fn main() -> ExitCode {
    eprintln!(
        "standin-vmm {}: this is NOT cloud-hypervisor but a stand-in for tests, over QEMU",
        env!("CARGO_PKG_VERSION")
    );
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--version"] {
        println!("cloud-hypervisor v{}", vm::version());
        return ExitCode::SUCCESS;
    }
    match Options::parse(&arguments).context("bad command line").and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("standin-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Serves until the VM has ended; then the process ends, and with it the API's threads.
fn run(options: Options) -> Result<()> {
    let events = Events::new(options.event_monitor)?;
    let (vmm, driver) = Vmm::new(options.start, events);
    let listener = options.api_socket;
    let server = Arc::clone(&vmm);
    thread::Builder::new()
        .name("http-server".to_owned())
        .spawn(move || api::serve(&listener, &server))?;
    driver.run(&vmm)
}

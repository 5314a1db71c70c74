//! `cargo xtask demo`: one sandbox from create to destroy, on a fresh host, and what it left there. The part inside the
//! rig is `tests/demo/demo.sh`.

use anyhow::Result;
use clap::Args;

use crate::rig;
use crate::step::step;
use crate::{binaries, cache, setup};

/// Arguments of `cargo xtask demo`.
#[derive(Args)]
pub(crate) struct Options {
    /// Start the daemons without systemd
    #[arg(long)]
    direct: bool,
}

/// Builds, boots the rig, runs the demo; its status.
pub(crate) fn run(options: &Options) -> Result<u8> {
    setup::run()?;
    let binaries = binaries::build()?;
    let script = cache::workspace().join("tests/demo/demo.sh");
    let rig = rig::Options {
        add: vec![format!("{}:/root/demo.sh", script.display())],
        direct: options.direct,
        ..rig::Options::command(&["bash", "/root/demo.sh"])
    };
    step("the demo in the rig", || rig::run_with(&rig, Some(&binaries))).map(|end| end.status)
}

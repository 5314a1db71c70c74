//! `cargo xtask demo`.

use anyhow::Result;
use clap::Args;

/// Arguments of `cargo xtask demo`.
#[derive(Args)]
pub(crate) struct Options {}

/// Runs the demo.
pub(crate) fn run(_: &Options) -> Result<u8> {
    anyhow::bail!("not yet")
}

//! `cargo xtask test`.

use anyhow::Result;
use clap::Args;

/// Arguments of `cargo xtask test`.
#[derive(Args)]
pub(crate) struct Options {}

/// Runs the test.
pub(crate) fn run(_: &Options) -> Result<u8> {
    anyhow::bail!("not yet")
}

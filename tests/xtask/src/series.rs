//! A series of boots of the rig over one data disk, with the power cut in between, or the host shut down: QEMU is killed at the moment
//! that the command in the rig asks for it, by a line to `/run/rig-cut`, or ends by itself, and the same command starts anew in the next
//! boot.
//!
//! Holds: what the command must remember from one boot to the next lies below /var/lib/roost; all else is as in any first boot. A series
//! whose rig crashed begins anew, once and said aloud: what was on its disk proves nothing any more.

use anyhow::{Context, Result, bail};

use crate::binaries::Binaries;
use crate::rig::{Boot, End, Machine, Options};
use crate::step::step;

/// More boots than any command has cuts.
const MOST_BOOTS: u32 = 100;

/// Boots until the command ends by itself; how it did. `options.timeout` is each boot's.
///
/// # Errors
/// When a boot fails, or there is no end of them.
pub(crate) fn run(options: &Options, binaries: &Binaries) -> Result<End> {
    let options = Options {
        series: true,
        ..options.clone()
    };
    if let Some(end) = run_once(&options, binaries)? {
        return Ok(end);
    }
    eprintln!("NOTE: THE RIG'S OWN KERNEL CRASHED OR HUNG, and the series of boots begins anew");
    run_once(&options, binaries)?.context("the rig's own kernel crashed or hung, twice")
}

/// One series; nothing where a rig of it crashed.
fn run_once(options: &Options, binaries: &Binaries) -> Result<Option<End>> {
    let machine = Machine::prepare(options, Some(binaries))?;
    for number in 1..=MOST_BOOTS {
        match step(&format!("boot {number}"), || machine.boot())? {
            Boot::Ended(end) => return Ok(Some(end)),
            Boot::Cut(moment) => eprintln!("    {moment}"),
            Boot::Crashed(_) => return Ok(None),
        }
        machine.keep_console(&number.to_string())?;
    }
    bail!("the command asked for another boot in each of {MOST_BOOTS}");
}

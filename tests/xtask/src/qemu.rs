//! The QEMU that emulates the rig: Debian's, unpacked beside the other artefacts and run from there.
//!
//! Not the machine's own, for two faults of older ones that stop a rig with two processors once in an hour of guests:
//!
//! - Before 8.1 a processor that translates code while another one writes it may go on with the old one for good, and a kernel writes its
//!   code all the time: KVM alone patches a branch of its interrupt delivery with every VM that starts. Both processors then trap on one
//!   breakpoint for ever.
//! - Before 10.2 each exit of a nested guest clears a bit of the processor's pending interrupts without a lock or an atomic operation. One
//!   that is raised at that moment is lost, a timer's for example, and whatever waits for it waits for ever.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;

use crate::cache;
use crate::debian::Recipe;

const RECIPE: Recipe<'_> = Recipe {
    release: "trixie-backports",
    variant: "extract",
    packages: &["qemu-system-x86", "seabios"],
    extra: &[],
};

const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Where its tree is.
pub(crate) struct Qemu(PathBuf);

/// QEMU, made when missing.
pub(crate) fn ensure() -> Result<Qemu> {
    cache::artefact("qemu", RECIPE.key(), |dir| RECIPE.make_files(dir, &["./usr/*"])).map(Qemu)
}

impl Qemu {
    /// The words that run it: with its own loader and libraries, since this machine may have older ones.
    pub(crate) fn words(&self) -> Vec<OsString> {
        let at = |path: &str| self.0.join(path).into_os_string();
        let mut words = vec![
            at("usr/lib64/ld-linux-x86-64.so.2"),
            "--library-path".into(),
            at(LIBRARIES),
            at("usr/bin/qemu-system-x86_64"),
        ];
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            words.extend(["-L".into(), at(firmware)]);
        }
        words
    }
}

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
use std::fs;
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

/// How fast the emulated processors' time stamp counter runs, in kHz; `None` where this machine does not say.
///
/// It is this machine's own. A kernel that has to find out compares it with an emulated timer, and on a busy machine one has been wrong
/// by a factor of 46, so that in its rig half a minute had twenty.
pub(crate) fn tsc_khz() -> Option<u64> {
    tsc_khz_by(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

/// A kernel whose processor has a steady counter derives its BogoMIPS from that: two for each MHz, with two decimals.
fn tsc_khz_by(cpuinfo: &str) -> Option<u64> {
    let value = |name: &str| {
        cpuinfo
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(key, _)| key.trim() == name)
            .map(|(_, value)| value.trim())
    };
    value("flags")?.split(' ').find(|flag| *flag == "constant_tsc")?;
    let (whole, hundredths) = value("bogomips")?.split_once('.')?;
    let whole: u64 = whole.parse().ok()?;
    let hundredths: u64 = (hundredths.len() == 2).then(|| hundredths.parse().ok())??;
    Some((whole * 100 + hundredths) * 5).filter(|frequency| *frequency > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counters_speed_is_known_where_it_is_steady() {
        let cpuinfo = |flags: &str, bogomips: &str| {
            format!("processor\t: 0\nflags\t\t: fpu {flags} tsc\nbogomips\t: {bogomips}\n\nprocessor\t: 1\n")
        };
        assert_eq!(tsc_khz_by(&cpuinfo("constant_tsc", "5192.20")), Some(2_596_100));
        assert_eq!(tsc_khz_by(&cpuinfo("rdtscp", "5192.20")), None);
        assert_eq!(tsc_khz_by(&cpuinfo("constant_tsc", "0.00")), None);
        assert_eq!(tsc_khz_by(&cpuinfo("constant_tsc", "5192.2")), None);
        assert_eq!(tsc_khz_by("processor : 0\nBogoMIPS : 50.00\n"), None);
    }
}

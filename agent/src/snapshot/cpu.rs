//! Which CPU a host has, so that a snapshot wakes only where its guest finds what it had.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::errors::FileError;

/// A CPU, as `/proc/cpuinfo` has it on x86.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// `vendor_id`.
    pub vendor: String,
    /// `model name`.
    pub model_name: String,
    /// `cpu family`.
    pub family: u32,
    /// `model`.
    pub model: u32,
    /// `stepping`.
    pub stepping: u32,
    /// `flags`.
    pub flags: BTreeSet<String>,
}

impl Cpu {
    /// This host's first CPU; a host with CPUs of several kinds is none that we run on.
    ///
    /// # Errors
    /// [`FileError`], also when what is there does not parse.
    pub fn of_this_host() -> Result<Self, FileError> {
        let path = Path::new("/proc/cpuinfo");
        let text = std::fs::read_to_string(path).map_err(|error| FileError::new("reading", path, error))?;
        Self::parse(&text).ok_or_else(|| FileError::new("parsing", path, std::io::ErrorKind::InvalidData.into()))
    }

    /// The first CPU of a `/proc/cpuinfo`; `None` when anything is missing.
    pub fn parse(text: &str) -> Option<Self> {
        let first = text.split("\n\n").next().unwrap_or_default();
        let field = |name: &str| {
            first.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                (key.trim_end() == name).then(|| value.trim())
            })
        };
        let number = |name| field(name)?.parse().ok();
        Some(Self {
            vendor: field("vendor_id")?.to_owned(),
            model_name: field("model name")?.to_owned(),
            family: number("cpu family")?,
            model: number("model")?,
            stepping: number("stepping")?,
            flags: field("flags")?.split_ascii_whitespace().map(str::to_owned).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\n\
        model name\t: Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz\nstepping\t: 7\nmicrocode\t: 0x5003604\n\
        flags\t\t: fpu vme avx2 avx512f\nvmx flags\t: vnmi preemption_timer\nbugs\t\t: spectre_v1\n\n\
        processor\t: 1\nvendor_id\t: Other\nflags\t\t: none\n\n";

    #[test]
    fn the_first_cpu_is_read() {
        let cpu = Cpu::parse(TWO).expect("parsed");
        assert_eq!(
            (cpu.vendor.as_str(), cpu.family, cpu.model, cpu.stepping),
            ("GenuineIntel", 6, 85, 7)
        );
        assert_eq!(cpu.model_name, "Intel(R) Xeon(R) Gold 6230 CPU @ 2.10GHz");
        assert_eq!(cpu.flags, ["avx2", "avx512f", "fpu", "vme"].map(String::from).into());
    }

    #[test]
    fn what_lacks_a_field_is_no_cpu() {
        for field in [
            "vendor_id",
            "cpu family",
            "model\t",
            "model name",
            "stepping",
            "flags\t",
        ] {
            assert_eq!(Cpu::parse(&TWO.replace(field, "gone\t")), None, "{field}");
        }
        assert_eq!(Cpu::parse(&TWO.replace(": 85", ": unknown")), None);
        assert_eq!(Cpu::parse(""), None);
    }
}

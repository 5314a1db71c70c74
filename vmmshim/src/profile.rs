//! What a kind of VMM may open on this host, whichever sandbox it runs: data, so that it can be audited and replaced in tests.
//!
//! ```json
//! { "name": "…", "execute": ["/abs/file", …], "read": ["/abs/file/or/directory", …], "read_write": ["/abs/file/or/device", …],
//!   "overhead": { "memory": MiB, "threads": number } }
//! ```
//!
//! A foreign profile may also say `"violations": "refused"` or `"unfiltered"` ([`Violation`]), `"unchecked_devices": true` and
//! `"shared_cgroup": true`.
//!
//! A path that does not exist on this host is left out: it cannot be opened now, and is not allowed should it appear later. A
//! directory means everything below it. A library needs `read` only; programs, and the ELF interpreter, need `execute`.
//! Not here: what belongs to one sandbox (`launch` adds the VMM itself, kernel, disk, VM directory). Profiles that are not
//! compiled in can be named only in builds with the feature `foreign-profiles`; packaged builds are without it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::cgroup::Overhead;
use crate::confine::Allow;
use crate::confine::filter::Violation;

/// The profile of cloud-hypervisor as Debian's or its own releases build it, dynamic or static.
const CLOUD_HYPERVISOR: &str = include_str!("../profiles/cloud-hypervisor.json");

/// A confinement profile.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Profile {
    /// What logs call it.
    pub(crate) name: String,
    execute: Vec<PathBuf>,
    read: Vec<PathBuf>,
    read_write: Vec<PathBuf>,
    /// What it needs of the host beside its guest.
    overhead: Overhead,
    /// Takes anything as disk and tap. Only a foreign profile can say so, for tests where there is no device-mapper.
    #[cfg(feature = "foreign-profiles")]
    #[serde(default)]
    pub(crate) unchecked_devices: bool,
    #[cfg(feature = "foreign-profiles")]
    #[serde(default)]
    violations: Violation,
    /// Leaves the VMM in the shim's cgroup, for tests where no unit has given it one.
    #[cfg(feature = "foreign-profiles")]
    #[serde(default)]
    shared_cgroup: bool,
}

impl Profile {
    /// The profile that is compiled in.
    pub(crate) fn compiled_in() -> Self {
        serde_json::from_str(CLOUD_HYPERVISOR).expect("a test reads the compiled-in profile")
    }

    /// A profile from a file.
    #[cfg(feature = "foreign-profiles")]
    pub(crate) fn from_file(path: &Path) -> io::Result<Self> {
        serde_json::from_slice(&std::fs::read(path)?).map_err(io::Error::from)
    }

    /// Whether disk and tap are checked; always in packaged builds.
    pub(crate) fn checks_devices(&self) -> bool {
        #[cfg(feature = "foreign-profiles")]
        return !self.unchecked_devices;
        #[cfg(not(feature = "foreign-profiles"))]
        true
    }

    /// What becomes of a VMM that makes a system call it may not.
    pub(crate) fn violations(&self) -> Violation {
        #[cfg(feature = "foreign-profiles")]
        return self.violations;
        #[cfg(not(feature = "foreign-profiles"))]
        Violation::Killed
    }

    /// What the VMM needs beside its guest; `None` where it has no cgroup that could be limited, never in packaged builds.
    pub(crate) fn overhead(&self) -> Option<Overhead> {
        #[cfg(feature = "foreign-profiles")]
        if self.shared_cgroup {
            return None;
        }
        Some(self.overhead)
    }

    /// The profile's rules for those of its paths that exist.
    ///
    /// # Errors
    /// A relative path (`InvalidInput`), or a path that exists and cannot be opened.
    pub(crate) fn rules(&self) -> io::Result<Vec<(OwnedFd, Allow)>> {
        let lists = [
            (&self.execute, Allow::Execute),
            (&self.read, Allow::Read),
            (&self.read_write, Allow::ReadWrite),
        ];
        let mut rules = Vec::new();
        for (path, allow) in lists
            .into_iter()
            .flat_map(|(paths, allow)| paths.iter().map(move |path| (path, allow)))
        {
            if !path.is_absolute() {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            match open_path(path) {
                Ok(file) => rules.push((file.into(), allow)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(rules)
    }
}

/// Opens a path for nothing but naming it: no permission on the file is needed, no device is touched.
pub(crate) fn open_path(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compiled_in_profile_names_kvm_and_nothing_else_writable() {
        let profile = Profile::compiled_in();
        assert_eq!(profile.name, "cloud-hypervisor");
        assert_eq!(profile.read_write, [PathBuf::from("/dev/kvm")]);
        assert!(profile.checks_devices());
        assert_eq!(profile.violations(), Violation::Killed);
        assert!(profile.overhead().is_some());
        assert!(!profile.rules().expect("absolute paths").is_empty());
    }

    #[test]
    fn unknown_fields_and_relative_paths_are_refused() {
        let typo = r#"{"name": "x", "execute": [], "reed": [], "read": [], "read_write": [], "overhead": {"memory": 1, "threads": 1}}"#;
        assert!(serde_json::from_str::<Profile>(typo).is_err());
        let relative = r#"{"name": "x", "execute": ["bin/sh"], "read": [], "read_write": [], "overhead": {"memory": 1, "threads": 1}}"#;
        let profile: Profile = serde_json::from_str(relative).expect("a profile");
        assert!(profile.rules().is_err());
    }
}

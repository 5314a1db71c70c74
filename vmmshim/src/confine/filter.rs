//! The system calls that a VMM may make, for good: `filters/<arch>.json`, where each entry says who needs it.
//!
//! | part of the file | what it does |
//! |---|---|
//! | `allowed` | these and no others; any other kills the process, and its end is told as SIGSYS |
//! | `unknown` | of those, what a program asks for to see whether the kernel has it: it has not (ENOSYS) |
//! | `denied` | of those, what is refused by name (EPERM), and done without |
//!
//! The kernel asks all three and takes the strictest answer. Everything is compiled before the fork; the child only puts its own
//! process id in its place. Landlock says which files a call may name, the unit's filter stays beneath all of this.

use std::collections::HashMap;
use std::ffi::c_int;

use roost_common::shim::ShimError;
use seccompiler::{BpfProgram, TargetArch, compile_from_json};

#[cfg(target_arch = "x86_64")]
const FILTERS: (TargetArch, &str) = (TargetArch::x86_64, include_str!("../../filters/x86_64.json"));
#[cfg(target_arch = "aarch64")]
const FILTERS: (TargetArch, &str) = (TargetArch::aarch64, include_str!("../../filters/aarch64.json"));

/// Stands in the files for the id of the VMM's process, and is larger than any.
const OWN_ID: u32 = 0x7e1f_0000;

/// What becomes of a VMM that makes a call it may not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "foreign-profiles",
    derive(serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub(crate) enum Violation {
    /// It is killed; always in packaged builds.
    #[default]
    Killed,
    /// The call is refused with EPERM, so that a program of a test can say what it met.
    #[cfg(feature = "foreign-profiles")]
    Refused,
    /// Nothing: there is no filter, for a stand-in that is another program.
    #[cfg(feature = "foreign-profiles")]
    Unfiltered,
}

/// Filters in the order in which they are installed: after the last nothing more can be.
pub(crate) struct Filters {
    programs: Vec<BpfProgram>,
}

impl Filters {
    /// Compiles them.
    ///
    /// # Errors
    /// [`ShimError::BadProfile`]: a test compiles what is compiled in, for every architecture.
    pub(crate) fn new(violation: Violation) -> Result<Self, ShimError> {
        let (arch, text) = FILTERS;
        let programs = match violation {
            Violation::Killed => compile(arch, text),
            #[cfg(feature = "foreign-profiles")]
            Violation::Refused => compile(arch, &text.replacen("\"kill_process\"", "{\"errno\": 1}", 1)),
            #[cfg(feature = "foreign-profiles")]
            Violation::Unfiltered => Some(Vec::new()),
        };
        let programs = programs.ok_or(ShimError::BadProfile)?;
        Ok(Self { programs })
    }

    /// Puts a process's id where it belongs. Allocates nothing.
    pub(crate) fn set_own_id(&mut self, id: c_int) {
        let instructions = self.programs.iter_mut().flatten();
        for instruction in instructions.filter(|instruction| instruction.k == OWN_ID) {
            instruction.k = id.unsigned_abs();
        }
    }

    /// The programs, in their order.
    pub(crate) fn programs(&self) -> &[BpfProgram] {
        &self.programs
    }
}

fn compile(arch: TargetArch, text: &str) -> Option<Vec<BpfProgram>> {
    let mut parts: HashMap<_, _> = compile_from_json(text.as_bytes(), arch).ok()?;
    let programs = ["unknown", "denied", "allowed"].map(|part| parts.remove(part));
    let programs: Option<Vec<_>> = programs.into_iter().collect();
    programs.filter(|_| parts.is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;

    const ALL: [(TargetArch, &str); 2] = [
        (TargetArch::x86_64, include_str!("../../filters/x86_64.json")),
        (TargetArch::aarch64, include_str!("../../filters/aarch64.json")),
    ];

    fn rules(text: &str, part: &str) -> Vec<Value> {
        let parts: Value = serde_json::from_str(text).expect("JSON");
        parts[part]["filter"].as_array().expect("a list").clone()
    }

    fn names(text: &str, part: &str) -> BTreeSet<String> {
        let rules = rules(text, part);
        let name = |rule: &Value| rule["syscall"].as_str().expect("a name").to_owned();
        rules.iter().map(name).collect()
    }

    #[test]
    fn every_architectures_filters_compile_and_know_their_own_process_in_one_place() {
        for (arch, text) in ALL {
            let mut filters = Filters {
                programs: compile(arch, text).expect("filters"),
            };
            let places = |filters: &Filters, value| {
                let all = filters.programs.iter().flatten();
                all.filter(|instruction| instruction.k == value).count()
            };
            assert_eq!(places(&filters, OWN_ID), 1, "{arch:?}");
            filters.set_own_id(4_194_301);
            assert_eq!((places(&filters, OWN_ID), places(&filters, 4_194_301)), (0, 1));
        }
    }

    #[test]
    fn the_list_is_short_and_each_entry_says_who_needs_it() {
        for (arch, text) in ALL {
            let allowed = names(text, "allowed");
            assert!(allowed.len() <= 80, "{arch:?}: {}", allowed.len());
            for part in ["allowed", "unknown", "denied"] {
                for rule in rules(text, part) {
                    assert!(rule["comment"].as_str().is_some_and(|why| why.len() >= 3), "{rule}");
                }
            }
            // What is refused by an error must be allowed by the list: the strictest answer counts.
            for part in ["unknown", "denied"] {
                assert!(names(text, part).is_subset(&allowed), "{arch:?} {part}");
            }
        }
    }

    #[test]
    fn nothing_that_reaches_beyond_the_vmm_is_on_the_list() {
        let never = [
            "bind",
            "bpf",
            "chroot",
            "connect",
            "delete_module",
            "execveat",
            "finit_module",
            "fork",
            "init_module",
            "io_uring_enter",
            "io_uring_register",
            "kcmp",
            "keyctl",
            "kill",
            "link",
            "linkat",
            "listen",
            "mkdirat",
            "mknodat",
            "mount",
            "move_mount",
            "open_by_handle_at",
            "open_tree",
            "perf_event_open",
            "personality",
            "pidfd_getfd",
            "pidfd_open",
            "pidfd_send_signal",
            "pivot_root",
            "process_vm_readv",
            "process_vm_writev",
            "ptrace",
            "rename",
            "renameat",
            "renameat2",
            "sendmmsg",
            "sendmsg",
            "setgid",
            "setns",
            "setresuid",
            "setsid",
            "setuid",
            "symlinkat",
            "tkill",
            "unlink",
            "unlinkat",
            "unshare",
            "vfork",
        ];
        for (arch, text) in ALL {
            let allowed = names(text, "allowed");
            let found: Vec<_> = never.iter().filter(|name| allowed.contains(**name)).collect();
            assert!(found.is_empty(), "{arch:?}: {found:?}");
        }
    }

    #[test]
    fn what_can_do_several_things_is_bounded_by_its_arguments() {
        for (arch, text) in ALL {
            for rule in rules(text, "allowed") {
                let name = rule["syscall"].as_str().expect("a name");
                let bounded = [
                    "clone",
                    "ioctl",
                    "mmap",
                    "mprotect",
                    "prctl",
                    "prlimit64",
                    "seccomp",
                    "sendto",
                    "socket",
                    "socketpair",
                    "tgkill",
                    "umask",
                ];
                if bounded.contains(&name) {
                    let arguments = rule["args"].as_array().map_or(0, Vec::len);
                    assert!(arguments > 0, "{arch:?}: {rule}");
                }
            }
        }
    }
}

//! Every key of the configuration: what it means, what it may be, what it is by default, and when a change of it takes effect. The text of
//! `packaging/etc/agent.toml` is made of this.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;

use roost_common::shim::{MEMORY_RANGE, VCPUS_RANGE};
use roost_common::units::{MAX_DISK, Mebibytes, Vcpus};
use serde::Deserialize;
use toml::de::ValueDeserializer;

use super::Config;
use crate::trace;

/// Highest floor of a busy guest's network and disk, in bytes a second: above it, none would ever count as busy.
const MAX_BUSY_RATE: u64 = 1 << 30;
/// Most that may be kept free, in MiB: a TiB, above which a typo is likelier than a disk.
const MAX_RESERVE_MB: u32 = 1 << 20;
/// Most output of one call, in bytes: it is held in memory.
const MAX_OUTPUT: u64 = 1 << 30;

/// When a changed value takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applies {
    /// When the agent is told to read its configuration again.
    AtReload,
    /// When it is started anew.
    AtStart,
}

/// What a key is by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByDefault {
    /// This, as TOML.
    Is(&'static str),
    /// Not set; this would be a value, as TOML.
    Unset(&'static str),
}

impl ByDefault {
    /// Its value, or a possible one.
    fn text(self) -> &'static str {
        match self {
            Self::Is(text) | Self::Unset(text) => text,
        }
    }
}

/// A key.
#[derive(Debug)]
pub struct Key {
    /// Its name, one in a table with a dot, as in `control_plane.url`.
    pub name: &'static str,
    /// What it is when nobody sets it.
    pub default: ByDefault,
    /// What it may be, with its unit.
    pub range: &'static str,
    /// What it means. May have several lines.
    pub about: &'static str,
    /// When a change takes effect.
    pub applies: Applies,
    field: Field,
}

/// Why a value is not taken.
#[derive(Debug)]
pub enum Refused {
    /// It is of another type, or no such value at all.
    Unreadable(toml::de::Error),
    /// It is not in the key's range.
    OutOfRange,
}

/// A key's place in a [`Config`].
#[derive(Debug)]
struct Field {
    set: fn(&mut Config, ValueDeserializer<'_>) -> Result<(), Refused>,
    copy: fn(&Config, &mut Config),
    show: fn(&Config) -> String,
}

impl Key {
    /// Takes a value.
    ///
    /// # Errors
    /// [`Refused`]; the key may then be anything.
    pub fn set(&self, config: &mut Config, value: ValueDeserializer<'_>) -> Result<(), Refused> {
        (self.field.set)(config, value)
    }

    /// Takes the value of another configuration.
    pub fn copy(&self, from: &Config, to: &mut Config) {
        (self.field.copy)(from, to);
    }

    /// Whether two configurations have the same value.
    pub fn is_same(&self, one: &Config, other: &Config) -> bool {
        (self.field.show)(one) == (self.field.show)(other)
    }

    /// The variable of the environment that sets it, as in `ROOST_AGENT_CONTROL_PLANE_URL`.
    pub fn variable(&self) -> String {
        format!("ROOST_AGENT_{}", self.name.to_ascii_uppercase().replace('.', "_"))
    }

    /// Whether a value is a text: its quotes may be left out in the environment.
    pub fn is_text(&self) -> bool {
        self.default.text().starts_with('"')
    }
}

/// The key of a name.
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// Whether there is a table of this name.
pub fn is_table(name: &str) -> bool {
    let table = |key: &Key| key.name.split_once('.').map(|(table, _)| table);
    KEYS.iter().any(|key| table(key) == Some(name))
}

/// The default file: every key, commented out, with what it means.
pub fn default_file() -> String {
    let mut text = String::from(
        "# Configuration of roost-agent. Every key is here, commented out, with its default; where there is none, with an example.\n\
         # Files /etc/roost/agent.toml.d/*.toml are read after this one, in the order of their names, and after them the environment\n\
         # (ROOST_AGENT_LISTEN, ROOST_AGENT_CONTROL_PLANE_URL and so on; TOML, a text also without its quotes): of a key, the last\n\
         # value holds. What is wrong, and in which line: roost-agent --check-config. What holds: roost-agent --print-config.\n\
         # Keys that do not ask for a restart are taken up by systemctl reload roost-agent.service.\n",
    );
    for key in KEYS {
        text.push('\n');
        for line in key.about.lines() {
            writeln!(text, "# {line}").expect("a String takes everything");
        }
        let default = match key.default {
            ByDefault::Is(_) => "",
            ByDefault::Unset(_) => " Not set by default.",
        };
        let applies = match key.applies {
            Applies::AtReload => "",
            Applies::AtStart => " Needs a restart.",
        };
        writeln!(text, "# Range: {}.{default}{applies}", key.range).expect("a String takes everything");
        writeln!(text, "#{} = {}", key.name, key.default.text()).expect("a String takes everything");
    }
    text
}

fn read<'de, T: Deserialize<'de>>(value: ValueDeserializer<'de>) -> Result<T, Refused> {
    T::deserialize(value).map_err(Refused::Unreadable)
}

fn check<T: ?Sized>(value: &T, fits: impl FnOnce(&T) -> bool) -> Result<(), Refused> {
    if fits(value) { Ok(()) } else { Err(Refused::OutOfRange) }
}

fn is_disk(megabytes: u32) -> bool {
    megabytes > 0 && Mebibytes(megabytes).sectors() <= MAX_DISK
}

/// A field of [`Config`], and which values of its type it takes; without a word about that, all.
macro_rules! field {
    ($($field:ident).+) => {
        field!($($field).+, |_| true)
    };
    ($($field:ident).+, $fits:expr) => {
        Field {
            set: |config, value| {
                config.$($field).+ = read(value)?;
                check(&config.$($field).+, $fits)
            },
            copy: |from, to| to.$($field).+.clone_from(&from.$($field).+),
            show: |config| format!("{:?}", config.$($field).+),
        }
    };
}

const ABSOLUTE: &str = "an absolute path";

fn is_absolute(path: &Path) -> bool {
    path.is_absolute()
}

/// All keys, those of tables last.
pub const KEYS: &[Key] = &[
    Key {
        name: "listen",
        default: ByDefault::Is("\"0.0.0.0:50051\""),
        range: "an IP address and a port",
        about: "Where the HTTPS API is served.",
        applies: Applies::AtStart,
        field: field!(listen),
    },
    Key {
        name: "status_listen",
        default: ByDefault::Is("\"127.0.0.1:50052\""),
        range: "a loopback address and a port: whoever can reach it is not asked who they are",
        about: "Where Prometheus metrics and health are served, as plain HTTP, for anybody on this machine.",
        applies: Applies::AtStart,
        field: field!(status_listen, |address| match address.ip() {
            IpAddr::V4(address) => address.is_loopback(),
            IpAddr::V6(address) => address.is_loopback(),
        }),
    },
    Key {
        name: "status_page",
        default: ByDefault::Is("false"),
        range: "true or false",
        about: "Whether a page for browsers is there as well. It shows every user of this machine the ids, states and use of sandboxes.",
        applies: Applies::AtReload,
        field: field!(status_page),
    },
    Key {
        name: "dir",
        default: ByDefault::Is("\"/var/lib/roost\""),
        range: ABSOLUTE,
        about: "Kernels, images, sandboxes. ROOST_DIR in the environment says it too.",
        applies: Applies::AtStart,
        field: field!(dir, |path| is_absolute(path)),
    },
    Key {
        name: "vm_run_dir",
        default: ByDefault::Is("\"/run/roost/vm\""),
        range: ABSOLUTE,
        about: "Run directories of VMs, one below it for each.",
        applies: Applies::AtStart,
        field: field!(vm_run_dir, |path| is_absolute(path)),
    },
    Key {
        name: "pki_dir",
        default: ByDefault::Is("\"/etc/roost/pki\""),
        range: ABSOLUTE,
        about: "Certificates and keys: ca.pem, server.pem, server-key.pem. A reload reads the files anew.",
        applies: Applies::AtStart,
        field: field!(pki_dir, |path| is_absolute(path)),
    },
    Key {
        name: "client_names",
        default: ByDefault::Is("[\"wrenn-cp\", \"roost-cli\"]"),
        range: "at least one name, else nobody may call",
        about: "Common names or DNS names of client certificates that may call the API.",
        applies: Applies::AtReload,
        field: field!(client_names, |names| !names.is_empty()
            && names.iter().all(|name| !name.is_empty())),
    },
    Key {
        name: "viewer_names",
        default: ByDefault::Is("[]"),
        range: "names",
        about: "Common names or DNS names of client certificates that may only look: lists of sandboxes, their metrics, why one\n\
                ended, health.",
        applies: Applies::AtReload,
        field: field!(viewer_names, |names| names.iter().all(|name| !name.is_empty())),
    },
    Key {
        name: "max_calls_per_sec",
        default: ByDefault::Unset("50"),
        range: "1 to 4294967295 calls a second",
        about: "API calls that each client certificate may make; not set: as many as it likes. Two seconds' worth may come at once.\n\
                What goes through the proxy is not counted.",
        applies: Applies::AtReload,
        field: field!(max_calls_per_sec),
    },
    Key {
        name: "log_format",
        default: ByDefault::Is("\"text\""),
        range: "\"text\" or \"json\"",
        about: "How log lines look.",
        applies: Applies::AtStart,
        field: field!(log_format),
    },
    Key {
        name: "log_filter",
        default: ByDefault::Is("\"info\""),
        range: "a level (error, warn, info, debug, trace, off), or several with parts of the agent, as in \"info,roost_agent::egress=debug\"",
        about: "Which log lines there are. RUST_LOG in the environment goes first.",
        applies: Applies::AtReload,
        field: field!(log_filter, |filter| trace::is_filter(filter)),
    },
    Key {
        name: "privd_socket",
        default: ByDefault::Is("\"/run/roost/privd.sock\""),
        range: ABSOLUTE,
        about: "privd's socket.",
        applies: Applies::AtStart,
        field: field!(privd_socket, |path| is_absolute(path)),
    },
    Key {
        name: "shim",
        default: ByDefault::Is("\"systemd\""),
        range: "\"systemd\" or \"child\"",
        about: "How shims are started: by systemd, each with a uid and a cgroup of its own; or by the agent, as its children and with\n\
                its uid, for development on hosts without systemd, and weaker for it.",
        applies: Applies::AtStart,
        field: field!(shim),
    },
    Key {
        name: "shim_socket",
        default: ByDefault::Is("\"/run/roost/vmmshim.sock\""),
        range: ABSOLUTE,
        about: "The socket on which systemd starts a shim for each connection; with shim = \"systemd\".",
        applies: Applies::AtStart,
        field: field!(shim_socket, |path| is_absolute(path)),
    },
    Key {
        name: "shim_program",
        default: ByDefault::Is("\"/usr/bin/roost-vmmshim\""),
        range: ABSOLUTE,
        about: "The shim's program; with shim = \"child\".",
        applies: Applies::AtStart,
        field: field!(shim_program, |path| is_absolute(path)),
    },
    Key {
        name: "shim_args",
        default: ByDefault::Is("[]"),
        range: "texts",
        about: "Further arguments for the shim's program; with shim = \"child\".",
        applies: Applies::AtStart,
        field: field!(shim_args),
    },
    Key {
        name: "dns",
        default: ByDefault::Unset("[\"192.0.2.53\"]"),
        range: "at most 8 IPv4 addresses",
        about: "Resolvers for guests; not set: those of the host's /etc/resolv.conf that are not loopback. A reload is for VMs that are\n\
                started from then on, and for policies that are changed.",
        applies: Applies::AtReload,
        field: field!(dns, |dns| dns
            .as_ref()
            .is_none_or(|dns| dns.len() <= roost_common::privd::MAX_RESOLVERS)),
    },
    Key {
        name: "max_sandboxes",
        default: ByDefault::Is("4096"),
        range: "1 to 4096 sandboxes",
        about: "Most sandboxes at a time, paused ones too.",
        applies: Applies::AtReload,
        // systemd's dynamic uids end near 4,300.
        field: field!(max_sandboxes, |max| (1..=4096).contains(max)),
    },
    Key {
        name: "ready_sandboxes",
        default: ByDefault::Is("2"),
        range: "0 to 64 sandboxes",
        about: "How many sandboxes to come have their shim and their network made ahead, so that a create does not wait for these. Each is a\n\
                process of some 1.3 MiB, and a network namespace.",
        applies: Applies::AtReload,
        field: field!(ready_sandboxes, |ready| *ready <= 64),
    },
    Key {
        name: "default_disk_mb",
        default: ByDefault::Unset("4096"),
        range: "1 to 2097152 MiB",
        about: "Disk of a sandbox that asks for none; not set: the image's size.",
        applies: Applies::AtReload,
        field: field!(default_disk_mb, |disk| disk.is_none_or(is_disk)),
    },
    Key {
        name: "max_disk_mb",
        default: ByDefault::Is("1048576"),
        range: "1 to 2097152 MiB",
        about: "Largest disk that a caller may ask for.",
        applies: Applies::AtReload,
        field: field!(max_disk_mb, |disk| is_disk(*disk)),
    },
    Key {
        name: "disk_reserve_mb",
        default: ByDefault::Is("256"),
        range: "0 to 1048576 MiB",
        about: "What stays free on the data directory's file system besides what is kept for the memory of running sandboxes: below both\n\
                together creates and resumes are refused, below half of it guests that write are held.",
        applies: Applies::AtReload,
        field: field!(disk_reserve_mb, |reserve| *reserve <= MAX_RESERVE_MB),
    },
    Key {
        name: "max_memory_mb",
        default: ByDefault::Is("1048576"),
        range: "64 to 1048576 MiB",
        about: "Largest memory that a caller may ask for.",
        applies: Applies::AtReload,
        field: field!(max_memory_mb, |memory| MEMORY_RANGE.contains(&Mebibytes(*memory))),
    },
    Key {
        name: "max_vcpus",
        default: ByDefault::Is("32"),
        range: "1 to 64 vCPUs",
        about: "Most vCPUs that a caller may ask for.",
        applies: Applies::AtReload,
        field: field!(max_vcpus, |vcpus| VCPUS_RANGE.contains(&Vcpus(*vcpus))),
    },
    Key {
        name: "max_exec_output",
        default: ByDefault::Is("16777216"),
        range: "1 to 1073741824 bytes",
        about: "Most output that one Exec call may return, both streams together; more ends the command with an error.",
        applies: Applies::AtReload,
        field: field!(max_exec_output, |bytes| (1..=MAX_OUTPUT).contains(bytes)),
    },
    Key {
        name: "boot_timeout_sec",
        default: ByDefault::Is("120"),
        range: "10 to 3600 seconds",
        about: "How long a guest may take to come up when it boots; one of more than 15 GiB has 8 s for each of them. More is for hosts\n\
                that emulate.",
        applies: Applies::AtReload,
        field: field!(boot_timeout_sec, |seconds| (10..=3600).contains(seconds)),
    },
    Key {
        name: "restore_memory",
        default: ByDefault::Is("\"copy\""),
        range: "\"copy\" or \"on_demand\"",
        about: "How memory comes back to a resumed guest: before it runs, or while it does, where the host has /dev/userfaultfd. On\n\
                demand it is there sooner, but every page is loaded in the end, unused ones too, and it cannot be paused before that.",
        applies: Applies::AtReload,
        field: field!(restore_memory),
    },
    Key {
        name: "busy_cpu_percent",
        default: ByDefault::Is("5"),
        range: "1 to 100 percent of one vCPU",
        about: "Above which a guest counts as used although nobody calls. An idle guest's timers, and the agent that asks it for\n\
                metrics, stay below.",
        applies: Applies::AtReload,
        field: field!(busy_cpu_percent, |percent| (1..=100).contains(percent)),
    },
    Key {
        name: "busy_network_bytes",
        default: ByDefault::Is("16384"),
        range: "1 to 1073741824 bytes a second",
        about: "To and from its network, above which a guest counts as used. An idle guest's metrics, ARP and DNS stay below.",
        applies: Applies::AtReload,
        field: field!(busy_network_bytes, |rate| (1..=MAX_BUSY_RATE).contains(rate)),
    },
    Key {
        name: "busy_disk_bytes",
        default: ByDefault::Is("65536"),
        range: "1 to 1073741824 bytes a second",
        about: "To and from its disk, above which a guest counts as used. An idle guest's journal and logs may be above, but not for\n\
                three seconds in five.",
        applies: Applies::AtReload,
        field: field!(busy_disk_bytes, |rate| (1..=MAX_BUSY_RATE).contains(rate)),
    },
    Key {
        name: "control_plane.url",
        default: ByDefault::Unset("\"https://control.example\""),
        range: "an https:// URL, or http:// on the same host or a network that nobody else is on",
        about: "Where the control plane is; not set: where this host was registered.",
        applies: Applies::AtStart,
        field: field!(control_plane.url),
    },
    Key {
        name: "control_plane.address",
        default: ByDefault::Unset("\"192.0.2.1:50051\""),
        range: "an address or a name, and a port",
        about: "Under which the control plane calls this host, for the registration.",
        applies: Applies::AtStart,
        field: field!(control_plane.address),
    },
    Key {
        name: "control_plane.ca_file",
        default: ByDefault::Unset("\"/etc/roost/control-plane-ca.pem\""),
        range: ABSOLUTE,
        about: "CAs of its HTTPS, in PEM; not set: those that the system trusts.",
        applies: Applies::AtStart,
        field: field!(control_plane.ca_file, |path| path.as_deref().is_none_or(is_absolute)),
    },
    Key {
        name: "rate_limits.disk_mb_per_sec",
        default: ByDefault::Unset("200"),
        range: "1 to 4294967295 MiB a second",
        about: "How fast the disk of each sandbox may be, reads and writes together; not set: no limit. For VMs that are started from\n\
                then on, by a create or a resume, as those below.",
        applies: Applies::AtReload,
        field: field!(rate_limits.disk_mb_per_sec),
    },
    Key {
        name: "rate_limits.disk_operations_per_sec",
        default: ByDefault::Unset("5000"),
        range: "1 to 4294967295 requests a second",
        about: "How many requests the disk of each sandbox may take; not set: no limit.",
        applies: Applies::AtReload,
        field: field!(rate_limits.disk_operations_per_sec),
    },
    Key {
        name: "rate_limits.network_mb_per_sec",
        default: ByDefault::Unset("100"),
        range: "1 to 4294967295 MiB a second",
        about: "How fast the network of each sandbox may be, each way; not set: no limit.",
        applies: Applies::AtReload,
        field: field!(rate_limits.network_mb_per_sec),
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::sources;

    const PACKAGED: &str = include_str!("../../../packaging/etc/agent.toml");

    /// The lines of the packaged file that are keys, with what they are set to.
    fn uncommented(wanted: impl Fn(&Key) -> bool) -> String {
        let is_key = |line: &&str| {
            line.split_once(" = ")
                .is_some_and(|(name, _)| find(name).is_some_and(&wanted))
        };
        let lines = PACKAGED.lines().filter_map(|line| line.strip_prefix('#'));
        lines.filter(is_key).map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn the_packaged_file_is_what_is_documented_here() {
        assert_eq!(
            PACKAGED,
            default_file(),
            "make it anew: cargo run --bin roost-agent -- --default-config > packaging/etc/agent.toml"
        );
    }

    #[test]
    fn the_packaged_file_changes_nothing_and_its_defaults_are_the_defaults() {
        let all = sources::of_text(&uncommented(|_| true)).expect("every key, with what the file says");
        assert_eq!(uncommented(|_| true).lines().count(), KEYS.len());
        for key in KEYS {
            let is_default = key.is_same(&all.config, &Config::default());
            assert_eq!(is_default, matches!(key.default, ByDefault::Is(_)), "{}", key.name);
        }
        let packaged = sources::of_text(PACKAGED).expect("comments");
        let defaults = sources::of_text(&uncommented(|key| matches!(key.default, ByDefault::Is(_)))).expect("defaults");
        for config in [packaged.config, defaults.config] {
            assert_eq!(format!("{config:?}"), format!("{:?}", Config::default()));
        }
    }

    #[test]
    fn every_key_has_a_name_and_a_variable_of_its_own_and_is_short_enough_to_read() {
        let variables: std::collections::BTreeSet<_> = KEYS.iter().map(Key::variable).collect();
        assert_eq!(variables.len(), KEYS.len());
        assert!(default_file().lines().all(|line| line.len() <= 180));
        let tables_last = KEYS.iter().map(|key| key.name.contains('.')).collect::<Vec<_>>();
        assert!(tables_last.is_sorted());
    }
}

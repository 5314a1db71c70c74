//! The agent's configuration: `/etc/roost/agent.toml`. Every key has a default; an unknown key or a bad value is an error that
//! names file and line, and nothing is started.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use roost_common::shim::{self, MEMORY_RANGE, VCPUS_RANGE};
use roost_common::units::{MAX_DISK, Mebibytes, Vcpus};
use serde::{Deserialize, Deserializer, de};

use crate::control::url::Url;
use crate::guest::GuestNet;
use crate::trace::LogFormat;

/// Where the configuration is looked for when nothing else is said.
pub const DEFAULT_FILE: &str = "/etc/roost/agent.toml";
/// Highest floor of a busy guest's network and disk, in bytes a second: above it, none would ever count as busy.
const MAX_BUSY_RATE: u64 = 1 << 30;
/// Most that may be kept free, in MiB: a TiB, above which a typo is likelier than a disk.
const MAX_RESERVE_MB: u32 = 1 << 20;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{} is not a configuration of this agent", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Names line, column and key.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that is out of range.
    #[error("{key} = {value} is out of range: {range}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// What it may be.
        range: &'static str,
    },
}

/// The configuration, with every default filled in.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port of the HTTPS API.
    pub listen: SocketAddr,
    /// Loopback address and port of Prometheus metrics and health, as plain HTTP for anybody on this machine.
    pub status_listen: SocketAddr,
    /// Kernels, images, sandboxes; `ROOST_DIR` in the environment overrides it.
    pub dir: PathBuf,
    /// Run directories of VMs, one below it for each.
    pub vm_run_dir: PathBuf,
    /// Certificates and keys: `ca.pem`, `server.pem`, `server-key.pem`.
    pub pki_dir: PathBuf,
    /// Common names or DNS names of client certificates that may call the API.
    pub client_names: Vec<String>,
    /// Common names or DNS names of client certificates that may only look: lists of sandboxes, their metrics, why one ended, health.
    pub viewer_names: Vec<String>,
    /// API calls that each client certificate may make in a second, at least 1; unset: as many as it likes. Two seconds' worth may come at
    /// once. What goes through the proxy is not counted.
    pub max_calls_per_sec: Option<NonZeroU32>,
    /// How log lines look: `text` or `json`. Which ones there are is `RUST_LOG`'s to say, in the environment.
    pub log_format: LogFormat,
    /// The control plane of this host, if it has one.
    pub control_plane: ControlPlane,
    /// privd's socket.
    pub privd_socket: PathBuf,
    /// How shims are started.
    pub shim: Shim,
    /// The socket on which systemd starts a shim for each connection; with `shim = "systemd"`.
    pub shim_socket: PathBuf,
    /// The shim's program; with `shim = "child"`.
    pub shim_program: PathBuf,
    /// Further arguments for the shim's program; with `shim = "child"`.
    pub shim_args: Vec<String>,
    /// Resolvers for guests; unset: those of the host's `/etc/resolv.conf` that are not loopback.
    pub dns: Option<Vec<Ipv4Addr>>,
    /// Most sandboxes at a time, 1 to 4096 (systemd's dynamic uids end near 4,300).
    pub max_sandboxes: u32,
    /// Disk of a sandbox that asks for none, in MiB; unset: the image's size.
    pub default_disk_mb: Option<u32>,
    /// Largest disk that a caller may ask for, in MiB.
    pub max_disk_mb: u32,
    /// MiB of the data directory's filesystem that stay free besides what is kept for the memory of running sandboxes, at most 1048576:
    /// below both together creates and resumes are refused, below half of it guests that write are held.
    pub disk_reserve_mb: u32,
    /// Largest memory that a caller may ask for, in MiB.
    pub max_memory_mb: u32,
    /// Most vCPUs that a caller may ask for.
    pub max_vcpus: u8,
    /// Most bytes of output that one Exec call may return, both streams together; more ends the command with an error.
    pub max_exec_output: u64,
    /// Seconds that a guest may take to come up when it boots, 10 to 3600; one of more than 15 GiB has 8 s for each of them. More is for
    /// hosts that emulate.
    pub boot_timeout_sec: u32,
    /// How memory comes back to a resumed guest.
    pub restore_memory: RestoreMemory,
    /// How fast a sandbox's disk and network may be.
    pub rate_limits: RateLimits,
    /// Percent of one vCPU above which a guest counts as used although nobody calls, 1 to 100. An idle guest's timers, and the
    /// agent that asks it for metrics, stay below.
    pub busy_cpu_percent: u32,
    /// Bytes a second to and from its network above which a guest counts as used. An idle guest's metrics, ARP and DNS stay below.
    pub busy_network_bytes: u64,
    /// Bytes a second to and from its disk above which a guest counts as used. An idle guest's journal and logs may be above, but
    /// not for three seconds in five.
    pub busy_disk_bytes: u64,
    /// Where guests are reached. Not a key of the file: privd makes the network plan, and there is no other. A test that has no guests of
    /// privd's has its own.
    #[serde(skip)]
    pub guests: GuestNet,
}

/// How fast the devices of each sandbox may be: table `[rate_limits]`. What is left out has no limit. For VMs that are started from then on,
/// by a create or a resume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimits {
    /// MiB a second that are read from its disk and written to it, together; at least 1.
    pub disk_mb_per_sec: Option<NonZeroU32>,
    /// Requests to its disk a second; at least 1.
    pub disk_operations_per_sec: Option<NonZeroU32>,
    /// MiB a second of its network, each way; at least 1.
    pub network_mb_per_sec: Option<NonZeroU32>,
}

impl From<RateLimits> for shim::RateLimits {
    fn from(limits: RateLimits) -> Self {
        let bytes = |limit: Option<NonZeroU32>| NonZeroU64::new(u64::from(limit?.get()) << 20);
        Self {
            disk_bytes: bytes(limits.disk_mb_per_sec),
            disk_operations: limits.disk_operations_per_sec.map(NonZeroU64::from),
            network_bytes: bytes(limits.network_mb_per_sec),
        }
    }
}

/// The control plane of a host: table `[control_plane]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ControlPlane {
    /// Where it is: `https://…`, or `http://…` on the same host or a network that nobody else is on. Unset: where this host was registered.
    pub url: Option<Url>,
    /// Address and port under which it calls this host, for the registration.
    pub address: Option<Address>,
    /// CAs of its HTTPS, in PEM; unset: those that the system trusts.
    pub ca_file: Option<PathBuf>,
}

/// Address and port under which a host is called, as in `192.0.2.1:50051`; or a name and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(String);

/// Why a text is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address and port under which a host can be called, as in 192.0.2.1:50051")]
pub struct AddressError(String);

impl Address {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let is_usable = match text.parse::<SocketAddr>() {
            Ok(address) => !address.ip().is_unspecified() && address.port() > 0,
            Err(_) => text.rsplit_once(':').is_some_and(|(name, port)| {
                let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
                !name.is_empty() && name.bytes().all(is_name) && port.parse::<u16>().is_ok_and(|port| port > 0)
            }),
        };
        if is_usable {
            Ok(Self(text.to_owned()))
        } else {
            Err(AddressError(text.to_owned()))
        }
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// How shims are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shim {
    /// By systemd, each with a uid and a cgroup of its own.
    Systemd,
    /// By the agent, as its children and with its uid: for hosts without systemd, and weaker for it.
    Child,
}

/// How memory comes back to a resumed guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoreMemory {
    /// Before it runs. What was never used stays unused, so the next pause writes no more than this one read.
    Copy,
    /// While it runs, where the host has `/dev/userfaultfd`: it is there sooner, but every page is loaded in the end, unused ones too,
    /// and it cannot be paused before that.
    OnDemand,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([0, 0, 0, 0], 50051)),
            status_listen: SocketAddr::from(([127, 0, 0, 1], 50052)),
            dir: "/var/lib/roost".into(),
            vm_run_dir: "/run/roost/vm".into(),
            pki_dir: "/etc/roost/pki".into(),
            client_names: vec!["wrenn-cp".into(), crate::pki::CLIENT_NAME.into()],
            viewer_names: Vec::new(),
            max_calls_per_sec: None,
            log_format: LogFormat::default(),
            control_plane: ControlPlane::default(),
            privd_socket: roost_common::privd::SOCKET.into(),
            shim: Shim::Systemd,
            shim_socket: roost_common::shim::SOCKET.into(),
            shim_program: "/usr/bin/roost-vmmshim".into(),
            shim_args: Vec::new(),
            dns: None,
            max_sandboxes: 4096,
            default_disk_mb: None,
            max_disk_mb: 1 << 20,
            disk_reserve_mb: 256,
            max_memory_mb: 1 << 20,
            max_vcpus: 32,
            max_exec_output: 16 << 20,
            boot_timeout_sec: 120,
            restore_memory: RestoreMemory::Copy,
            rate_limits: RateLimits::default(),
            busy_cpu_percent: 5,
            busy_network_bytes: 16 << 10,
            busy_disk_bytes: 64 << 10,
            guests: GuestNet::default(),
        }
    }
}

impl Config {
    /// Reads `file`, or [`DEFAULT_FILE`], which may be missing: then all is default.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(source) => {
                return Err(ConfigError::Read {
                    path: path.into(),
                    source,
                });
            }
        };
        let mut config = Self::parse(&text, path)?;
        if let Some(dir) = std::env::var_os("ROOST_DIR") {
            config.dir = dir.into();
        }
        Ok(config)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.into(),
            source: Box::new(source),
        })?;
        let out_of_range = |key, value: String, range| Err(ConfigError::OutOfRange { key, value, range });
        if !(1..=4096).contains(&config.max_sandboxes) {
            return out_of_range("max_sandboxes", config.max_sandboxes.to_string(), "1 to 4096");
        }
        if !VCPUS_RANGE.contains(&Vcpus(config.max_vcpus)) {
            return out_of_range("max_vcpus", config.max_vcpus.to_string(), "1 to 64");
        }
        if !MEMORY_RANGE.contains(&Mebibytes(config.max_memory_mb)) {
            return out_of_range("max_memory_mb", config.max_memory_mb.to_string(), "64 to 1048576");
        }
        for (key, disk) in [
            ("max_disk_mb", Some(config.max_disk_mb)),
            ("default_disk_mb", config.default_disk_mb),
        ] {
            if disk.is_some_and(|disk| disk == 0 || Mebibytes(disk).sectors() > MAX_DISK) {
                return out_of_range(key, disk.unwrap_or_default().to_string(), "1 to 2097152");
            }
        }
        if config.disk_reserve_mb > MAX_RESERVE_MB {
            return out_of_range("disk_reserve_mb", config.disk_reserve_mb.to_string(), "0 to 1048576");
        }
        if !(10..=3600).contains(&config.boot_timeout_sec) {
            return out_of_range("boot_timeout_sec", config.boot_timeout_sec.to_string(), "10 to 3600");
        }
        if !(1..=100).contains(&config.busy_cpu_percent) {
            return out_of_range("busy_cpu_percent", config.busy_cpu_percent.to_string(), "1 to 100");
        }
        for (key, rate) in [
            ("busy_network_bytes", config.busy_network_bytes),
            ("busy_disk_bytes", config.busy_disk_bytes),
        ] {
            if !(1..=MAX_BUSY_RATE).contains(&rate) {
                return out_of_range(key, rate.to_string(), "1 to 1073741824");
            }
        }
        if config
            .dns
            .as_ref()
            .is_some_and(|dns| dns.len() > roost_common::privd::MAX_RESOLVERS)
        {
            return out_of_range("dns", format!("{:?}", config.dns), "at most 8 addresses");
        }
        if !config.status_listen.ip().is_loopback() {
            return out_of_range(
                "status_listen",
                config.status_listen.to_string(),
                "a loopback address: whoever can reach it is not asked who they are",
            );
        }
        if config.client_names.is_empty() {
            return out_of_range("client_names", "[]".into(), "at least one name, else nobody may call");
        }
        Ok(config)
    }

    /// Resolvers for guests: the configured ones, else those that the host itself uses.
    pub fn resolvers(&self) -> Vec<Ipv4Addr> {
        match &self.dns {
            Some(dns) => dns.clone(),
            None => host_resolvers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()),
        }
    }
}

/// The resolvers of a `resolv.conf` that a guest can reach: IPv4 and not loopback.
fn host_resolvers(resolv_conf: &str) -> Vec<Ipv4Addr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse::<Ipv4Addr>().ok())
        .filter(|address| !address.is_loopback() && !address.is_unspecified())
        .take(roost_common::privd::MAX_RESOLVERS)
        .collect()
}

#[cfg(test)]
mod tests {
    use roost_common::ids::Slot;
    use roost_common::net::SlotAddresses;

    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("agent.toml"))
    }

    #[test]
    fn an_empty_file_is_all_defaults() {
        let config = parse("").expect("parsed");
        assert_eq!(config.listen.port(), 50051);
        assert_eq!(config.shim, Shim::Systemd);
        let slot = Slot::MAX;
        let planned = (SlotAddresses::of(slot).host, roost_common::guest::PORT);
        assert_eq!(config.guests.address_of(slot), SocketAddr::from(planned));
    }

    #[test]
    fn rate_limits_are_bytes_and_requests_a_second_and_none_by_default() {
        assert_eq!(
            shim::RateLimits::from(Config::default().rate_limits),
            shim::RateLimits::default()
        );
        let text =
            "[rate_limits]\ndisk_mb_per_sec = 5\ndisk_operations_per_sec = 300\nnetwork_mb_per_sec = 4294967295\n";
        let config = Config::parse(text, Path::new("agent.toml")).expect("a configuration");
        let limits = shim::RateLimits::from(config.rate_limits);
        assert_eq!(limits.disk_bytes, NonZeroU64::new(5 << 20));
        assert_eq!(limits.disk_operations, NonZeroU64::new(300));
        assert_eq!(limits.network_bytes, NonZeroU64::new(4_294_967_295 << 20));
    }

    #[test]
    fn unknown_keys_and_bad_values_are_errors_that_name_them() {
        for (text, named) in [
            ("listne = \"0.0.0.0:1\"", "listne"),
            ("listen = \"nowhere\"", "listen"),
            ("status_listen = \"0.0.0.0:50052\"", "status_listen"),
            ("max_sandboxes = 0", "max_sandboxes"),
            ("max_sandboxes = 5000", "max_sandboxes"),
            ("shim = \"docker\"", "shim"),
            ("client_names = []", "client_names"),
            ("[rate_limits]\ndisk_mb_per_sec = 0", "disk_mb_per_sec"),
            ("[rate_limits]\nnetwork_mb = 1", "network_mb"),
            ("max_vcpus = 65", "max_vcpus"),
            ("max_memory_mb = 63", "max_memory_mb"),
            ("max_disk_mb = 2097153", "max_disk_mb"),
            ("default_disk_mb = 0", "default_disk_mb"),
            ("disk_reserve_mb = 1048577", "disk_reserve_mb"),
            ("boot_timeout_sec = 9", "boot_timeout_sec"),
            ("boot_timeout_sec = 3601", "boot_timeout_sec"),
            ("restore_memory = \"lazy\"", "restore_memory"),
            ("busy_cpu_percent = 0", "busy_cpu_percent"),
            ("busy_cpu_percent = 101", "busy_cpu_percent"),
            ("busy_network_bytes = 0", "busy_network_bytes"),
            ("busy_network_bytes = 1073741825", "busy_network_bytes"),
            ("busy_disk_bytes = 0", "busy_disk_bytes"),
            ("busy_disk_bytes = 1073741825", "busy_disk_bytes"),
            ("[control_plane]\nulr = \"https://x\"", "ulr"),
            ("[control_plane]\nurl = \"x\"", "url"),
            ("[control_plane]\nurl = \"ftp://x\"", "url"),
            ("[control_plane]\naddress = \"192.0.2.1\"", "address"),
            ("[control_plane]\naddress = \"0.0.0.0:50051\"", "address"),
            ("[control_plane]\naddress = \"192.0.2.1:0\"", "address"),
            ("[control_plane]\naddress = \"a b:1\"", "address"),
            ("[control_plane]\nca_file = 1", "ca_file"),
        ] {
            let error = anyhow::Error::new(parse(text).expect_err(text));
            assert!(format!("{error:#}").contains(named), "{text}: {error:#}");
        }
    }

    #[test]
    fn a_control_plane_has_an_url_and_an_address_of_ours() {
        let text = "[control_plane]\nurl = \"https://control.example/\"\naddress = \"[2001:db8::1]:50051\"\nca_file = \"/x\"\n";
        let ControlPlane { url, address, ca_file } = parse(text).expect("parsed").control_plane;
        assert_eq!(url.expect("set").to_string(), "https://control.example");
        assert_eq!(address.expect("set").as_str(), "[2001:db8::1]:50051");
        assert_eq!(ca_file, Some("/x".into()));
        let named = parse("[control_plane]\naddress = \"host-1.example:50051\"").expect("parsed");
        assert!(named.control_plane.address.is_some());
        assert_eq!(parse("").expect("parsed").control_plane, ControlPlane::default());
    }

    #[test]
    fn loopback_resolvers_are_of_no_use_to_a_guest() {
        let text = "# x\nnameserver 127.0.0.53\nnameserver 9.9.9.9\n nameserver ::1\nsearch a\nnameserver 1.1.1.1\n";
        assert_eq!(
            host_resolvers(text),
            [Ipv4Addr::new(9, 9, 9, 9), Ipv4Addr::new(1, 1, 1, 1)]
        );
    }
}

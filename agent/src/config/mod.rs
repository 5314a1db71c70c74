//! The agent's configuration: `/etc/roost/agent.toml`, what is beside it in `agent.toml.d`, and the environment. Every key has a default; an
//! unknown key or a bad value is an error that names file, line and key, and nothing is started.
//!
//! What is where: the values are here, what each key means and may be is in [`keys`], where they come from in [`sources`].

pub mod keys;
pub mod sources;

use std::net::{Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::str::FromStr;

use roost_common::shim;
use serde::{Deserialize, Deserializer, de};

use crate::control::url::Url;
use crate::guest::GuestNet;
use crate::trace::LogFormat;

pub use sources::{DEFAULT_FILE, Loaded, Problems, Sources};

/// The configuration, with every default filled in. What a value may be is in [`keys::KEYS`].
#[derive(Debug, Clone)]
pub struct Config {
    /// Address and port of the HTTPS API.
    pub listen: SocketAddr,
    /// Loopback address and port of Prometheus metrics and health, as plain HTTP for anybody on this machine.
    pub status_listen: SocketAddr,
    /// Whether the status page is there as well, which names sandboxes.
    pub status_page: bool,
    /// Kernels, images, sandboxes; `ROOST_DIR` in the environment overrides it.
    pub dir: PathBuf,
    /// Run directories of VMs, one below it for each.
    pub vm_run_dir: PathBuf,
    /// Certificates and keys: `ca.pem`, `server.pem`, `server-key.pem`.
    pub pki_dir: PathBuf,
    /// Common names or DNS names of client certificates that may call the API.
    pub client_names: Vec<String>,
    /// Common names or DNS names of client certificates that may only look: lists of sandboxes and templates, metrics, why one ended, health.
    pub viewer_names: Vec<String>,
    /// API calls that each client certificate may make in a second, at least 1; unset: as many as it likes. Two seconds' worth may come at
    /// once. What goes through the proxy is not counted.
    pub max_calls_per_sec: Option<NonZeroU32>,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which ones there are, where `RUST_LOG` does not say so: directives of tracing's `EnvFilter`.
    pub log_filter: String,
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
    /// How many shims and networks are kept ready for sandboxes to come, 0 to 64.
    pub ready_sandboxes: u32,
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
    pub guests: GuestNet,
}

/// How fast the devices of each sandbox may be: table `[rate_limits]`. What is left out has no limit. For VMs that are started from then on,
/// by a create or a resume.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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
            status_page: false,
            dir: "/var/lib/roost".into(),
            vm_run_dir: "/run/roost/vm".into(),
            pki_dir: "/etc/roost/pki".into(),
            client_names: vec!["wrenn-cp".into(), crate::pki::CLIENT_NAME.into()],
            viewer_names: Vec::new(),
            max_calls_per_sec: None,
            log_format: LogFormat::default(),
            log_filter: "info".into(),
            control_plane: ControlPlane::default(),
            privd_socket: roost_common::privd::SOCKET.into(),
            shim: Shim::Systemd,
            shim_socket: roost_common::shim::SOCKET.into(),
            shim_program: "/usr/bin/roost-vmmshim".into(),
            shim_args: Vec::new(),
            dns: None,
            max_sandboxes: 4096,
            ready_sandboxes: 2,
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

    fn parse(text: &str) -> Result<Config, Problems> {
        sources::of_text(text).map(|loaded| loaded.config)
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
        let config = parse(text).expect("a configuration");
        let limits = shim::RateLimits::from(config.rate_limits);
        assert_eq!(limits.disk_bytes, NonZeroU64::new(5 << 20));
        assert_eq!(limits.disk_operations, NonZeroU64::new(300));
        assert_eq!(limits.network_bytes, NonZeroU64::new(4_294_967_295 << 20));
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

//! cloud-hypervisor's command line, as far as roost uses it. Anything else is an error: a stand-in that ignores options
//! would hide what the real one refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::config::{Balloon, Bucket, Console, Cpus, Disk, Memory, Net, Payload, RateLimiter, Rng, VmConfig};
use crate::sys;

/// A parsed command line.
pub(crate) struct Options {
    /// `--api-socket fd=N`.
    pub(crate) api_socket: UnixListener,
    /// `--event-monitor fd=N`.
    pub(crate) event_monitor: Option<OwnedFd>,
    /// What to do first.
    pub(crate) start: Start,
}

/// How the VM comes to be.
pub(crate) enum Start {
    /// Booted from this configuration.
    Boot(Box<VmConfig>),
    /// Restored from a snapshot directory.
    Restore(Restore),
}

/// `--restore`.
pub(crate) struct Restore {
    /// The snapshot's directory.
    pub(crate) source: PathBuf,
    /// Taps for the network devices, by id.
    pub(crate) net_fds: BTreeMap<String, RawFd>,
    /// Whether the VM runs at once.
    pub(crate) resume: bool,
    /// Whether its memory is loaded as it is touched.
    pub(crate) on_demand: bool,
}

impl Options {
    /// Parses the arguments after the program's name and takes the descriptors they name.
    pub(crate) fn parse(arguments: &[String]) -> Result<Self> {
        let mut given = Given::collect(arguments)?;
        let api_socket = passed_fd(&given.need("api-socket")?, &["fd"])?;
        let event_monitor = given
            .take("event-monitor")
            .map(|value| passed_fd(&value, &["fd"]))
            .transpose()?;
        let seccomp = given.take("seccomp").unwrap_or_else(|| "true".to_owned());
        ensure!(
            ["true", "false", "log"].contains(&seccomp.as_str()),
            "--seccomp {seccomp}: true, false or log"
        );
        let start = match given.take("restore") {
            Some(value) => Start::Restore(restore(&value)?),
            None => Start::Boot(Box::new(boot(&mut given)?)),
        };
        if let Some(name) = given.0.keys().next() {
            bail!("--{name} does not go with the other options");
        }
        Ok(Self {
            api_socket: UnixListener::from(api_socket),
            event_monitor,
            start,
        })
    }
}

const KNOWN: &[&str] = &[
    "api-socket",
    "balloon",
    "cmdline",
    "console",
    "cpus",
    "disk",
    "event-monitor",
    "initramfs",
    "kernel",
    "memory",
    "net",
    "restore",
    "rng",
    "seccomp",
    "serial",
];

struct Given(BTreeMap<String, String>);

impl Given {
    fn collect(arguments: &[String]) -> Result<Self> {
        let mut given = BTreeMap::new();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let name = argument
                .strip_prefix("--")
                .ok_or_else(|| anyhow!("unexpected argument {argument:?}"))?;
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, value.to_owned()),
                None => (
                    name,
                    rest.next().ok_or_else(|| anyhow!("--{name} needs a value"))?.clone(),
                ),
            };
            ensure!(KNOWN.contains(&name), "the stand-in does not know --{name}");
            ensure!(
                given.insert(name.to_owned(), value).is_none(),
                "--{name} is given twice"
            );
        }
        Ok(Self(given))
    }

    fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    fn need(&mut self, name: &str) -> Result<String> {
        self.take(name).ok_or_else(|| anyhow!("--{name} is missing"))
    }
}

fn boot(given: &mut Given) -> Result<VmConfig> {
    let cpus = fields(&given.need("cpus")?, &["boot", "max", "nested"])?;
    let boot_vcpus: u32 = number(&cpus, "boot")?;
    ensure!((1..=255).contains(&boot_vcpus), "--cpus boot={boot_vcpus}: 1 to 255");
    let memory = fields(&given.need("memory")?, &["size", "shared", "thp"])?;
    let limits = ["bw_size", "bw_refill_time", "ops_size", "ops_refill_time"];
    let disk = fields(
        &given.need("disk")?,
        &[&["path", "image_type", "id", "readonly"], &limits[..]].concat(),
    )?;
    // QEMU does not limit a tap: taken, and done without.
    let net = fields(&given.need("net")?, &[&["fd", "id", "mac"], &limits[..2]].concat())?;
    let rng = fields(
        &given.take("rng").unwrap_or_else(|| "src=/dev/urandom".to_owned()),
        &["src"],
    )?;
    if let Some(kind) = disk.get("image_type") {
        ensure!(
            kind == "raw",
            "--disk image_type={kind}: the stand-in takes raw images only"
        );
    }
    let balloon = match given.take("balloon") {
        Some(value) => {
            let fields = fields(&value, &["size", "free_page_reporting", "deflate_on_oom"])?;
            Some(Balloon {
                size: size(need(&fields, "size")?)?,
                free_page_reporting: toggle(&fields, "free_page_reporting", false)?,
            })
        }
        None => None,
    };
    let serial = given.take("serial").unwrap_or_else(|| "null".to_owned());
    let console = given.take("console").unwrap_or_else(|| "tty".to_owned());
    ensure!(console == "off", "--console {console}: the stand-in takes off only");
    Ok(VmConfig {
        cpus: Cpus {
            boot_vcpus,
            max_vcpus: boot_vcpus,
            nested: toggle(&cpus, "nested", true)?,
        },
        memory: Memory {
            size: size(need(&memory, "size")?)?,
            shared: toggle(&memory, "shared", false)?,
            thp: toggle(&memory, "thp", true)?,
        },
        payload: Payload {
            kernel: given.need("kernel")?.into(),
            initramfs: given.take("initramfs").map(PathBuf::from),
            cmdline: given.take("cmdline"),
        },
        disks: vec![Disk {
            path: need(&disk, "path")?.into(),
            readonly: toggle(&disk, "readonly", false)?,
            id: Some(disk.get("id").cloned().unwrap_or_else(|| "_disk0".to_owned())),
            image_type: Some("Raw".to_owned()),
            rate_limiter_config: RateLimiter {
                bandwidth: bucket(&disk, "bw")?,
                ops: bucket(&disk, "ops")?,
            },
        }],
        net: vec![Net {
            id: Some(net.get("id").cloned().unwrap_or_else(|| "_net1".to_owned())),
            mac: need(&net, "mac")?.to_owned(),
            fds: Some(vec![number(&net, "fd")?]),
        }],
        rng: Rng {
            src: need(&rng, "src")?.into(),
        },
        balloon,
        serial: Console {
            mode: match serial.as_str() {
                "tty" => "Tty".to_owned(),
                "null" => "Null".to_owned(),
                "off" => "Off".to_owned(),
                other => bail!("--serial {other}: the stand-in takes tty, null or off"),
            },
        },
        console: Console { mode: "Off".to_owned() },
    })
}

/// `NAME_size` and `NAME_refill_time`: both or neither.
fn bucket(fields: &BTreeMap<String, String>, name: &str) -> Result<Option<Bucket>> {
    let [size, refill_time] = ["size", "refill_time"].map(|field| format!("{name}_{field}"));
    match (fields.contains_key(&size), fields.contains_key(&refill_time)) {
        (false, false) => Ok(None),
        _ => Ok(Some(Bucket {
            size: number(fields, &size)?,
            refill_time: number(fields, &refill_time)?,
        })),
    }
}

fn restore(value: &str) -> Result<Restore> {
    let known = ["source_url", "prefault", "memory_restore_mode", "net_fds", "resume"];
    let fields = fields(value, &known)?;
    // QEMU loads all memory up front; the mode decides what a snapshot has of it.
    let on_demand = match fields.get("memory_restore_mode").map(String::as_str) {
        None | Some("copy") => false,
        Some("ondemand") => true,
        Some(mode) => bail!("memory_restore_mode={mode}: copy or ondemand"),
    };
    let mut net_fds = BTreeMap::new();
    if let Some(list) = fields.get("net_fds") {
        for pair in split(unbracket(list)?, ',')? {
            let (id, fds) = pair
                .split_once('@')
                .ok_or_else(|| anyhow!("net_fds={list}: not [id@[fd]]"))?;
            let fd = unbracket(fds)?
                .parse()
                .with_context(|| format!("net_fds={list}: one descriptor for a device"))?;
            net_fds.insert(id.to_owned(), fd);
        }
    }
    Ok(Restore {
        source: file_url(need(&fields, "source_url")?)?,
        net_fds,
        resume: toggle(&fields, "resume", false)?,
        on_demand,
    })
}

/// The path of a `file://` URL.
pub(crate) fn file_url(url: &str) -> Result<PathBuf> {
    let path = url
        .strip_prefix("file://")
        .ok_or_else(|| anyhow!("{url}: not a file:// URL"))?;
    ensure!(path.starts_with('/'), "{url}: not an absolute path");
    Ok(path.into())
}

/// `key=value,key=value`, each key known and given once; brackets keep their commas.
fn fields(value: &str, known: &[&str]) -> Result<BTreeMap<String, String>> {
    let mut fields = BTreeMap::new();
    let known: BTreeSet<&str> = known.iter().copied().collect();
    for field in split(value, ',')? {
        let (key, value) = field
            .split_once('=')
            .ok_or_else(|| anyhow!("{field:?} is not key=value"))?;
        ensure!(known.contains(key), "the stand-in does not know {key:?} in {value:?}");
        ensure!(
            fields.insert(key.to_owned(), value.to_owned()).is_none(),
            "{key} is given twice"
        );
    }
    Ok(fields)
}

/// Splits outside of brackets.
fn split(text: &str, separator: char) -> Result<Vec<&str>> {
    let (mut depth, mut start, mut parts) = (0i32, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            c if c == separator && depth == 0 => {
                parts.push(&text[start..at]);
                start = at + c.len_utf8();
            }
            _ => {}
        }
        ensure!(depth >= 0, "{text:?}: brackets do not match");
    }
    ensure!(depth == 0, "{text:?}: brackets do not match");
    parts.push(&text[start..]);
    Ok(parts)
}

fn unbracket(text: &str) -> Result<&str> {
    text.strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .ok_or_else(|| anyhow!("{text:?} is not in brackets"))
}

fn need<'a>(fields: &'a BTreeMap<String, String>, key: &str) -> Result<&'a str> {
    fields
        .get(key)
        .map(String::as_str)
        .ok_or_else(|| anyhow!("{key} is missing"))
}

fn number<T>(fields: &BTreeMap<String, String>, key: &str) -> Result<T>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let value = need(fields, key)?;
    value.parse().with_context(|| format!("{key}={value}"))
}

fn toggle(fields: &BTreeMap<String, String>, key: &str, default: bool) -> Result<bool> {
    match fields.get(key).map(String::as_str) {
        None => Ok(default),
        Some("on" | "true") => Ok(true),
        Some("off" | "false") => Ok(false),
        Some(other) => bail!("{key}={other}: on or off"),
    }
}

/// Bytes, with K, M or G behind.
fn size(text: &str) -> Result<u64> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K')) => (&text[..at], 10),
        Some((at, 'M')) => (&text[..at], 20),
        Some((at, 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let value: u64 = digits.parse().with_context(|| format!("size {text:?}"))?;
    value
        .checked_mul(1 << shift)
        .ok_or_else(|| anyhow!("size {text:?} is too large"))
}

/// The descriptor behind `fd=N`, from now on closed in children.
fn passed_fd(value: &str, known: &[&str]) -> Result<OwnedFd> {
    let fd = sys::passed(number(&fields(value, known)?, "fd")?).with_context(|| format!("{value}: not open"))?;
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(text: &str) -> Given {
        Given::collect(&text.split_whitespace().map(String::from).collect::<Vec<_>>()).unwrap()
    }

    const BOOT: &str = "--kernel /k --initramfs /i --cpus boot=2,nested=off --memory size=512M,shared=on,thp=off \
        --disk path=/dev/dm-7,image_type=raw,id=rootfs --net fd=3,id=net0,mac=02:FC:00:00:00:05 \
        --rng src=/dev/urandom --serial tty --console off --balloon size=0,free_page_reporting=on";

    #[test]
    fn the_command_line_of_the_shim_is_understood() {
        let config = boot(&mut given(BOOT)).unwrap();
        assert_eq!(config.cpus.boot_vcpus, 2);
        assert!(!config.cpus.nested);
        assert_eq!(config.memory.size, 512 << 20);
        assert!(config.memory.shared);
        assert_eq!(config.disks[0].path, PathBuf::from("/dev/dm-7"));
        assert_eq!(config.net[0].fds, Some(vec![3]));
        assert!(config.balloon.unwrap().free_page_reporting);
    }

    #[test]
    fn unknown_options_and_keys_are_errors() {
        let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        assert!(Given::collect(&words("--vsock cid=3")).is_err());
        assert!(Given::collect(&words("--kernel /k --kernel /l")).is_err());
        assert!(Given::collect(&words("stray")).is_err());
        assert!(boot(&mut given(&BOOT.replace("nested=off", "topology=1"))).is_err());
        assert!(boot(&mut given(&BOOT.replace("image_type=raw", "image_type=qcow2"))).is_err());
    }

    #[test]
    fn a_restore_names_its_directory_and_taps() {
        let value = "source_url=file:///s/vm/3,net_fds=[net0@[3]],memory_restore_mode=ondemand,resume=false";
        let restore = restore(value).unwrap();
        assert_eq!(restore.source, PathBuf::from("/s/vm/3"));
        assert_eq!(restore.net_fds, BTreeMap::from([("net0".to_owned(), 3)]));
        assert!(!restore.resume && restore.on_demand);
    }

    #[test]
    fn brackets_must_match() {
        assert!(split("a=[1,2", ',').is_err());
        assert!(split("a]=1", ',').is_err());
    }
}

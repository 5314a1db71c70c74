//! What the checks see of a host.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, Metadata};
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use landlock::{ABI, Access as _, AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::config::{Config, Loaded, Problems, Sources};
use crate::sandbox::unix_now;

/// Largest file that is read.
const MAX_FILE: u64 = 1 << 20;
/// Time for the agent's answer, and for the VMM's.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// The agent's environment, which its unit reads.
const ENVIRONMENT: &str = "/etc/roost/agent.env";

/// A host: its files, and what is no file.
#[derive(Debug)]
pub struct Host {
    /// Where its root directory is.
    root: PathBuf,
    /// Now, in Unix seconds.
    pub(super) now: i64,
    /// The highest version of Landlock's interface that is known here and there; 0: none.
    pub(super) landlock: u32,
    /// What the VMM's program says when it is asked for its version.
    pub(super) vmm_version: fn(&Path) -> io::Result<Vec<u8>>,
    /// The status of the agent's health, or why there is none.
    pub(super) health: Result<u16, String>,
    /// The agent's configuration, and where it is from.
    pub(super) loaded: Result<Loaded, Problems>,
    /// The same, or the usual one where that is wrong.
    pub(super) config: Config,
}

/// Something that could not be seen.
#[derive(Debug)]
pub(super) struct Unseen {
    path: PathBuf,
    error: io::Error,
}

impl Unseen {
    /// Whether it is not there, as opposed to not ours to see.
    pub(super) fn is_missing(&self) -> bool {
        matches!(
            self.error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
        )
    }
}

impl fmt::Display for Unseen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.error.kind() {
            io::ErrorKind::PermissionDenied => write!(f, "{} can only be seen as root", self.path.display()),
            _ if self.is_missing() => write!(f, "{} is not there", self.path.display()),
            _ => write!(f, "{} cannot be read: {}", self.path.display(), self.error),
        }
    }
}

impl Host {
    /// This machine, with the configuration in a file, or the usual one.
    pub fn of_machine(file: Option<PathBuf>) -> Self {
        let mut sources = Sources::of_process(file);
        sources
            .environment
            .extend(environment_of(&fs::read_to_string(ENVIRONMENT).unwrap_or_default()));
        let loaded = sources.load();
        let config = loaded
            .as_ref()
            .map_or_else(|_| Config::default(), |loaded| loaded.config.clone());
        Self {
            root: "/".into(),
            now: unix_now(),
            landlock: landlock_version(),
            vmm_version: |program| said_by_vmm(program, ANSWER_LIMIT),
            health: health(config.status_listen),
            loaded,
            config,
        }
    }

    /// This machine as its agent sees it: without what only programs and calls tell.
    pub fn of_agent(sources: &Sources) -> Self {
        let loaded = sources.load();
        Self {
            root: "/".into(),
            now: unix_now(),
            landlock: 0,
            vmm_version: |_| Err(io::ErrorKind::Unsupported.into()),
            health: Err("it is asked by itself".into()),
            config: loaded
                .as_ref()
                .map_or_else(|_| Config::default(), |loaded| loaded.config.clone()),
            loaded,
        }
    }

    /// Where a path of the host is.
    pub(super) fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A text file, without the white space at its ends.
    pub(super) fn read(&self, path: impl AsRef<Path>) -> Result<String, Unseen> {
        let mut text = Vec::new();
        let file = fs::File::open(self.at(&path));
        let read = file.and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
        read.map_err(unseen(&path))?;
        Ok(String::from_utf8_lossy(&text).trim().to_owned())
    }

    /// What is known of a file, behind symbolic links.
    pub(super) fn metadata(&self, path: impl AsRef<Path>) -> Result<Metadata, Unseen> {
        fs::metadata(self.at(&path)).map_err(unseen(&path))
    }

    /// The names in a directory, in order.
    pub(super) fn names(&self, path: impl AsRef<Path>) -> Result<Vec<String>, Unseen> {
        let entries = fs::read_dir(self.at(&path)).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = entries.map_err(unseen(&path))?;
        let mut names: Vec<_> = entries
            .iter()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        Ok(names)
    }

    /// The number of a user, by its files.
    pub(super) fn uid(&self, name: &str) -> Option<u32> {
        self.id("/etc/passwd", name)
    }

    /// The number of a group, by its files.
    pub(super) fn gid(&self, name: &str) -> Option<u32> {
        self.id("/etc/group", name)
    }

    fn id(&self, file: &str, name: &str) -> Option<u32> {
        let text = self.read(file).ok()?;
        let fields = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let mut ours = fields.filter(|fields| fields.first() == Some(&name));
        ours.next()?.get(2)?.parse().ok()
    }
}

fn unseen(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Unseen {
    let path = path.as_ref().to_owned();
    move |error| Unseen { path, error }
}

/// The variables of an `EnvironmentFile=` that concern the agent's configuration: `NAME=VALUE` a line, perhaps in quotes.
fn environment_of(text: &str) -> Vec<(OsString, OsString)> {
    let variable = |line: &str| {
        let (name, value) = line.trim().split_once('=')?;
        let value = value.trim();
        let quoted = ['"', '\'']
            .iter()
            .find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
        name.starts_with("ROOST_")
            .then(|| (name.into(), quoted.unwrap_or(value).into()))
    };
    text.lines().filter_map(variable).collect()
}

/// The highest version of which the kernel knows all rights over files and networks, or is in one; 0: none.
fn landlock_version() -> u32 {
    let has = |abi: ABI| {
        let rules = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        rules
            .handle_access(AccessFs::from_all(abi))
            .and_then(Ruleset::create)
            .is_ok()
    };
    // Versions 4 and 6 add no right over files: a kernel of those reads as the one before.
    let known = [(5, ABI::V5), (3, ABI::V3), (2, ABI::V2), (1, ABI::V1)];
    known.iter().find(|(_, abi)| has(*abi)).map_or(0, |(number, _)| *number)
}

/// What a program writes for `--version`. One that has not ended within `limit` is killed.
fn said_by_vmm(program: &Path, limit: Duration) -> io::Result<Vec<u8>> {
    let mut child = Command::new(program)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    // Can be read from once it has ended.
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).expect("a few seconds");
    let mut ends = [PollFd::new(&pidfd, PollFlags::IN)];
    let has_ended = rustix::io::retry_on_intr(|| poll(&mut ends, Some(&limit)))? > 0;
    if !has_ended {
        child.kill()?;
    }
    child.wait()?;
    if !has_ended {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut said = Vec::new();
    child
        .stdout
        .take()
        .expect("asked for")
        .take(MAX_FILE)
        .read_to_end(&mut said)?;
    Ok(said)
}

/// What the agent says of its health.
fn health(address: SocketAddr) -> Result<u16, String> {
    let ask = || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, ANSWER_LIMIT)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        write!(
            stream,
            "GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.take(MAX_FILE).read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().map_err(|error| format!("http://{address}/health: {error}"))?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.ok_or_else(|| format!("http://{address}/health is answered by something else"))
}

/// A host that is a directory.
#[cfg(test)]
pub(super) mod fake {
    use std::os::unix::fs::PermissionsExt as _;

    use tempfile::TempDir;

    use super::*;
    use crate::config::Sources;
    use crate::pki;

    /// What can be changed about it.
    pub(in super::super) struct Fake {
        dir: TempDir,
        pub(in super::super) now: i64,
        pub(in super::super) landlock: u32,
        pub(in super::super) vmm_version: fn(&Path) -> io::Result<Vec<u8>>,
        pub(in super::super) health: Result<u16, String>,
    }

    impl Fake {
        /// A machine with nothing on it.
        pub(in super::super) fn empty() -> Self {
            Self {
                dir: tempfile::tempdir().expect("a directory"),
                now: unix_now(),
                landlock: 0,
                vmm_version: |_| Err(io::ErrorKind::NotFound.into()),
                health: Err("nobody answers".into()),
            }
        }

        /// One that has all that it should.
        pub(in super::super) fn good() -> Self {
            let fake = Self {
                landlock: 2,
                vmm_version: |_| Ok(b"cloud-hypervisor v53.0\n".to_vec()),
                health: Ok(200),
                ..Self::empty()
            };
            let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
            // All files here belong to whoever runs the tests.
            fake.write(
                "etc/passwd",
                &format!("root:x:{uid}:{gid}::/:\nroost:x:{uid}:{gid}::/:\n"),
            );
            fake.write(
                "etc/group",
                &format!("root:x:{gid}:\nroost:x:{gid}:\nroost-vm:x:{gid}:roost\nkvm:x:{gid}:\n"),
            );
            fake.write("etc/roost/agent.toml", "");
            fake.write("proc/sys/kernel/osrelease", "6.1.0-41-cloud-amd64\n");
            fake.write("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n");
            fake.write(
                "usr/lib/modules/6.1.0-41-cloud-amd64/modules.builtin",
                "kernel/net/netfilter/nft_ct.ko\n",
            );
            for module in super::super::kernel::MODULES
                .lines()
                .filter(|line| !line.starts_with('#'))
            {
                if module != "nft_ct" {
                    fake.write(&format!("sys/module/{module}/refcnt"), "0\n");
                }
            }
            for device in super::super::kernel::DEVICES {
                fake.write(&device[1..], "");
            }
            fake.mode("dev/kvm", 0o660);
            fake.write("proc/sys/net/ipv4/ip_forward", "1\n");
            fake.write("usr/bin/cloud-hypervisor", "");
            for (path, mode) in
                super::super::install::packaged_directories().map(|directory| (directory.path, directory.mode))
            {
                fs::create_dir_all(fake.at(path)).expect("made");
                fake.mode(&path[1..], mode);
            }
            for (socket, mode) in [("run/roost/privd.sock", 0o660), ("run/roost/vmmshim.sock", 0o600)] {
                drop(std::os::unix::net::UnixListener::bind(fake.at(socket)).expect("bound"));
                fake.mode(socket, mode);
            }
            fake.write(
                "proc/net/unix",
                "Num RefCount Protocol Flags Type St Inode Path\n\
                 0: 00000002 00000000 00010000 0005 01 7 /run/roost/privd.sock\n\
                 1: 00000002 00000000 00010000 0005 01 8 /run/roost/vmmshim.sock\n",
            );
            fake.write("run/systemd/timesync/synchronized", "");
            pki::init(&fake.at("etc/roost/pki"), &[]).expect("certificates");
            fake.write("proc/swaps", "Filename Type Size Used Priority\n");
            for (path, value) in [
                ("proc/sys/kernel/unprivileged_bpf_disabled", "2"),
                ("proc/sys/kernel/io_uring_disabled", "2"),
                ("proc/sys/kernel/unprivileged_userns_clone", "0"),
                ("proc/sys/kernel/yama/ptrace_scope", "1"),
                ("proc/sys/kernel/core_pattern", "core"),
                ("sys/kernel/mm/ksm/run", "0"),
                ("sys/devices/system/cpu/smt/active", "0"),
                ("sys/module/kvm_intel/parameters/nested", "N"),
                ("sys/devices/system/cpu/vulnerabilities/meltdown", "Mitigation: PTI"),
            ] {
                fake.write(path, value);
            }
            fake
        }

        pub(in super::super) fn at(&self, path: &str) -> PathBuf {
            self.dir.path().join(path.trim_start_matches('/'))
        }

        pub(in super::super) fn write(&self, path: &str, text: &str) {
            let path = self.at(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("made");
            fs::write(path, text).expect("written");
        }

        pub(in super::super) fn remove(&self, path: &str) {
            let path = self.at(path);
            if path.is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            }
            .expect("removed");
        }

        pub(in super::super) fn mode(&self, path: &str, mode: u32) {
            fs::set_permissions(self.at(path), fs::Permissions::from_mode(mode)).expect("set");
        }

        pub(in super::super) fn host(&self) -> Host {
            let sources = Sources {
                file: Some(self.at("etc/roost/agent.toml")),
                ..Sources::default()
            };
            let loaded = sources.load();
            let config = loaded
                .as_ref()
                .map_or_else(|_| Config::default(), |loaded| loaded.config.clone());
            Host {
                root: self.dir.path().into(),
                now: self.now,
                landlock: self.landlock,
                vmm_version: self.vmm_version,
                health: self.health.clone(),
                loaded,
                config,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_environment_is_read_as_its_unit_does() {
        let text = "# ROOST_DIR=/no\nROOST_DIR=/data\n ROOST_AGENT_LISTEN = x\nROOST_AGENT_DNS='[\"1.1.1.1\"]'\nRUST_LOG=debug\nnothing\n";
        let pairs = [
            ("ROOST_DIR", "/data"),
            ("ROOST_AGENT_LISTEN ", "x"),
            ("ROOST_AGENT_DNS", "[\"1.1.1.1\"]"),
        ];
        assert_eq!(
            environment_of(text),
            pairs.map(|(name, value)| (name.into(), value.into()))
        );
    }

    #[test]
    fn a_program_is_asked_for_its_version_and_one_that_is_not_there_or_does_not_answer_is_an_error() {
        let said = said_by_vmm(Path::new("/bin/cat"), ANSWER_LIMIT).expect("it runs");
        assert!(said.starts_with(b"cat "), "{}", said.escape_ascii());
        let kind = |program: &Path, limit| said_by_vmm(program, limit).expect_err("nothing was said").kind();
        assert_eq!(kind(Path::new("/nonexistent"), ANSWER_LIMIT), io::ErrorKind::NotFound);
        let dir = tempfile::tempdir().expect("a directory");
        let endless = dir.path().join("endless");
        // By another process: a file that this one has open for writing, or one that it has started meanwhile, cannot be run.
        let write = "printf '#!/bin/sh\nexec sleep 1000\n' > \"$0\"; chmod 755 \"$0\"";
        let written = Command::new("sh")
            .args(["-c", write])
            .arg(&endless)
            .status()
            .expect("sh runs");
        assert!(written.success());
        assert_eq!(kind(&endless, Duration::from_millis(100)), io::ErrorKind::TimedOut);
    }

    #[test]
    fn health_is_of_who_listens_there() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = listener.local_addr().expect("an address");
        let answers = std::thread::spawn(move || {
            for answer in ["HTTP/1.1 503 x\r\n\r\n", "SSH-2.0\r\n"] {
                let (mut stream, _) = listener.accept().expect("a client");
                // To its end: what is left unread has the connection reset.
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).expect("a request");
                    head.push(byte[0]);
                }
                stream.write_all(answer.as_bytes()).expect("answered");
            }
        });
        assert_eq!(health(address), Ok(503));
        assert!(health(address).expect_err("something else").contains("something else"));
        answers.join().expect("no panic");
        assert!(health(address).is_err(), "nobody is there");
    }
}

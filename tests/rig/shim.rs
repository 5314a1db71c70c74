//! The shim as systemd starts it, on a host's kernel: each VM's own uid and cgroup, its cage, what it takes for a disk.
//!
//! The cage probe runs in the place of the VMM and tells on its console what it can do. What needs a real VMM, a real disk and a
//! real tap is shown by the sandboxes of the other tests.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;
use roost_common::ipc;
use roost_common::shim::{
    Exit, FromShim, Launch, PROTOCOL, RateLimits, SOCKET, ShimError, SpecField, Start, Started, ToShim, VmSpec,
    WaitStatus,
};
use roost_common::units::{Mebibytes, Vcpus};
use roost_tests::{PATIENCE, eventually, in_rig};

/// Arguments of the next shims, read by the unit.
const ARGUMENTS: &str = "/etc/roost/vmmshim.env";
const PROFILE: &str = "/etc/roost/cage-probe.json";
/// The one of the shim's own tests.
const PROBE_PROFILE: &str = include_str!("../../vmmshim/tests/probe-profile.json");
/// What systemd gives DynamicUser= services.
const DYNAMIC_UIDS: std::ops::RangeInclusive<u32> = 61184..=65519;

/// A shim that systemd started for us, and the directories of its sandbox.
struct Shim {
    socket: OwnedFd,
    uid: u32,
    id: String,
    run_dir: PathBuf,
    sandbox_dir: PathBuf,
    kernel: PathBuf,
}

impl Shim {
    /// Connects, with the probe as VMM; under its foreign profile, or the one compiled in.
    fn start(id: &str, profile: &str) -> Self {
        let profile_here = PROBE_PROFILE.replace("\"shared_cgroup\": true", "\"shared_cgroup\": false");
        fs::write(PROFILE, profile_here).expect("written");
        let before = fs::read(ARGUMENTS).expect("the unit's arguments");
        fs::write(
            ARGUMENTS,
            format!("ROOST_SHIM_ARGS=\"--vmm /usr/bin/roost-cage-probe {profile}\"\n"),
        )
        .expect("written");
        let socket = packets(SOCKET);
        let hello = ipc::receive::<FromShim>(socket.as_fd());
        fs::write(ARGUMENTS, before).expect("restored");
        let (message, sender) = hello.expect("a hello");
        assert!(
            matches!(message, FromShim::Hello { protocol: PROTOCOL, .. }),
            "{message:?}"
        );
        let uid = sender.expect("credentials").uid;
        let sandbox_dir = PathBuf::from("/var/lib/roost/sandboxes").join(id);
        let shim = Self {
            socket,
            uid,
            id: id.into(),
            run_dir: PathBuf::from("/run/roost/vm").join(id),
            kernel: PathBuf::from("/var/lib/roost/kernels").join(id),
            sandbox_dir,
        };
        for directory in [
            &shim.run_dir,
            &shim.sandbox_dir,
            &shim.vm_dir(),
            &shim.vm_dir().join("1"),
        ] {
            fs::create_dir(directory).expect("made");
            chown(directory, Some(uid), None).expect("given to the VM");
        }
        shim
    }

    fn vm_dir(&self) -> PathBuf {
        self.sandbox_dir.join("vm")
    }

    fn ask(&self, request: &ToShim) -> FromShim {
        ipc::send(self.socket.as_fd(), request).expect("sent");
        self.receive()
    }

    fn receive(&self) -> FromShim {
        ipc::receive(self.socket.as_fd()).expect("a packet").0
    }

    /// Asks for a launch of a program of the probe.
    fn launch(&self, program: &str, tap: OwnedFd, disk: OwnedFd, disk_minor: u32) -> FromShim {
        fs::write(&self.kernel, program).expect("written");
        let text = |path: &PathBuf| path.to_str().expect("UTF-8").to_owned();
        let spec = VmSpec {
            sandbox: self.id.parse().expect("an id"),
            vcpus: Vcpus(1),
            memory: Mebibytes(128),
            disk_minor,
            limits: RateLimits::default(),
            start: Start::Boot {
                kernel: text(&self.kernel),
                initramfs: None,
            },
            run_dir: text(&self.run_dir),
            vm_dir: text(&self.vm_dir()),
        };
        self.ask(&ToShim::Launch(Box::new(Launch {
            spec,
            tap: tap.into(),
            disk: disk.into(),
        })))
    }

    fn run(&self, program: &str) -> Started {
        match self.launch(program, null(), null(), 0) {
            FromShim::Started(started) => started,
            other => panic!("not started but {other:?}"),
        }
    }

    fn exited(&self) -> Exit {
        match self.receive() {
            FromShim::Exited(exit) => exit,
            other => panic!("no exit but {other:?}"),
        }
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        // Ends what still runs; a shim that has ended does not mind.
        if ipc::send(self.socket.as_fd(), &ToShim::Kill).is_ok() {
            while ipc::receive::<FromShim>(self.socket.as_fd()).is_ok() {}
        }
        for directory in [&self.run_dir, &self.sandbox_dir] {
            fs::remove_dir_all(directory).ok();
        }
        fs::remove_file(&self.kernel).ok();
        fs::remove_file(PROFILE).ok();
    }
}

fn packets(path: &str) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("a socket");
    setsockopt(&socket, sockopt::PassCred, &true).expect("SO_PASSCRED");
    let limit = TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
    setsockopt(&socket, sockopt::ReceiveTimeout, &limit).expect("SO_RCVTIMEO");
    let address = UnixAddr::new(path).expect("a short path");
    connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &address).expect("connected");
    socket
}

fn null() -> OwnedFd {
    File::open("/dev/null").expect("opened").into()
}

fn foreign() -> String {
    format!("--profile {PROFILE}")
}

/// A field of `/proc/<pid>/status`.
fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
    words(line.unwrap_or_else(|| panic!("no {field}")))
}

/// The words of a line, however far apart they are.
fn words(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn command(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("runs");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
}

fn group(name: &str) -> String {
    let line = command("getent", &["group", name]);
    line.split(':').nth(2).expect("a gid").to_owned()
}

#[test]
fn each_vm_has_a_uid_and_a_cgroup_of_its_own_no_capability_and_six_descriptors() {
    in_rig(|| {
        let shims = [Shim::start("cage-1", &foreign()), Shim::start("cage-2", &foreign())];
        assert_ne!(shims[0].uid, shims[1].uid, "two VMs share a uid");
        let mut cgroups = Vec::new();
        for shim in &shims {
            assert!(DYNAMIC_UIDS.contains(&shim.uid), "uid {}", shim.uid);
            let started = shim.run("descriptors\nwait");
            assert_eq!(started.uid, shim.uid);
            let pid = started.pid;
            let uid = shim.uid.to_string();
            assert_eq!(status(pid, "Uid"), [uid.as_str(); 4].join(" "));
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(status(pid, set), "0000000000000000", "{set}");
            }
            assert_eq!(
                (status(pid, "NoNewPrivs"), status(pid, "Seccomp")),
                ("1".into(), "2".into())
            );
            let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
            let limits: Vec<String> = limits.lines().map(words).collect();
            for limit in ["Max core file size 0 0 bytes", "Max open files 1024 1024 files"] {
                assert!(limits.iter().any(|line| line == limit), "{limit}: {limits:#?}");
            }
            let mut groups: Vec<String> = status(pid, "Groups").split(' ').map(Into::into).collect();
            groups.retain(|gid| *gid != uid);
            let mut wanted = vec![group("kvm"), group("roost-vm")];
            groups.sort();
            wanted.sort();
            assert_eq!(groups, wanted);
            let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("a cgroup");
            assert_eq!(own.trim(), format!("0::{}", started.cgroup));
            assert!(started.cgroup.contains("roost-vmmshim@"), "{}", started.cgroup);
            cgroups.push(started.cgroup);
            eventually("six descriptors", || {
                let mut numbers: Vec<u32> = fs::read_dir(format!("/proc/{pid}/fd"))
                    .expect("descriptors")
                    .map(|entry| {
                        entry
                            .expect("an entry")
                            .file_name()
                            .to_string_lossy()
                            .parse()
                            .expect("a number")
                    })
                    .collect();
                numbers.sort_unstable();
                (numbers == [0, 1, 2, 3, 4, 5]).then_some(())
            });
        }
        assert_ne!(cgroups[0], cgroups[1]);
        // Neither can do anything to the other.
        let shim = Shim::start("cage-3", &foreign());
        let other = fs::read_to_string(format!("/sys/fs/cgroup{}/cgroup.procs", cgroups[0])).expect("processes");
        let victim = other.split_whitespace().last().expect("a process");
        shim.run(&format!(
            "signal {victim}\nread /proc/{victim}/mem\nlist /proc/{victim}/fd\nexit 0"
        ));
        let console = String::from_utf8_lossy(&shim.exited().console).into_owned();
        assert!(!console.contains("done"), "{console}");
        assert_eq!(console.matches("error").count(), 3, "{console}");
    });
}

#[test]
fn the_cage_holds_on_this_kernel() {
    in_rig(|| {
        let shim = Shim::start("cage", &foreign());
        let vm = shim.vm_dir();
        let (vm, run_dir) = (vm.display(), shim.run_dir.display());
        let allowed = [
            format!("create {vm}/1/state.json"),
            format!("read {vm}/1/state.json"),
            format!("truncate {vm}/1/state.json"),
            "read /dev/urandom".into(),
        ];
        let refused = [
            "read /etc/passwd".to_owned(),
            "read /proc/1/environ".into(),
            "read /var/lib/roost/images/minimal/rootfs.ext4".into(),
            "write /dev/net/tun".into(),
            "write /dev/kvm".into(),
            "read /dev/vda".into(),
            "read /dev/mapper/control".into(),
            "create /var/lib/roost/images/x".into(),
            "list /var/lib/roost/sandboxes".into(),
            "create /tmp/x".into(),
            format!("create {run_dir}/x"),
            format!("read {run_dir}/console.log"),
            format!("write {}", shim.kernel.display()),
            format!("mkdir {vm}/2"),
            format!("symlink {vm}/1/config.json"),
            format!("remove {vm}/1/state.json"),
            "execute /bin/sh".into(),
            "tcp connect".into(),
            "tcp bind".into(),
        ];
        let program: Vec<&str> = allowed
            .iter()
            .chain(&refused)
            .map(String::as_str)
            .chain(["exit 3"])
            .collect();
        shim.run(&program.join("\n"));
        let exit = shim.exited();
        let console = String::from_utf8_lossy(&exit.console).into_owned();
        assert_eq!(exit.wait, WaitStatus::Exited(3), "{console}");
        for command in &allowed {
            assert!(console.contains(&format!("{command}: done\n")), "{command}: {console}");
        }
        for command in &refused {
            assert!(console.contains(&format!("{command}: error ")), "{command}: {console}");
        }
    });
}

/// All sockets below a directory.
fn sockets(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("listed") {
        let entry = entry.expect("an entry");
        let kind = entry.file_type().expect("a type");
        if kind.is_dir() {
            found.extend(sockets(&entry.path()));
        } else if kind.is_socket() {
            found.push(entry.path());
        }
    }
    found
}

#[test]
fn of_the_hosts_sockets_a_vmm_sees_none() {
    in_rig(|| {
        let hosts = [
            "/run/systemd/journal/stdout",
            "/run/systemd/journal/socket",
            "/run/systemd/private",
            "/run/dbus/system_bus_socket",
            "/run/roost/privd.sock",
        ];
        let there: Vec<&str> = hosts.into_iter().filter(|path| Path::new(path).exists()).collect();
        assert!(
            there.contains(&hosts[0]) && there.contains(&"/run/roost/privd.sock"),
            "{there:?}"
        );
        let shim = Shim::start("sockets", &foreign());
        let go = shim.vm_dir().join("1/go");
        let mut program: Vec<String> = there.iter().map(|path| format!("connect {path}")).collect();
        program.push(format!("await {}", go.display()));
        program.push("exit 0".into());
        let started = shim.run(&program.join("\n"));
        let run = PathBuf::from(format!("/proc/{}/root/run", started.pid));
        let vms = run.join("roost/vm");
        let foreign: Vec<_> = sockets(&run)
            .into_iter()
            .filter(|path| !path.starts_with(&vms))
            .collect();
        assert_eq!(foreign, [""; 0].map(PathBuf::from));
        assert!(vms.join("sockets/api.sock").exists(), "its own is not there");
        fs::write(go, "").expect("written");
        let console = String::from_utf8_lossy(&shim.exited().console).into_owned();
        for path in there {
            let refused = format!("connect {path}: error {}\n", libc::ENOENT);
            assert!(console.contains(&refused), "{path}: {console}");
        }
    });
}

#[test]
fn the_files_of_an_attempt_are_published_to_the_agent() {
    in_rig(|| {
        let shim = Shim::start("publish", &foreign());
        let file = shim.vm_dir().join("1/state.json");
        shim.run(&format!("create {}\nwait", file.display()));
        let found = eventually("the VM's file", || fs::metadata(&file).ok());
        assert_eq!((found.mode() & 0o777, found.uid()), (0o600, shim.uid));
        let answer = shim.ask(&ToShim::Publish { attempt: 1 });
        assert!(matches!(answer, FromShim::Published), "{answer:?}");
        assert_eq!(fs::metadata(&file).expect("still there").mode() & 0o777, 0o640);
    });
}

#[test]
fn a_stopped_unit_reports_the_end_of_its_vmm() {
    in_rig(|| {
        let shim = Shim::start("stopped", &foreign());
        let started = shim.run("wait");
        command("systemctl", &["stop", unit_of(&started)]);
        assert_eq!(shim.exited().wait, WaitStatus::Signaled(libc::SIGKILL));
        assert!(shim.run_dir.join("exit").exists());
    });
}

/// The unit that a VMM's cgroup is part of.
fn unit_of(started: &Started) -> &str {
    let unit = started.cgroup.rsplit('/').nth(1);
    unit.expect("a cgroup inside a unit's")
}

#[test]
fn a_vmm_has_the_memory_of_its_guest_and_a_little_and_is_told_as_killed_beyond() {
    in_rig(|| {
        let shim = Shim::start("oom", &foreign());
        let go = shim.vm_dir().join("1/go");
        let started = shim.run(&format!("await {}\nmemory 512\nexit 0", go.display()));
        let cgroup = PathBuf::from(format!("/sys/fs/cgroup{}", started.cgroup));
        let read = |name: &str| fs::read_to_string(cgroup.join(name)).expect("read").trim().to_owned();
        // Guest, a 32nd of it, and the overhead of the probe's profile.
        assert_eq!(read("memory.max"), ((128 + 4 + 64) << 20).to_string());
        assert_eq!(read("cpu.max"), "200000 100000");
        assert_eq!(read("pids.max"), "33");
        assert_eq!(
            read("cgroup.procs"),
            started.pid.to_string(),
            "the shim is not among them"
        );
        assert!(cgroup.join("io.stat").exists(), "what it reads and writes is counted");
        // Swap would only put the end off.
        fs::write(cgroup.join("memory.swap.max"), "0").expect("set");
        fs::write(go, "").expect("written");
        let exit = shim.exited();
        assert_eq!((exit.wait, exit.oom_kills), (WaitStatus::Signaled(libc::SIGKILL), 1));
    });
}

#[test]
fn a_vmm_starts_no_more_threads_than_its_cgroup_lets_it() {
    in_rig(|| {
        let shim = Shim::start("threads", &foreign());
        let go = shim.vm_dir().join("1/go");
        let started = shim.run(&format!("threads 1000\nawait {}\nexit 0", go.display()));
        let pids = PathBuf::from(format!("/sys/fs/cgroup{}/pids.current", started.cgroup));
        eventually("as many threads as it may have", || {
            (fs::read_to_string(&pids).ok()?.trim() == "33").then_some(())
        });
        fs::write(go, "").expect("written");
        let console = String::from_utf8_lossy(&shim.exited().console).into_owned();
        assert!(
            console.contains(&format!("threads 1000: error {}\n", libc::EAGAIN)),
            "{console}"
        );
    });
}

/// A device-mapper device over a loop, with a name of our choice.
struct Device {
    name: String,
    loop_device: String,
    file: PathBuf,
    minor: u32,
}

impl Device {
    fn make(name: &str) -> Self {
        let file = PathBuf::from(format!("/var/tmp/{name}"));
        File::create(&file).expect("made").set_len(1 << 20).expect("sized");
        let loop_device = command("losetup", &["--find", "--show", file.to_str().expect("UTF-8")]);
        let table = format!("0 2048 linear {loop_device} 0");
        command("dmsetup", &["create", name, "--table", &table]);
        let minor = command("dmsetup", &["info", "-c", "--noheadings", "-o", "minor", name]);
        Self {
            name: name.into(),
            loop_device,
            file,
            minor: minor.parse().expect("a number"),
        }
    }

    fn open(&self) -> OwnedFd {
        let node = format!("/dev/dm-{}", self.minor);
        let node = eventually("the node", || File::options().read(true).write(true).open(&node).ok());
        node.into()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        command("dmsetup", &["remove", "--retry", &self.name]);
        command("losetup", &["--detach", &self.loop_device]);
        fs::remove_file(&self.file).expect("removed");
    }
}

#[test]
fn only_a_sandboxs_own_disk_and_a_tap_are_launched_on() {
    in_rig(|| {
        // Under the profile that is compiled in, which checks devices.
        let shim = Shim::start("checks", "");
        let own = Device::make("roost-s-checks");
        let foreign = Device::make("roost-s-checks-2");
        let refused = |tap: OwnedFd, disk: OwnedFd, minor: u32| match shim.launch("exit 0", tap, disk, minor) {
            FromShim::Refused(ShimError::BadSpec { field }) => field,
            other => panic!("not refused for a field but {other:?}"),
        };
        assert_eq!(refused(null(), null(), own.minor), SpecField::Disk, "no device");
        assert_eq!(
            refused(null(), foreign.open(), foreign.minor),
            SpecField::Disk,
            "another's"
        );
        assert_eq!(
            refused(null(), own.open(), foreign.minor),
            SpecField::Disk,
            "another's node"
        );
        assert_eq!(refused(null(), own.open(), 4000), SpecField::Disk, "no node");
        let loop_device: OwnedFd = File::open(&own.loop_device).expect("opened").into();
        assert_eq!(refused(null(), loop_device, own.minor), SpecField::Disk, "a loop");
        // The disk is accepted, so the next one is the tap's turn.
        assert_eq!(refused(null(), own.open(), own.minor), SpecField::Tap, "no tap");
        let unattached: OwnedFd = File::open("/dev/net/tun").expect("opened").into();
        assert_eq!(
            refused(unattached, own.open(), own.minor),
            SpecField::Tap,
            "a tun without interface"
        );
        assert!(
            fs::read_dir(&shim.run_dir).expect("listed").next().is_none(),
            "something is left"
        );
    });
}

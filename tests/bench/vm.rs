//! A VM without roost's agent and shim: the same VMM with the same arguments, kernel, disk and network, started by hand as root, without a
//! cage. And what answers in its guest.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use roost_common::guest::PORT;
use roost_common::privd::{Disk, EgressPolicy, Internet, Network};
use roost_common::shim::KERNEL_COMMAND_LINE;
use roost_common::units::Mebibytes;
use roost_tests::privd::Rig;
use serde_json::json;

use crate::http::Http;
use crate::output;

/// The link to the rig's VMM.
const VMM: &str = "/usr/share/roost-tests/vmm";
/// The rig's template.
const IMAGE: &str = "/var/lib/roost/images/minimal/rootfs.ext4";
/// How long a guest may take, in emulation.
const PATIENCE: Duration = Duration::from_secs(400);

/// Disk and network of a VM, made before the clock runs.
pub(crate) struct Parts {
    disk: Disk,
    network: Network,
    place: PathBuf,
}

impl Parts {
    /// Makes them.
    pub(crate) fn make(rig: &Rig, name: &str, slot: u32) -> Self {
        // privd takes an image of its caller's alone.
        let image = rig.place.join("minimal.ext4");
        if !image.exists() {
            let copy = image.to_str().expect("a path of ours");
            output("cp", &["--sparse=always", IMAGE, copy]);
        }
        let length = fs::metadata(&image).expect("the rig's template").len();
        let size = Mebibytes(
            u32::try_from(length.div_ceil(1 << 20))
                .expect("a small image")
                .max(1024),
        )
        .sectors();
        let cow = rig.cow(&format!("{name}.cow"), size);
        let disk = rig.open_disk(rig.request(name, &image, &cow, size)).expect("a disk");
        let network = rig
            .open_network(slot, EgressPolicy::of(Internet::Open))
            .expect("a network");
        let place = rig.place.join(name);
        fs::create_dir_all(&place).expect("a place");
        Self { disk, network, place }
    }

    /// A directory for a snapshot, empty.
    pub(crate) fn snapshot_dir(&self) -> PathBuf {
        let dir = self.place.join("snapshot");
        drop(fs::remove_dir_all(&dir));
        fs::create_dir(&dir).expect("made");
        dir
    }

    /// Starts a VMM that boots a guest.
    pub(crate) fn boot(&self, memory: u32) -> BareVm {
        let kernels = "/var/lib/roost/kernels";
        let find = |prefix: &str| {
            let names = fs::read_dir(kernels).expect("kernels").flatten();
            let name = names
                .filter_map(|entry| entry.file_name().into_string().ok())
                .find(|name| name.starts_with(prefix));
            format!("{kernels}/{}", name.expect("one of them"))
        };
        let disk = format!("path=/dev/dm-{},image_type=raw,id=rootfs", self.disk.node.minor);
        self.start(|tap| {
            vec![
                ("--kernel", find("vmlinux-")),
                ("--initramfs", find("initramfs-")),
                ("--cmdline", KERNEL_COMMAND_LINE.to_owned()),
                ("--cpus", "boot=1,nested=off".to_owned()),
                ("--memory", format!("size={memory}M,shared=on,thp=off")),
                ("--disk", disk),
                ("--net", format!("fd={tap},id=net0,mac=02:FC:00:00:00:05")),
                ("--rng", "src=/dev/urandom".to_owned()),
                ("--balloon", "size=0,free_page_reporting=on".to_owned()),
                ("--serial", "tty".to_owned()),
                ("--console", "off".to_owned()),
            ]
        })
    }

    /// Starts a VMM that loads a snapshot, and lets it run.
    pub(crate) fn restore(&self, from: &Path, way: Restore) -> BareVm {
        let source = format!("source_url=file://{}", from.display());
        let way = match way {
            Restore::Copied => "memory_restore_mode=copy",
            Restore::Prefaulted => "memory_restore_mode=copy,prefault=on",
            Restore::OnDemand => "memory_restore_mode=ondemand",
        };
        let vm = self.start(|tap| {
            let how = format!("{source},net_fds=[net0@[{tap}]],{way},resume=false");
            vec![("--restore", how)]
        });
        let began = Instant::now();
        // Refused until it is there.
        while vm.api("vm.resume", b"") >= 300 {
            assert!(began.elapsed() < PATIENCE, "not restored");
            std::thread::sleep(Duration::from_millis(5));
        }
        vm
    }

    fn start(&self, arguments: impl FnOnce(i32) -> Vec<(&'static str, String)>) -> BareVm {
        let socket = self.place.join("api");
        drop(fs::remove_file(&socket));
        let api = UnixListener::bind(&socket).expect("bound");
        let tap = self.network.tap.as_fd().try_clone_to_owned().expect("a copy");
        let events: OwnedFd = File::create(self.place.join("events")).expect("made").into();
        for inherited in [api.as_fd(), tap.as_fd(), events.as_fd()] {
            fcntl(inherited, FcntlArg::F_SETFD(FdFlag::empty())).expect("ours");
        }
        let log = File::create(self.place.join("console")).expect("made");
        let child = Command::new(VMM)
            .args(["--api-socket", &format!("fd={}", api.as_raw_fd())])
            .args(
                arguments(tap.as_raw_fd())
                    .into_iter()
                    .flat_map(|(name, value)| [name.to_owned(), value]),
            )
            .args([
                "--seccomp",
                "true",
                "--event-monitor",
                &format!("fd={}", events.as_raw_fd()),
            ])
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("a copy"))
            .stdout(log)
            .spawn()
            .expect("the VMM starts");
        BareVm {
            child,
            socket,
            host: self.network.addresses.host,
        }
    }
}

/// What a VMM does with a snapshot's memory.
#[derive(Clone, Copy)]
pub(crate) enum Restore {
    /// It reads all before the guest runs, as the agent has it where nothing else is configured.
    Copied,
    /// The same, into memory that is all there before.
    Prefaulted,
    /// It reads what the guest touches, and the rest beside it.
    OnDemand,
}

impl Restore {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Copied => "copied",
            Self::Prefaulted => "prefaulted",
            Self::OnDemand => "on_demand",
        }
    }
}

/// A VMM; it is killed with this value.
pub(crate) struct BareVm {
    child: Child,
    socket: PathBuf,
    host: Ipv4Addr,
}

impl BareVm {
    /// The status of a call of its API.
    pub(crate) fn api(&self, call: &str, body: &[u8]) -> u16 {
        let ask = || {
            let mut http = Http::unix(&self.socket)?;
            http.call("PUT", &format!("/api/v1/{call}"), "application/json", body)
        };
        ask().map_or(503, |(status, _)| status)
    }

    /// Stops it and writes it to a directory.
    pub(crate) fn snapshot(&self, to: &Path) {
        assert!(self.api("vm.pause", b"") < 300, "not paused");
        let body = json!({ "destination_url": format!("file://{}", to.display()) }).to_string();
        let began = Instant::now();
        // Refused while the memory of a restored one is still being loaded.
        while self.api("vm.snapshot", body.as_bytes()) >= 300 {
            assert!(began.elapsed() < PATIENCE, "no snapshot");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Its guest, once that answers; `known` is whether it has been told who it is.
    pub(crate) fn guest(&self) -> Guest {
        let began = Instant::now();
        loop {
            if let Ok(mut http) = Http::plain((self.host, PORT))
                && matches!(http.call("GET", "/health", "text/plain", b""), Ok((200..300, _)))
            {
                return Guest(http);
            }
            assert!(began.elapsed() < PATIENCE, "the guest does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for BareVm {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A guest's envd.
pub(crate) struct Guest(Http);

/// How envd is asked to run a program.
const START: &str = "/process.Process/Start";

impl Guest {
    /// That of a sandbox of the agent's, whose token its record has.
    pub(crate) fn of_sandbox(id: &str, host: &str) -> Self {
        let record = fs::read(format!("/var/lib/roost/sandboxes/{id}/sandbox.json")).expect("a record");
        let record: serde_json::Value = serde_json::from_slice(&record).expect("JSON");
        let token = record["token"].as_str().expect("a token").to_owned();
        let http = Http::plain((host, PORT)).expect("envd listens");
        Self(http.with("X-Access-Token", &token))
    }

    /// Runs a program to its end; the bytes of the answer.
    pub(crate) fn run(&mut self, program: &str, arguments: &[&str]) -> usize {
        let request = json!({"process": {"cmd": program, "args": arguments}, "stdin": false});
        self.0.follow(START, &request)
    }
}

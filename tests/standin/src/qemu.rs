//! One QEMU process and its QMP connection.
//!
//! QMP here is line-delimited JSON on a socket pair: commands are answered in order, events come in between. Descriptors
//! for migration ride on the same socket (`getfd`).

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use serde_json::{Value, json};

use crate::config::VmConfig;
use crate::sys;

const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";
/// How long QEMU may take to answer a command; under emulation seconds are normal.
const ANSWER: Duration = Duration::from_secs(120);
/// How long a snapshot may take to be written or read.
const MIGRATION: Duration = Duration::from_secs(600);

/// Whether QEMU starts the guest or waits for its state.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The guest boots.
    Boot,
    /// The guest's state is loaded first.
    Incoming,
}

/// A QEMU that can be given commands.
pub(crate) struct Qemu {
    qmp: UnixStream,
    answers: Receiver<Value>,
}

impl Qemu {
    /// Starts QEMU. The child is returned apart: somebody else waits for it. `on_event` hears QMP's events.
    pub(crate) fn spawn(
        config: &VmConfig,
        tap: RawFd,
        entry: Entry,
        on_event: impl Fn(&str, &Value) + Send + 'static,
    ) -> Result<(Self, Child)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?;
        fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let mut command = Command::new(PROGRAM);
        command.args(arguments(config, tap, &theirs, entry)?);
        command.env_clear().stdin(Stdio::null());
        let child = sys::die_with_us(&mut command)
            .spawn()
            .with_context(|| format!("cannot start {PROGRAM}"))?;
        drop(theirs);
        let qmp = UnixStream::from(ours);
        let (sender, answers) = mpsc::channel();
        let reader = BufReader::new(qmp.try_clone()?);
        thread::Builder::new().name("qmp".to_owned()).spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                let Ok(message) = serde_json::from_str::<Value>(&line) else {
                    continue;
                };
                match message.get("event").and_then(Value::as_str) {
                    Some(event) => on_event(event, &message["data"]),
                    None => {
                        if sender.send(message).is_err() {
                            break;
                        }
                    }
                }
            }
            // Dropping the sender tells a waiting command that QEMU has gone.
        })?;
        let qemu = Self { qmp, answers };
        let greeting = qemu
            .answers
            .recv_timeout(ANSWER)
            .map_err(|_| anyhow!("QEMU ended while it started"))?;
        ensure!(greeting.get("QMP").is_some(), "QEMU does not greet");
        qemu.run("qmp_capabilities", json!({}))?;
        Ok((qemu, child))
    }

    /// Runs a command and returns what it answers.
    pub(crate) fn run(&self, command: &str, arguments: Value) -> Result<Value> {
        self.run_with(command, arguments, None)
    }

    /// Writes the stopped guest's state to a file.
    pub(crate) fn save(&self, file: &File) -> Result<()> {
        // The default limit is there for networks.
        self.run("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 }))?;
        self.run_with("getfd", json!({ "fdname": "state" }), Some(file))?;
        self.run("migrate", json!({ "uri": "fd:state" }))?;
        self.migrated()
    }

    /// Loads a guest's state from a file; QEMU was started with [`Entry::Incoming`].
    pub(crate) fn load(&self, file: &File) -> Result<()> {
        self.run_with("getfd", json!({ "fdname": "state" }), Some(file))?;
        self.run("migrate-incoming", json!({ "uri": "fd:state" }))?;
        self.migrated()
    }

    fn migrated(&self) -> Result<()> {
        let deadline = Instant::now() + MIGRATION;
        loop {
            let status = self.run("query-migrate", json!({}))?;
            match status.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some(ended @ ("failed" | "cancelled")) => {
                    bail!(
                        "the state was not moved: {ended}: {}",
                        status.get("error-desc").unwrap_or(&Value::Null)
                    );
                }
                _ => {}
            }
            ensure!(
                Instant::now() < deadline,
                "the state was not moved in {} s",
                MIGRATION.as_secs()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn run_with(&self, command: &str, arguments: Value, file: Option<&File>) -> Result<Value> {
        let text = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let fds: Vec<RawFd> = file.iter().map(|file| file.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
        let bytes = [IoSlice::new(text.as_bytes())];
        let sent = sendmsg::<()>(
            self.qmp.as_fd().as_raw_fd(),
            &bytes,
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .with_context(|| format!("cannot send {command} to QEMU"))?;
        ensure!(sent == text.len(), "QEMU does not read its commands");
        let mut answer = self
            .answers
            .recv_timeout(ANSWER)
            .map_err(|error| anyhow!("QEMU does not answer {command}: {error}"))?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => bail!(
                "QEMU refuses {command}: {}",
                answer.pointer("/error/desc").unwrap_or(&answer)
            ),
        }
    }
}

fn arguments(config: &VmConfig, tap: RawFd, qmp: &OwnedFd, entry: Entry) -> Result<Vec<String>> {
    let text = |path: &Path| -> Result<String> {
        let text = path.to_str().ok_or_else(|| anyhow!("{}: not UTF-8", path.display()))?;
        ensure!(!text.contains(','), "{text}: QEMU splits at commas");
        Ok(text.to_owned())
    };
    let [disk] = config.disks.as_slice() else {
        bail!("the stand-in takes exactly one disk")
    };
    let [net] = config.net.as_slice() else {
        bail!("the stand-in takes exactly one network device")
    };
    let mut words: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
    add("-accel", "kvm".into());
    add("-machine", "pc,usb=off,vmport=off,hpet=off,memory-backend=ram".into());
    add(
        "-cpu",
        if config.cpus.nested {
            "host".into()
        } else {
            "host,-svm,-vmx".into()
        },
    );
    add("-smp", config.cpus.boot_vcpus.to_string());
    add("-m", format!("size={}M", config.memory.size >> 20));
    // Anonymous whatever the configuration says: the kernel gives it in huge pages, and with those a guest boots in half of the time
    // where the virtualisation is emulated. Nobody else maps a guest's memory.
    add(
        "-object",
        format!("memory-backend-ram,id=ram,size={}", config.memory.size),
    );
    add("-display", "none".into());
    add("-vga", "none".into());
    add("-kernel", text(&config.payload.kernel)?);
    if let Some(initramfs) = &config.payload.initramfs {
        add("-initrd", text(initramfs)?);
    }
    if let Some(cmdline) = &config.payload.cmdline {
        add("-append", cmdline.clone());
    }
    let read_only = if disk.readonly { "on" } else { "off" };
    // locking=off: the disk belongs to this VM alone, and a device node cannot be locked everywhere.
    add(
        "-blockdev",
        format!(
            "driver=host_device,node-name=disk0,filename={},read-only={read_only},discard=unmap,locking=off",
            text(&disk.path)?
        ),
    );
    let limits = [
        ("x-bps-total", disk.rate_limiter_config.bandwidth),
        ("x-iops-total", disk.rate_limiter_config.ops),
    ];
    let limits: String = limits
        .into_iter()
        .filter_map(|(name, bucket)| Some(format!(",{name}={}", bucket?.rate())))
        .collect();
    let drive = if limits.is_empty() {
        "disk0"
    } else {
        add("-object", format!("throttle-group,id=limits0{limits}"));
        add(
            "-blockdev",
            "driver=throttle,node-name=disk1,throttle-group=limits0,file=disk0,discard=unmap".into(),
        );
        "disk1"
    };
    // No ioeventfds: KVM waits for all its readers whenever one comes or goes, and where the virtualisation is emulated that is most of
    // what a guest's boot waits for. The same goes for each route of a message-signalled interrupt, hence no vectors (a boot takes a fifth
    // less of its time).
    add(
        "-device",
        format!("virtio-blk-pci,drive={drive},id=rootfs,ioeventfd=off,vectors=0"),
    );
    add("-netdev", format!("tap,id=tap0,fd={tap},vhost=off"));
    // No option ROM: nobody boots from the network.
    add(
        "-device",
        format!(
            "virtio-net-pci,netdev=tap0,id=net0,mac={},romfile=,ioeventfd=off,vectors=0",
            net.mac
        ),
    );
    add(
        "-object",
        format!("rng-random,id=rng0,filename={}", text(&config.rng.src)?),
    );
    add("-device", "virtio-rng-pci,rng=rng0,ioeventfd=off,vectors=0".into());
    if let Some(balloon) = &config.balloon {
        let reporting = if balloon.free_page_reporting { "on" } else { "off" };
        add(
            "-device",
            format!("virtio-balloon-pci,id=balloon0,free-page-reporting={reporting}"),
        );
    }
    match config.serial.mode.as_str() {
        "Tty" => {
            add("-chardev", "stdio,id=tty0,signal=off".into());
            add("-serial", "chardev:tty0".into());
        }
        _ => add("-serial", "null".into()),
    }
    add("-chardev", format!("socket,id=qmp0,fd={}", qmp.as_raw_fd()));
    add("-mon", "chardev=qmp0,mode=control".into());
    if entry == Entry::Incoming {
        add("-incoming", "defer".into());
    }
    words.extend(["-nodefaults", "-no-user-config"].map(String::from));
    Ok(words)
}

//! The VM's states and what the API may do in each, answered as cloud-hypervisor answers.
//!
//! ```text
//! Absent --create*--> Created --boot--> Running <--pause/resume--> Paused        (* only at start, by command line)
//!    ^                   ^                 |                          |
//!    +------delete-------+----shutdown-----+-----------shutdown-------+         snapshot: Paused only
//! ```
//!
//! Holds: QEMU is started on the main thread only, because the parent-death signal watches the thread that forks. The
//! end of a QEMU that nobody asked to end is the end of this process.

use std::fs::{self, File, OpenOptions};
use std::io::Seek;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::config::VmConfig;
use crate::events::Events;
use crate::holes;
use crate::options::{Restore, Start, file_url};
use crate::qemu::{Entry, Qemu};

/// Version of the real one whose interface this is.
const VERSION: &str = "53.0.0";
/// Where a test says that it is to be another one.
const OTHER_VERSION: &str = "/usr/share/roost-tests/standin-version";
/// Names of a snapshot's files.
const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory-ranges";

/// Why the API says no.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// There is no VM, not even a configuration of one.
    NotCreated,
    /// The request's body.
    BadRequest(String),
    /// The VM's state does not allow it, or it failed.
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

/// The VMM: at most one VM.
pub(crate) struct Vmm {
    vm: Mutex<Vm>,
    events: Arc<Events>,
    work: Sender<Work>,
    /// The next reset is one of ours, not the guest's.
    resets: Arc<AtomicBool>,
}

/// How long a guest may run without reading from its disk; one of six that boot at once on a slow machine reaches it in a minute.
const BOOT_PATIENCE: Duration = Duration::from_secs(100);
/// How long a VM that was restored on demand takes to load, once it can run.
const LOADING: Duration = Duration::from_secs(30);
/// How often a guest is started over.
const MAX_RESETS: u32 = 2;

/// For the main thread.
enum Work {
    Boot(Sender<Result<()>>),
    QemuEnded { launch: u64, status: ExitStatus },
    Stop,
}

enum Vm {
    Absent,
    Created(Box<VmConfig>),
    Live(Live),
}

struct Live {
    config: Box<VmConfig>,
    qemu: Qemu,
    /// Tells this QEMU from an earlier one.
    launch: u64,
    gone: Receiver<ExitStatus>,
    state: State,
    /// Restored on demand: until then it is still loading, which is to say that a snapshot misses what the real one would not have yet.
    /// QEMU has loaded all of it by the time it can run.
    loading_until: Option<Instant>,
    /// Memory as it was saved since the VM was paused. QEMU saves a stopped guest only once; the guest has not run since, so
    /// a second snapshot is a copy.
    saved: Option<File>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Paused,
}

/// The main thread's part of a [`Vmm`].
pub(crate) struct Driver {
    work: Receiver<Work>,
    start: Option<Start>,
    launches: u64,
}

/// The version that it says it is.
pub(crate) fn version() -> String {
    let other = fs::read_to_string(OTHER_VERSION);
    let version = other.as_deref().map_or(VERSION, str::trim);
    format!("{version}-standin")
}

impl Vmm {
    /// A VMM and the part of it that must stay on the main thread.
    pub(crate) fn new(start: Start, events: Events) -> (Arc<Self>, Driver) {
        let (sender, work) = mpsc::channel();
        let vmm = Self {
            vm: Mutex::new(Vm::Absent),
            events: Arc::new(events),
            work: sender,
            resets: Arc::default(),
        };
        (
            Arc::new(vmm),
            Driver {
                work,
                start: Some(start),
                launches: 0,
            },
        )
    }

    /// `vmm.ping`.
    pub(crate) fn ping(&self) -> Value {
        json!({
            "build_version": format!("v{}", version()),
            "version": version(),
            "pid": std::process::id(),
            "features": ["kvm", "standin"],
        })
    }

    /// `vm.info`.
    pub(crate) fn info(&self) -> Result<Value, Refusal> {
        let vm = self.lock();
        let (config, state) = match &*vm {
            Vm::Absent => return Err(Refusal::NotCreated),
            Vm::Created(config) => (config, "Created"),
            Vm::Live(Live {
                config,
                state: State::Running,
                ..
            }) => (config, "Running"),
            Vm::Live(Live {
                config,
                state: State::Paused,
                ..
            }) => (config, "Paused"),
        };
        let balloon = config.balloon.as_ref().map_or(0, |balloon| balloon.size);
        let memory = config.memory.size.saturating_sub(balloon);
        Ok(json!({ "config": config, "state": state, "memory_actual_size": memory, "device_tree": null }))
    }

    /// `vm.counters`: the disk's, as QEMU counts them.
    pub(crate) fn counters(&self) -> Result<Value, Refusal> {
        let mut vm = self.lock();
        let live = live(&mut vm)?;
        let stats = live.qemu.run("query-blockstats", json!({ "query-nodes": false }))?;
        let of = |name: &str| stats.pointer(&format!("/0/stats/{name}")).cloned().unwrap_or(json!(0));
        Ok(json!({ "rootfs": {
            "read_bytes": of("rd_bytes"), "read_ops": of("rd_operations"),
            "write_bytes": of("wr_bytes"), "write_ops": of("wr_operations"),
        } }))
    }

    /// Emulated virtualisation inside emulation loses a guest kernel now and then: it spins before it has read a block. Such a
    /// guest is started over, which is said aloud; it is this machine's fault and nobody's who is tested on it.
    fn reset_if_lost(&self) -> bool {
        let unread = self
            .counters()
            .is_ok_and(|counters| counters.pointer("/rootfs/read_ops") == Some(&json!(0)));
        let mut vm = self.lock();
        let Ok(live) = live(&mut vm) else { return false };
        if !unread || live.state != State::Running {
            return false;
        }
        self.resets.store(true, Ordering::SeqCst);
        let reset = live.qemu.run("system_reset", json!({}));
        eprintln!("standin-vmm: the guest has read nothing from its disk in {BOOT_PATIENCE:?} and is reset: {reset:?}");
        reset.is_ok()
    }

    /// `vm.boot`.
    pub(crate) fn boot(&self) -> Result<(), Refusal> {
        let (reply, answer) = mpsc::channel();
        self.work
            .send(Work::Boot(reply))
            .map_err(|_| anyhow!("the VMM is ending"))?;
        match &*self.lock() {
            Vm::Absent => return Err(Refusal::NotCreated),
            Vm::Created(_) | Vm::Live(_) => {}
        }
        Ok(answer.recv().map_err(|_| anyhow!("the VMM is ending"))??)
    }

    /// `vm.pause`.
    pub(crate) fn pause(&self) -> Result<(), Refusal> {
        self.switch(State::Running, State::Paused, "stop", ["pausing", "paused"])
    }

    /// `vm.resume`.
    pub(crate) fn resume(&self) -> Result<(), Refusal> {
        self.switch(State::Paused, State::Running, "cont", ["resuming", "resumed"])
    }

    /// `vm.snapshot`: the directory exists and is empty.
    pub(crate) fn snapshot(&self, body: &Value) -> Result<(), Refusal> {
        let url = body.get("destination_url").and_then(Value::as_str);
        let url = url.ok_or_else(|| Refusal::BadRequest("missing field `destination_url`".to_owned()))?;
        let directory = file_url(url)?;
        let mut vm = self.lock();
        let live = live(&mut vm)?;
        if live.state != State::Paused {
            // As the real one judges: first this, then whether it is paused. It refuses the first of a paused one too, since version 53;
            // here that is written as the versions before did, with holes, to see that nobody asks for it.
            let why = match live.still_to_load() {
                Some(_) => "VM on-demand memory restore is still in progress",
                None => "Trying to snapshot while VM is running",
            };
            return Err(anyhow!(why).context("The VM could not be snapshotted").into());
        }
        self.events.send("vm", "snapshotting");
        live.save(&directory)?;
        self.events.send("vm", "snapshotted");
        Ok(())
    }

    /// `vm.shutdown`: the VM is gone, its configuration stays.
    pub(crate) fn shutdown(&self) -> Result<(), Refusal> {
        let mut vm = self.lock();
        match std::mem::replace(&mut *vm, Vm::Absent) {
            Vm::Live(live) => {
                *vm = Vm::Created(live.end());
                self.events.send("vm", "shutdown");
                Ok(())
            }
            other => {
                *vm = other;
                Err(anyhow!("the VM is not running").into())
            }
        }
    }

    /// `vm.delete`; also what is left of `vmm.shutdown` before the process ends.
    pub(crate) fn delete(&self) {
        let mut vm = self.lock();
        match std::mem::replace(&mut *vm, Vm::Absent) {
            Vm::Absent => return,
            Vm::Created(_) => {}
            Vm::Live(live) => {
                live.end();
                self.events.send("vm", "shutdown");
            }
        }
        self.events.send("vm", "deleted");
    }

    /// Ends the process once the main thread gets to it.
    pub(crate) fn stop(&self) {
        // The main thread has gone already: then the process is ending anyway.
        self.work.send(Work::Stop).ok();
    }

    fn switch(&self, from: State, to: State, command: &str, events: [&str; 2]) -> Result<(), Refusal> {
        let mut vm = self.lock();
        let live = live(&mut vm)?;
        if live.state != from {
            return Err(anyhow!("the VM's state does not allow {command:?}").into());
        }
        self.events.send("vm", events[0]);
        live.qemu.run(command, json!({}))?;
        live.state = to;
        live.saved = None;
        self.events.send("vm", events[1]);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vm> {
        self.vm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver {
    /// Starts the VM and serves what needs the main thread, until the VMM is to end.
    pub(crate) fn run(mut self, vmm: &Vmm) -> Result<()> {
        vmm.events.send("vmm", "starting");
        match self.start.take() {
            Some(Start::Boot(config)) => {
                *vmm.lock() = Vm::Created(config);
                self.boot(vmm)?;
            }
            Some(Start::Restore(restore)) => self.restore(vmm, &restore).context("cannot restore")?,
            None => {}
        }
        let mut resets = 0;
        loop {
            let work = match self.work.recv_timeout(BOOT_PATIENCE) {
                Ok(work) => work,
                Err(RecvTimeoutError::Timeout) => {
                    if resets < MAX_RESETS && vmm.reset_if_lost() {
                        resets += 1;
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => bail!("nobody is left to give work"),
            };
            match work {
                Work::Boot(reply) => {
                    // Whoever asked may have hung up.
                    reply.send(self.boot(vmm)).ok();
                }
                Work::QemuEnded { launch, status } => {
                    let ours = matches!(&*vmm.lock(), Vm::Live(live) if live.launch == launch);
                    if ours {
                        *vmm.lock() = Vm::Absent;
                        vmm.events.send("vm", "shutdown");
                        vmm.events.send("vmm", "shutdown");
                        ensure!(status.success(), "QEMU ended: {status}");
                        return Ok(());
                    }
                }
                Work::Stop => {
                    vmm.events.send("vmm", "shutdown");
                    return Ok(());
                }
            }
        }
    }

    fn boot(&mut self, vmm: &Vmm) -> Result<()> {
        let mut vm = vmm.lock();
        let config = match &*vm {
            Vm::Created(config) => config.clone(),
            Vm::Absent => bail!("the VM is not created"),
            Vm::Live(_) => bail!("the VM is already booted"),
        };
        vmm.events.send("vm", "booting");
        *vm = Vm::Live(self.launch(vmm, config, Entry::Boot)?);
        vmm.events.send("vm", "booted");
        Ok(())
    }

    fn restore(&mut self, vmm: &Vmm, restore: &Restore) -> Result<()> {
        vmm.events.send("vm", "restoring");
        let read = |name: &str| fs::read(restore.source.join(name)).with_context(|| format!("cannot read {name}"));
        let mut config: VmConfig = serde_json::from_slice(&read(CONFIG)?).context("config.json")?;
        let state: Value = serde_json::from_slice(&read(STATE)?).context("state.json")?;
        ensure!(
            state.get("standin").is_some(),
            "state.json was not written by the stand-in"
        );
        for net in &mut config.net {
            let fd = net.id.as_ref().and_then(|id| restore.net_fds.get(id));
            net.fds = Some(vec![*fd.ok_or_else(|| anyhow!("no net_fds for {:?}", net.id))?]);
        }
        let mut vm = vmm.lock();
        let mut live = self.launch(vmm, Box::new(config), Entry::Incoming)?;
        live.state = State::Paused;
        live.qemu
            .load(&File::open(restore.source.join(MEMORY)).context("cannot open memory-ranges")?)?;
        live.loading_until = restore.on_demand.then(|| Instant::now() + LOADING);
        vmm.events.send("vm", "restored");
        if restore.resume {
            live.qemu.run("cont", json!({}))?;
            live.state = State::Running;
            vmm.events.send("vm", "resumed");
        }
        *vm = Vm::Live(live);
        Ok(())
    }

    fn launch(&mut self, vmm: &Vmm, config: Box<VmConfig>, entry: Entry) -> Result<Live> {
        let tap = config.net.iter().find_map(|net| net.fds.as_ref()?.first().copied());
        let tap = tap.ok_or_else(|| anyhow!("the network device has no descriptor"))?;
        let (events, ours) = (Arc::clone(&vmm.events), Arc::clone(&vmm.resets));
        let (qemu, mut child) = Qemu::spawn(&config, tap, entry, move |event, data| {
            if event == "RESET" {
                // As the real one, which boots a guest anew in place; not for a reset of ours, nor for the one of a restore.
                let is_ours = ours.swap(false, Ordering::SeqCst);
                if data["guest"] == true && !is_ours {
                    events.send("vm", "rebooting");
                }
                events.send("vm", "rebooted");
            }
        })?;
        self.launches += 1;
        let launch = self.launches;
        let (sender, gone) = mpsc::channel();
        let work = vmm.work.clone();
        thread::Builder::new().name("reaper".to_owned()).spawn(move || {
            let status = child.wait().expect("QEMU is our child and nobody else waits for it");
            // Either receiver may have ended first.
            sender.send(status).ok();
            work.send(Work::QemuEnded { launch, status }).ok();
        })?;
        Ok(Live {
            config,
            qemu,
            launch,
            gone,
            state: State::Running,
            loading_until: None,
            saved: None,
        })
    }
}

impl Live {
    /// How long the rest of its memory takes to be loaded.
    fn still_to_load(&self) -> Option<Duration> {
        let left = self.loading_until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    fn save(&mut self, directory: &Path) -> Result<()> {
        let create = |name: &str| {
            let path = directory.join(name);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o600);
            options
                .open(&path)
                .with_context(|| format!("cannot make {}", path.display()))
        };
        serde_json::to_writer(create(CONFIG)?, &self.config)?;
        serde_json::to_writer(create(STATE)?, &json!({ "standin": VERSION }))?;
        let mut memory = create(MEMORY)?;
        match &mut self.saved {
            Some(saved) => {
                saved.rewind()?;
                std::io::copy(saved, &mut memory)
                    .map(drop)
                    .context("cannot copy the memory saved before")
            }
            None => {
                self.qemu.save(&memory)?;
                if let Some(left) = self.still_to_load() {
                    let [left, all] = [left, LOADING].map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
                    let lost = holes::lose(&memory, all - left, all)?;
                    eprintln!("standin-vmm: {lost} pages are not in the snapshot: they had not been loaded");
                }
                self.saved = Some(memory);
                Ok(())
            }
        }
    }

    /// Ends QEMU and waits until it has: then disk and tap are free.
    fn end(self) -> Box<VmConfig> {
        // A QEMU that has just gone cannot answer; what counts is that it goes.
        self.qemu.run("quit", json!({})).ok();
        self.gone.recv().ok();
        self.config
    }
}

fn live(vm: &mut Vm) -> Result<&mut Live, Refusal> {
    match vm {
        Vm::Absent | Vm::Created(_) => Err(anyhow!("the VM is not running").into()),
        Vm::Live(live) => Ok(live),
    }
}

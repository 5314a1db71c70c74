//! The rig: a throw-away Debian host in QEMU that runs one command as root and is gone.
//!
//! ```text
//! vda  host root      cached, behind a throw-away overlay
//! vdb  /var/lib/roost cached guest image in place, behind a throw-away overlay; in a series of boots a file of the run's own
//! vdc  this run       binaries, units, --add files, the command; made anew for each run
//! rig.out, rig.ctl, rig.log: virtio-serial ports on socket pairs (output, progress, journal)
//! ```
//!
//! Holds: QEMU dies with us (PDEATHSIG), and nothing but `target/rig` is written outside. The emulated CPU is the default
//! even where /dev/kvm exists, since nested KVM is often a software one; `RIG_ACCEL=kvm` chooses the real thing.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::binaries::{self, Binaries};
use crate::qemu::{self, Qemu};
use crate::step::quiet;
use crate::{cache, guest, host, kernel, package, setup};

/// Our exit status when the rig, not the command in it, failed.
pub(crate) const STATUS_RIG_FAILED: u8 = 125;
/// Our exit status when the time was up.
pub(crate) const STATUS_TIMEOUT: u8 = 124;

/// How long after QEMU's start the host may take to be up; ten seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long a rig may take to shut down, for which it pauses what runs.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(300);
/// How long a rig that is up may not say that it runs; it says so every five seconds.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// `--timeout` and `--memory` where none is given.
const DEFAULT_SECONDS: u64 = 900;
const DEFAULT_MEMORY_MB: u64 = 4096;
/// `--processors` where none is given.
pub(crate) const DEFAULT_PROCESSORS: u8 = 2;
/// How much of the command's output is kept for whoever asked for the run.
const KEPT_OUTPUT: usize = 256 << 10;
/// How many runs' logs are kept.
const KEPT_RUNS: usize = 10;

/// What of a run's files goes with it.
const BULKY: [&str; 3] = ["payload", "payload.ext4", "data.ext4"];

const RUN: &str = include_str!("../rig/run.sh");
const PREPARE: &str = include_str!("../rig/prepare.sh");
const UNIT: &str = include_str!("../rig/rig.service");

/// Arguments of `cargo xtask rig`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Put a file or folder into the rig, at DEST or in /root under its own name
    #[arg(long, value_name = "PATH[:DEST]")]
    pub(crate) add: Vec<String>,
    /// Set an environment variable for the command (ROOST_*, RUST_LOG and RUST_BACKTRACE of ours are passed on anyway)
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// Give up after this many seconds, counted from the start of QEMU
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_SECONDS)]
    pub(crate) timeout: u64,
    /// The rig's memory
    #[arg(long, value_name = "MB", default_value_t = DEFAULT_MEMORY_MB)]
    pub(crate) memory: u64,
    /// The rig's processors
    #[arg(long, value_name = "N", default_value_t = DEFAULT_PROCESSORS)]
    pub(crate) processors: u8,
    /// Start the daemons without systemd: agent as user roost, shims as its children
    #[arg(long, conflicts_with = "bare")]
    pub(crate) direct: bool,
    /// No build and no daemons: just the host
    #[arg(long)]
    pub(crate) bare: bool,
    /// With --bare: install this build and the guest image all the same, but start nothing
    #[arg(long, requires = "bare")]
    pub(crate) installed: bool,
    /// With --bare: put this build's packages into /root/packages, and what belongs to none of them in place; install nothing
    #[arg(long, requires = "bare", conflicts_with = "installed")]
    pub(crate) packages: bool,
    /// Whether what is written to /var/lib/roost outlives QEMU, and the command may ask for another boot (see [`crate::series`])
    #[arg(skip)]
    pub(crate) series: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

impl Options {
    /// Defaults for running a command.
    pub(crate) fn command(words: &[&str]) -> Self {
        Self {
            add: Vec::new(),
            env: Vec::new(),
            timeout: DEFAULT_SECONDS,
            memory: DEFAULT_MEMORY_MB,
            processors: DEFAULT_PROCESSORS,
            direct: false,
            bare: false,
            installed: false,
            packages: false,
            series: false,
            command: words.iter().map(|word| (*word).to_owned()).collect(),
        }
    }
}

/// How a boot ended.
pub(crate) enum Boot {
    /// With its command.
    Ended(End),
    /// As the command wanted it, for the next boot: QEMU was killed, or the host has shut down. Which, and when.
    Cut(String),
    /// The emulated virtualisation brought down the rig's own kernel, or it hangs. The last of the command's output.
    Crashed(Vec<u8>),
}

/// How a run ended.
pub(crate) struct End {
    /// The command's exit status.
    pub(crate) status: u8,
    /// The last of its output.
    pub(crate) tail: Vec<u8>,
}

/// Builds what is missing, boots the rig, runs the command; the command's exit status.
pub(crate) fn run(options: &Options) -> Result<u8> {
    setup::run()?;
    let wanted = !options.bare || options.installed || options.packages;
    let binaries = if wanted { Some(binaries::build()?) } else { None };
    run_with(options, binaries.as_ref()).map(|end| end.status)
}

/// [`run`] with binaries that are built already.
pub(crate) fn run_with(options: &Options, binaries: Option<&Binaries>) -> Result<End> {
    match boot_once(options, binaries)? {
        Boot::Ended(end) => Ok(end),
        Boot::Crashed(_) => bail!("the rig's own kernel crashed or hung"),
        Boot::Cut(moment) => Err(no_series(&moment)),
    }
}

/// The error of a power cut or shutdown that was asked for where none is to be.
pub(crate) fn no_series(moment: &str) -> anyhow::Error {
    anyhow!("the command asked for another boot ({moment}), and this is no series of boots")
}

/// As [`run_with`], for whoever can go on after a crash.
pub(crate) fn boot_once(options: &Options, binaries: Option<&Binaries>) -> Result<Boot> {
    Machine::prepare(options, binaries)?.boot()
}

/// `target/rig/runs/<pid>`, or `<pid>-<n>` where one process has several: the logs stay, the rest goes with the value.
struct RunDir {
    path: PathBuf,
}

impl RunDir {
    fn new() -> Result<Self> {
        let runs = cache::dir()?.join("runs");
        fs::create_dir_all(&runs)?;
        tidy(&runs)?;
        let pid = std::process::id();
        let names = std::iter::once(pid.to_string()).chain((2..).map(|number| format!("{pid}-{number}")));
        let path = names
            .map(|name| runs.join(name))
            .find(|path| !path.exists())
            .expect("the numbers do not end");
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        // For people: the latest run's logs under fixed names.
        for log in ["console.log", "journal.log"] {
            let link = cache::dir()?.join(log);
            cache::remove(&link)?;
            std::os::unix::fs::symlink(path.join(log), link)?;
        }
        Ok(Self { path })
    }

    fn log(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        for bulky in BULKY {
            if let Err(error) = cache::remove(&self.path.join(bulky)) {
                eprintln!("rig: {error:#}");
            }
        }
    }
}

/// Removes the logs of all but the last runs, and what a killed run left.
fn tidy(runs: &Path) -> Result<()> {
    let mut finished = Vec::new();
    for entry in fs::read_dir(runs)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.split('-').next().unwrap_or_default();
        if Path::new("/proc").join(pid).exists() {
            continue;
        }
        for bulky in BULKY {
            cache::remove(&entry.path().join(bulky))?;
        }
        finished.push((entry.metadata()?.modified()?, entry.path()));
    }
    finished.sort();
    let surplus = finished.len().saturating_sub(KEPT_RUNS);
    finished[..surplus].iter().try_for_each(|(_, path)| cache::remove(path))
}

/// Makes the disk that carries this run's files.
fn write_payload(dir: &Path, image: &Path, options: &Options, binaries: Option<&Binaries>) -> Result<()> {
    let overlay = dir.join("overlay");
    fs::create_dir_all(&overlay)?;
    install(&overlay, "etc/systemd/system/rig.service", UNIT.as_bytes(), 0o644)?;
    let wants = overlay.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    std::os::unix::fs::symlink("../rig.service", wants.join("rig.service"))?;
    match binaries {
        Some(binaries) if options.packages => {
            binaries.install_vmm(&overlay, "usr/share/roost-tests/vmmshim.env")?;
            let packages = overlay.join("root/packages");
            fs::create_dir_all(packages.parent().expect("a path below the overlay has a parent"))?;
            quiet(
                Command::new("cp")
                    .arg("-r")
                    .arg(package::for_rig(binaries)?.dir())
                    .arg(packages),
            )?;
        }
        Some(binaries) => binaries.install(&overlay)?,
        None => {}
    }
    for add in &options.add {
        let (from, to) = match add.rsplit_once(':') {
            Some((from, to)) => (Path::new(from), to.trim_start_matches('/').to_owned()),
            None => {
                let name = Path::new(add).canonicalize().ok();
                let name = name
                    .as_ref()
                    .and_then(|path| path.file_name())
                    .and_then(|name| name.to_str());
                (
                    Path::new(add),
                    format!("root/{}", name.ok_or_else(|| anyhow!("--add {add}: no such file"))?),
                )
            }
        };
        ensure!(from.exists(), "--add {}: no such file", from.display());
        let to = overlay.join(to);
        fs::create_dir_all(to.parent().expect("a path below the overlay has a parent"))?;
        quiet(
            Command::new("cp")
                .args(["-rL", "--no-preserve=ownership", "--preserve=mode"])
                .arg(from)
                .arg(to),
        )?;
    }
    // A tar file, so that all of it belongs to root inside whoever made it outside.
    let tar = dir.join("overlay.tar");
    quiet(
        Command::new("tar")
            .args(["--owner=0", "--group=0", "--numeric-owner", "-cf"])
            .arg(&tar)
            .arg("-C")
            .arg(&overlay)
            .arg("."),
    )?;
    cache::remove(&overlay)?;
    fs::write(dir.join("run.sh"), RUN)?;
    fs::write(dir.join("prepare.sh"), PREPARE)?;
    fs::write(dir.join("command"), quoted(&options.command))?;
    fs::write(dir.join("settings"), settings(options))?;
    let bytes = fs::metadata(&tar)?.len();
    let mib = bytes / (1 << 20) + bytes / (10 << 20) + 16;
    cache::remove(image)?;
    quiet(
        Command::new("/sbin/mke2fs")
            .args([
                "-q",
                "-F",
                "-t",
                "ext4",
                "-O",
                "^has_journal",
                "-b",
                "4096",
                "-N",
                "64",
                "-d",
            ])
            .arg(dir)
            .arg(image)
            .arg(format!("{mib}M")),
    )?;
    cache::remove(dir)
}

/// Writes one file into a tree, with its mode whatever our umask is.
pub(crate) fn install(tree: &Path, to: &str, data: &[u8], mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let path = tree.join(to);
    fs::create_dir_all(path.parent().expect("a path below the tree has a parent"))?;
    fs::write(&path, data).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn settings(options: &Options) -> String {
    let mode = match (options.bare, options.direct) {
        (true, _) => "bare",
        (false, true) => "direct",
        (false, false) => "systemd",
    };
    let passed_on = std::env::vars()
        .filter(|(name, _)| name.starts_with("ROOST_") || name == "RUST_LOG" || name == "RUST_BACKTRACE");
    let env: Vec<String> = passed_on
        .map(|(name, value)| format!("{name}={value}"))
        .chain(options.env.iter().cloned())
        .collect();
    format!(
        "RIG_MODE={mode}\nRIG_TIMEOUT={}\nRIG_SERIES={}\nRIG_ENV=({})\n",
        options.timeout,
        u8::from(options.series),
        quoted(&env)
    )
}

/// Words for a shell.
fn quoted(words: &[String]) -> String {
    words
        .iter()
        .map(|word| format!("'{}'", word.replace('\'', r"'\''")))
        .collect::<Vec<_>>()
        .join(" ")
}

/// All that one boot needs, and the next one of the same series.
pub(crate) struct Machine {
    options: Options,
    qemu: Qemu,
    kernel: PathBuf,
    host: host::Host,
    data: Data,
    payload: PathBuf,
    run: RunDir,
}

/// What is behind /var/lib/roost.
enum Data {
    /// A cached file, with an overlay that goes with QEMU.
    ThrowAway(PathBuf),
    /// The run's own copy of it: what a boot has written is there in the next one. QEMU heeds flushes, so what the rig believes to be
    /// on disk is; what its kernel had not written yet is lost with QEMU.
    Kept(PathBuf),
}

/// How a command's run came to its end.
enum Verdict {
    Exit(u8),
    Cut(String),
    /// The rig's kernel runs nothing any more.
    Silent,
}

impl Machine {
    /// Makes what is missing of the rig's parts, and the run's directory.
    pub(crate) fn prepare(options: &Options, binaries: Option<&Binaries>) -> Result<Self> {
        let lock = cache::lock()?;
        let qemu = qemu::ensure()?;
        let kernel = kernel::ensure()?;
        let host = host::ensure(&kernel)?;
        let cached = match binaries {
            Some(binaries) => guest::state_disk(&guest::ensure(&kernel, &binaries.envd)?)?,
            None => guest::empty_state_disk()?,
        };
        let run = RunDir::new()?;
        let data = if options.series {
            let own = run.path.join("data.ext4");
            let mut copy = Command::new("cp");
            quiet(copy.args(["--reflink=auto", "--sparse=always"]).arg(&cached).arg(&own))?;
            Data::Kept(own)
        } else {
            Data::ThrowAway(cached)
        };
        let payload = run.path.join("payload.ext4");
        write_payload(&run.path.join("payload"), &payload, options, binaries)?;
        drop(lock);
        Ok(Self {
            options: options.clone(),
            qemu,
            kernel: kernel.vmlinux(),
            host,
            data,
            payload,
            run,
        })
    }

    /// Gives the console's log of the last boot a name of its own.
    pub(crate) fn keep_console(&self, name: &str) -> Result<()> {
        let path = self.run.log("console.log");
        fs::rename(&path, self.run.log(&format!("{name}-console.log")))
            .with_context(|| format!("cannot rename {}", path.display()))
    }

    /// Boots it, and follows its command to the end.
    pub(crate) fn boot(&self) -> Result<Boot> {
        let start = Instant::now();
        let (out, out_there) = port()?;
        let (ctl, ctl_there) = port()?;
        let (log, log_there) = port()?;
        let (monitor, monitor_there) = port()?;
        let ports = [
            ("rig.out", &out_there),
            ("rig.ctl", &ctl_there),
            ("rig.log", &log_there),
        ];
        let mut qemu = self.spawn(&ports, &monitor_there)?;
        drop((out_there, ctl_there, log_there, monitor_there));
        let output = thread::spawn(move || copy_live(out, Timed::new(std::io::stdout())));
        let journal = File::create(self.run.log("journal.log")).context("cannot write journal.log")?;
        let journal = thread::spawn(move || copy_live(log, journal));
        let (sender, news) = mpsc::channel();
        thread::spawn(move || {
            for_each_line(ctl, |line| sender.send(line).is_ok());
            // The port closes with QEMU; the receiver sees the channel's end.
        });
        let verdict = self.follow(&mut qemu, &news, start);
        if matches!(verdict, Ok(Verdict::Silent)) {
            self.ask_for_state(monitor);
        }
        // Nobody needs a clean shutdown of what is thrown away; where something is kept this is what is being tested.
        qemu.kill().ok();
        qemu.wait().context("cannot wait for QEMU")?;
        let copied = output.join().map_err(|_| anyhow!("the output thread panicked"))?;
        journal.join().map_err(|_| anyhow!("the journal thread panicked"))?.ok();
        let tail = copied.context("cannot pass on the command's output")?;
        if verdict.is_err() && self.has_crashed() {
            return Ok(Boot::Crashed(tail));
        }
        Ok(match verdict? {
            Verdict::Exit(status) => Boot::Ended(End { status, tail }),
            Verdict::Cut(moment) => Boot::Cut(moment),
            Verdict::Silent => Boot::Crashed(tail),
        })
    }

    fn spawn(&self, ports: &[(&str, &OwnedFd)], monitor: &OwnedFd) -> Result<Child> {
        let kvm = match std::env::var("RIG_ACCEL").as_deref() {
            Ok("kvm") => true,
            Ok("tcg" | "") | Err(_) => false,
            Ok(other) => bail!("RIG_ACCEL={other}: tcg or kvm"),
        };
        // setpriv: QEMU gets SIGKILL when this thread, our main one, ends for whatever reason.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).args(self.qemu.words());
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-smp",
            &self.options.processors.to_string(),
        ]);
        match kvm {
            true => command.args(["-accel", "kvm", "-cpu", "host"]),
            // One level of page tables less, for the guest's and our speed. A processor that says that it copies strings fast is copied
            // with byte by byte, which is the slowest that an emulated one can do.
            false => command.args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off,erms=off,fsrm=off"]),
        };
        command.args(["-m", &format!("{}M", self.options.memory)]);
        command
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.host.initramfs);
        // The tsc ones: otherwise the clock in the rig is a system call that a VMM's own filters kill.
        let mut words =
            "console=ttyS0 panic=-1 quiet tsc=reliable clocksource=tsc mitigations=off random.trust_cpu=on \
                         unknown_nmi_panic panic_print=0x40 systemd.show_status=false net.ifnames=0"
                .to_owned();
        if let Some(frequency) = qemu::tsc_khz() {
            words += &format!(" tsc_early_khz={frequency}");
        }
        command.args(["-append", &words]);
        command
            .arg("-serial")
            .arg(format!("file:{}", self.run.log("console.log").display()));
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        for (name, end) in ports {
            command
                .arg("-chardev")
                .arg(format!("socket,id={name},fd={}", end.as_raw_fd()));
            command
                .arg("-device")
                .arg(format!("virtserialport,chardev={name},name={name}"));
        }
        command
            .arg("-chardev")
            .arg(format!("socket,id=monitor,fd={}", monitor.as_raw_fd()));
        command.args(["-object", "monitor-hmp,id=hmp,chardev=monitor,readline=on"]);
        let throw_away = "snapshot=on,cache=unsafe,discard=unmap,detect-zeroes=unmap";
        let (data, how) = match &self.data {
            Data::ThrowAway(file) => (file, throw_away),
            Data::Kept(file) => (file, "cache=writeback,discard=unmap"),
        };
        for (name, file, how) in [
            ("root", &self.host.root, throw_away),
            ("state", data, how),
            ("run", &self.payload, throw_away),
        ] {
            let file = file.display().to_string().replace(',', ",,");
            command
                .arg("-drive")
                .arg(format!("id={name},file={file},format=raw,if=none,{how}"));
            command.arg("-device").arg(format!("virtio-blk-pci,drive={name}"));
        }
        command
            .stdin(Stdio::null())
            .stdout(std::io::stderr())
            .spawn()
            .context("cannot start QEMU")
    }

    /// Waits for the command's end, the end of QEMU or of our patience.
    fn follow(&self, qemu: &mut Child, news: &mpsc::Receiver<String>, start: Instant) -> Result<Verdict> {
        let deadline = start + Duration::from_secs(self.options.timeout);
        let mut up = false;
        loop {
            let silence = Instant::now() + SILENCE_LIMIT;
            let limit = deadline.min(if up { silence } else { start + BOOT_LIMIT });
            let line = match news.recv_timeout(limit.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = wait_until(qemu, limit)?;
                    self.show_console();
                    match ended {
                        Some(status) => bail!("QEMU ended before the command did: {status}"),
                        None => bail!("the rig closed its line to us, but QEMU did not end"),
                    }
                }
                Err(RecvTimeoutError::Timeout) if up && limit < deadline => {
                    eprintln!(
                        "rig: nothing runs in it any more ({:.0} s)",
                        start.elapsed().as_secs_f64()
                    );
                    return Ok(Verdict::Silent);
                }
                Err(RecvTimeoutError::Timeout) if up => {
                    eprintln!("rig: timed out after {} s", self.options.timeout);
                    return Ok(Verdict::Exit(STATUS_TIMEOUT));
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.show_console();
                    bail!("the rig did not come up in {:.0} s", start.elapsed().as_secs_f64());
                }
            };
            let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
            let seconds = start.elapsed().as_secs_f64();
            match word {
                "up" => {
                    up = true;
                    eprintln!("rig: host up after {seconds:.1} s");
                }
                "alive" => {}
                "run" => eprintln!("rig: command starts after {seconds:.1} s"),
                "step" | "note" => eprintln!("rig: {rest} ({seconds:.1} s)"),
                "timeout" => {
                    eprintln!(
                        "rig: timed out after {seconds:.0} s; journal: {}",
                        self.run.log("journal.log").display()
                    );
                    return Ok(Verdict::Exit(STATUS_TIMEOUT));
                }
                "exit" => {
                    let status: u8 = rest
                        .parse()
                        .with_context(|| format!("the rig reports status {rest:?}"))?;
                    eprintln!("rig: command ended with status {status} after {seconds:.1} s");
                    if status != 0 {
                        eprintln!("rig: journal: {}", self.run.log("journal.log").display());
                    }
                    return Ok(Verdict::Exit(status));
                }
                // At once: every word here would be time for the rig to go on.
                "cut" => return Ok(Verdict::Cut(format!("power cut: {rest}"))),
                // What its units say on their way down is not for us.
                "off" => return self.see_off(qemu).map(|()| Verdict::Cut(format!("shutdown: {rest}"))),
                "failed" => bail!("{rest}; journal: {}", self.run.log("journal.log").display()),
                _ => eprintln!("rig: {line}"),
            }
        }
    }

    /// Waits for the end of a rig that shuts down.
    fn see_off(&self, qemu: &mut Child) -> Result<()> {
        let Some(status) = wait_until(qemu, Instant::now() + SHUTDOWN_LIMIT)? else {
            self.show_console();
            bail!("the rig did not shut down in {} s", SHUTDOWN_LIMIT.as_secs());
        };
        ensure!(status.success(), "QEMU ended at the rig's shutdown: {status}");
        Ok(())
    }

    /// Whether the rig's kernel has panicked while it ran a guest. An emulated processor loses a register there, once in many thousands
    /// of guests' exits; what of ours could do so would do it elsewhere too.
    fn has_crashed(&self) -> bool {
        let text = fs::read(self.run.log("console.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.contains("Kernel panic - not syncing") && text.contains("kvm_arch_vcpu_ioctl_run")
    }

    /// Keeps where the processors of a rig that runs nothing are: their registers, then what its kernel says of itself on its console.
    fn ask_for_state(&self, mut monitor: UnixStream) {
        let path = self.run.log("monitor.log");
        let mut ask = || -> std::io::Result<()> {
            let mut log = File::create(&path)?;
            monitor.set_read_timeout(Some(Duration::from_secs(2)))?;
            for command in ["info registers -a", "info registers -a", "nmi"] {
                monitor.write_all(format!("{command}\n").as_bytes())?;
                // Until it has nothing more to say.
                std::io::copy(&mut monitor, &mut log).ok();
            }
            // The kernel panics over it, and a console is slow.
            thread::sleep(Duration::from_secs(15));
            Ok(())
        };
        if let Err(error) = ask() {
            eprintln!("rig: cannot ask QEMU's monitor: {error}");
        }
        eprintln!("rig: its registers: {}", path.display());
        self.show_console();
    }

    fn show_console(&self) {
        let path = self.run.log("console.log");
        let text = fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        eprintln!("rig: last lines of {}:", path.display());
        for line in &lines[lines.len().saturating_sub(60)..] {
            eprintln!("  {line}");
        }
    }
}

/// A socket pair: our end, and QEMU's, which children inherit.
fn port() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty())?;
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    Ok((UnixStream::from(ours), theirs))
}

/// Hands on lines, whatever bytes they hold, until the other side closes or nobody wants more.
fn for_each_line(from: impl Read, mut wanted: impl FnMut(String) -> bool) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        // An error is an end too: QEMU was killed with something unread.
        if from.read_until(b'\n', &mut line).unwrap_or(0) == 0 {
            return;
        }
        if !wanted(String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned()) {
            return;
        }
    }
}

/// Waits for a process, but no longer than until `deadline`: whether it has ended.
fn wait_until(process: &mut Child, deadline: Instant) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = process.try_wait().context("cannot wait for QEMU")? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Passes everything on, and says on standard error which of libtest's tests took long.
struct Timed<W> {
    to: W,
    /// The beginning of the last line.
    line: Vec<u8>,
    /// When that began, or the line before it ended.
    since: Instant,
}

/// How libtest's line of a test begins.
const TEST: &[u8] = b"test ";
/// From this on a test's time is told.
const LONG: Duration = Duration::from_secs(20);

impl<W: Write> Timed<W> {
    fn new(to: W) -> Self {
        Self {
            to,
            line: Vec::new(),
            since: Instant::now(),
        }
    }
}

impl<W: Write> Write for Timed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // Up to the end of a line at most, so that what is said of it comes behind it.
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let length = end.map_or(bytes.len(), |at| at + 1);
        self.to.write_all(&bytes[..length])?;
        let wanted = TEST.len().saturating_sub(self.line.len()).min(length);
        self.line.extend_from_slice(&bytes[..wanted]);
        if end.is_some() {
            let took = self.since.elapsed();
            if took >= LONG && self.line == TEST {
                self.to.flush()?;
                eprintln!("rig: that took {:.0} s", took.as_secs_f64());
            }
            self.line.clear();
            self.since = Instant::now();
        }
        Ok(length)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

/// Copies until the other side closes, flushing what has come; returns the last of it.
fn copy_live(mut from: impl Read, mut to: impl Write) -> std::io::Result<Vec<u8>> {
    let mut chunk = vec![0; 64 << 10];
    let mut tail = Vec::new();
    loop {
        let read = match from.read(&mut chunk) {
            Ok(0) => return Ok(tail),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(tail),
            Err(error) => return Err(error),
        };
        to.write_all(&chunk[..read])?;
        to.flush()?;
        tail.extend_from_slice(&chunk[..read]);
        if tail.len() > 2 * KEPT_OUTPUT {
            tail.drain(..tail.len() - KEPT_OUTPUT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_shell_as_they_are() {
        let words = ["a b", "it's", "$HOME `x` \\", ""].map(String::from);
        let script = format!("printf '%s\\n' {}", quoted(&words));
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "a b\nit's\n$HOME `x` \\\n\n");
    }

    #[test]
    fn what_is_timed_is_passed_on_as_it_is() {
        let mut to = Vec::new();
        let mut timed = Timed::new(&mut to);
        for piece in ["test a ... ", "ok\ntest b", " ... FAILED\n\nend"] {
            timed.write_all(piece.as_bytes()).unwrap();
        }
        assert_eq!(to, b"test a ... ok\ntest b ... FAILED\n\nend");
    }

    #[test]
    fn lines_that_are_no_text_are_handed_on_and_do_not_end_the_rest() {
        let mut lines = Vec::new();
        for_each_line(&b"up\nnote \xff\xfe\n\nexit 0"[..], |line| {
            lines.push(line);
            true
        });
        assert_eq!(lines, ["up", "note \u{fffd}\u{fffd}", "", "exit 0"]);
    }

    #[test]
    fn waiting_for_a_process_ends_at_the_deadline() {
        let soon = || Instant::now() + Duration::from_millis(100);
        let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
        assert_eq!(wait_until(&mut sleeper, soon()).unwrap(), None);
        sleeper.kill().unwrap();
        assert!(
            wait_until(&mut sleeper, Instant::now() + Duration::from_secs(60))
                .unwrap()
                .is_some()
        );
    }
}

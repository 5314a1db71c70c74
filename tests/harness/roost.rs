//! roost as a person uses it: the command line, and the API by hand.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use roost_common::ids::Slot;
use roost_common::net::{HOST_NET, SlotAddresses};
use serde_json::Value;

use crate::eventually;

/// Certificates of the rig's host.
pub const PKI: &str = "/etc/roost/pki";

/// Runs `roost` with arguments.
///
/// # Panics
/// When it cannot be run at all.
pub fn roost(args: &[&str]) -> Output {
    Command::new("roost").args(args).output().expect("roost runs")
}

/// Starts `roost` and leaves it running.
///
/// # Panics
/// When it cannot be run at all.
pub fn start(args: &[&str]) -> Child {
    Command::new("roost")
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("roost runs")
}

/// Standard output of an invocation that must succeed.
///
/// # Panics
/// When it fails.
pub fn ok(args: &[&str]) -> String {
    let output = roost(args);
    assert!(
        output.status.success(),
        "roost {args:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Standard error of an invocation that must fail.
///
/// # Panics
/// When it succeeds.
pub fn fails(args: &[&str]) -> String {
    let output = roost(args);
    assert!(!output.status.success(), "roost {args:?} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Guests that the emulation lost, in this run.
static LOST_GUESTS: AtomicU32 = AtomicU32::new(0);

/// Emulated virtualisation inside emulation loses a guest kernel now and then (seen some three times in 500 boots): where the emulated
/// processor is called away between KVM's injection of an interrupt and the guest's next exit, the guest gets that interrupt twice, also
/// where it has them disabled, and waits for a lock of its own for ever or faults three times over. Of a guest that has only just been
/// booted that is no finding of ours, once in a run; twice it is, and of a guest that was woken it always is.
///
/// # Panics
/// The second time.
pub fn excuse_a_lost_guest(said: &str) {
    let earlier = LOST_GUESTS.fetch_add(1, Ordering::SeqCst);
    eprintln!("NOTE: a guest was lost: {said}");
    assert_eq!(earlier, 0, "a second guest was lost: {said}");
}

/// Files of roost's data, run and key directories that a user of the host with no group of ours can read.
///
/// # Panics
/// When that cannot be found out.
pub fn readable_by_anybody() -> Vec<String> {
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "find"])
        // The first is the control.
        .args(["/etc/passwd", "/var/lib/roost", "/run/roost/vm", "/etc/roost/pki"])
        .args(["-type", "f", "-readable"])
        .output()
        .expect("it runs");
    let found = String::from_utf8(output.stdout).expect("UTF-8");
    let mut found: Vec<String> = found.lines().map(str::to_owned).collect();
    assert_eq!(found.first().map(String::as_str), Some("/etc/passwd"), "{found:?}");
    found.remove(0);
    found
}

/// Whether the agent took no new work because of the host's disk.
pub fn is_refused_for_room(said: &str) -> bool {
    said.contains("this host's disk has no room")
}

/// Runs `roost` until it is not refused for want of room any more: what has just been made is seen at the agent's next look.
///
/// # Panics
/// When it is never seen.
pub fn once_there_is_room(args: &[&str]) -> Output {
    eventually("the agent to see that there is room", || {
        Some(roost(args)).filter(|output| !is_refused_for_room(&String::from_utf8_lossy(&output.stderr)))
    })
}

/// A sandbox that is destroyed with this value.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
}

impl Sandbox {
    /// Makes a sandbox with further arguments of `roost create`.
    ///
    /// # Panics
    /// When that fails.
    pub fn create(args: &[&str]) -> Self {
        let mut output = roost(&[&["create"], args].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let has_not_booted = said.contains("the guest did not answer within");
        let was_reset = said.contains("the VMM ended before its guest was up") && said.contains("rebooting");
        if has_not_booted || was_reset {
            excuse_a_lost_guest(&said);
            output = roost(&[&["create"], args].concat());
        }
        if is_refused_for_room(&String::from_utf8_lossy(&output.stderr)) {
            output = once_there_is_room(&[&["create"], args].concat());
        }
        assert!(
            output.status.success(),
            "roost create {args:?} failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let id = String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned();
        Self { id }
    }

    /// Runs a command in it. An emulated guest is slow, so it has longer than the default.
    pub fn exec(&self, command: &[&str]) -> Output {
        roost(&[&["exec", "--timeout", "400", &self.id, "--"], command].concat())
    }

    /// Runs a shell script in it that must succeed; its standard output.
    ///
    /// # Panics
    /// When it fails.
    pub fn sh(&self, script: &str) -> String {
        let output = self.exec(&["/bin/bash", "-c", script]);
        assert!(
            output.status.success(),
            "{script:?} ended with {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// What it gets from a TCP server, or `closed`.
    pub fn reach(&self, address: &str, port: u16) -> String {
        self.sh(&format!(
            "timeout 10 /bin/bash -c 'exec 3<>/dev/tcp/{address}/{port} && cat <&3' 2>/dev/null || echo closed"
        ))
    }

    /// The address under which the host reaches it.
    ///
    /// # Panics
    /// When it is not listed.
    pub fn host_ip(&self) -> String {
        let listed = find(&self.id).expect("listed");
        listed["hostIp"].as_str().expect("an address").to_owned()
    }

    /// Every address that belongs to its slot: the one above, and both ends of its veth pair.
    ///
    /// # Panics
    /// When it is not listed.
    pub fn slot_addresses(&self) -> [String; 3] {
        let host: Ipv4Addr = self.host_ip().parse().expect("an address");
        let slot = host.to_bits() - HOST_NET.0.to_bits();
        let addresses = SlotAddresses::of(Slot::try_from(slot).expect("a slot"));
        [addresses.host, addresses.veth_host, addresses.veth_namespace].map(|address| address.to_string())
    }

    /// Pauses it.
    ///
    /// # Panics
    /// When that fails.
    pub fn pause(&self) {
        ok(&["pause", &self.id]);
    }

    /// Resumes it, once there is room where there was none just before.
    ///
    /// # Panics
    /// When that fails.
    pub fn resume(&self) {
        let output = once_there_is_room(&["resume", &self.id]);
        assert!(
            output.status.success(),
            "roost resume {} failed: {}",
            self.id,
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Forgets it without destroying it.
    pub fn forget(mut self) -> String {
        std::mem::take(&mut self.id)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if self.id.is_empty() {
            return;
        }
        let output = roost(&["rm", &self.id]);
        // A test that fails anyway says why itself.
        if !std::thread::panicking() {
            assert!(
                output.status.success(),
                "not removed: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
}

/// A script that leaves a file in a guest's memory and one on its disk, with their sums on the disk.
const PLANT: &str = "mkdir -p /dev/shm && head -c 3000000 /dev/urandom > /dev/shm/canary && sha256sum < /dev/shm/canary > /root/memory.sum
    head -c 3000000 /dev/urandom > /root/disk && sha256sum < /root/disk > /root/disk.sum && sync";
/// Whether the one on its disk is as it was, what else is on it can be read, and it can be written.
const DISK_WHOLE: &str = "sha256sum < /root/disk | diff - /root/disk.sum && echo 1 > /root/written && sync \
    && ! dmesg | grep -i 'ext4.*error'";
const MEMORY_WHOLE: &str = "sha256sum < /dev/shm/canary | diff - /root/memory.sum";

impl Sandbox {
    /// Leaves what [`Sandbox::is_whole`] looks for.
    ///
    /// # Panics
    /// When that fails.
    pub fn plant(&self) {
        self.sh(PLANT);
    }

    /// Finds in its memory and on its disk what was [planted](Sandbox::plant).
    ///
    /// # Panics
    /// When it is not there.
    pub fn is_whole(&self) {
        self.sh(&format!("{MEMORY_WHOLE} && {DISK_WHOLE}"));
    }

    /// Finds on its disk what was [planted](Sandbox::plant); its memory has been given up.
    ///
    /// # Panics
    /// When it is not there.
    pub fn has_whole_disk(&self) {
        self.sh(DISK_WHOLE);
    }
}

/// The team whose templates tests make.
pub const TEAM: &str = "11111111-2222-3333-4444-555555555555";

/// A template that is deleted with this value, if it is there.
#[derive(Debug)]
pub struct Template(String);

impl Template {
    /// The identity of the n-th one; nothing is made.
    pub fn named(n: u8) -> Self {
        Self(format!("00000000-0000-0000-0000-0000000000{n:02x}"))
    }

    /// Names it to `roost snapshot`, `flatten`, `create` and `rmi`.
    pub fn arguments(&self) -> [&str; 4] {
        ["--team", TEAM, "--template", &self.0]
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        let output = roost(&[&["rmi"], &self.arguments()[..]].concat());
        // A test that fails anyway says why itself.
        if !std::thread::panicking() {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// The listing of one sandbox that is alive: anything but paused.
pub fn find(id: &str) -> Option<Value> {
    find_among("sandboxes", id)
}

/// The listing of one paused sandbox.
pub fn find_paused(id: &str) -> Option<Value> {
    find_among("pausedSandboxes", id)
}

/// What is on record of a sandbox's end, once it has come.
///
/// # Panics
/// When it does not come.
pub fn tombstone(id: &str) -> Value {
    eventually("the sandbox to be gone", || find(id).is_none().then_some(()));
    eventually("the tombstone", || {
        let text = std::fs::read(format!("/var/lib/roost/tombstones/{id}.json")).ok()?;
        serde_json::from_slice(&text).ok()
    })
}

/// What a sandbox is doing, by one listing: between two of them it may go from one list to the other.
pub fn status(id: &str) -> Option<String> {
    let listing = listing();
    let found = ["sandboxes", "pausedSandboxes"]
        .iter()
        .find_map(|list| among(&listing, list, id));
    found.map(|sandbox| sandbox["status"].as_str().expect("a word").to_owned())
}

fn find_among(list: &str, id: &str) -> Option<Value> {
    among(&listing(), list, id)
}

fn listing() -> Value {
    serde_json::from_str(&ok(&["ls", "--json"])).expect("JSON")
}

fn among(listing: &Value, list: &str, id: &str) -> Option<Value> {
    listing[list]
        .as_array()?
        .iter()
        .find(|sandbox| sandbox["sandboxId"] == id)
        .cloned()
}

/// An answer of the API.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status; 0 where there was none.
    pub status: u16,
    /// The body, as JSON where it is some.
    pub body: Value,
    /// The body as it came.
    pub text: String,
    /// What curl said of what went wrong.
    pub error: String,
}

/// Calls the API with curl: `curl` are further arguments, certificates included.
///
/// # Panics
/// When curl cannot be run.
pub fn curl(curl: &[&str]) -> Answer {
    let output = Command::new("curl")
        .args([
            "--silent",
            "--show-error",
            "--max-time",
            "400",
            "--write-out",
            "\n%{http_code}",
        ])
        .args(curl)
        .output()
        .expect("curl runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", "0"));
    Answer {
        status: status.trim().parse().unwrap_or(0),
        body: serde_json::from_str(body).unwrap_or(Value::Null),
        text: body.to_owned(),
        error: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Arguments of curl for the certificates of a directory.
pub fn certificates(dir: &str) -> Vec<String> {
    [
        ("--cacert", "ca.pem"),
        ("--cert", "client.pem"),
        ("--key", "client-key.pem"),
    ]
    .iter()
    .flat_map(|(option, file)| [(*option).to_owned(), format!("{dir}/{file}")])
    .collect()
}

/// Calls a procedure of `hostagent.v1` in JSON.
pub fn call(procedure: &str, request: &Value) -> Answer {
    let url = format!("https://127.0.0.1:50051/hostagent.v1.HostAgentService/{procedure}");
    let body = request.to_string();
    let certificates = certificates(PKI);
    let mut args: Vec<&str> = certificates.iter().map(String::as_str).collect();
    args.extend(["--header", "Content-Type: application/json", "--data", &body, &url]);
    curl(&args)
}

/// A message of a stream, in Connect's envelope.
///
/// # Panics
/// When it has 4 GiB or more.
pub fn enveloped(message: &Value) -> Vec<u8> {
    let message = message.to_string();
    let length = u32::try_from(message.len()).expect("a small message").to_be_bytes();
    [&[0][..], &length, message.as_bytes()].concat()
}

/// The messages of a stream as far as they have come, without the one that says how it ended.
///
/// # Panics
/// When the stream, or what `of` names, ended with an error.
pub fn messages(of: &str, mut stream: &[u8]) -> Vec<Value> {
    let mut messages = Vec::new();
    while let [flags, a, b, c, d, more @ ..] = stream {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        // The last may be cut off with the time.
        let Some(message) = more.get(..length) else { break };
        stream = &more[length..];
        let message: Value = serde_json::from_slice(message).expect("JSON");
        assert!(message.get("error").is_none(), "{of}: {message}");
        if flags & 2 == 0 {
            messages.push(message);
        }
    }
    messages
}

/// The kernel's name of the device that is a sandbox's disk, such as `dm-3`.
///
/// # Panics
/// When the id is none.
pub fn disk_of(id: &str) -> Option<String> {
    let name = roost_common::names::disk(&id.parse().expect("a sandbox id"));
    let blocks = std::fs::read_dir("/sys/block").expect("there is one").flatten();
    blocks
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .find(|block| {
            let named = std::fs::read_to_string(format!("/sys/block/{block}/dm/name"));
            named.is_ok_and(|named| named.trim() == name)
        })
}

/// Process ids of a command's name, as the kernel has it (cut to 15 letters).
pub fn pids(command: &str) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse::<i32>().ok())
        .filter(|pid| {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            comm.trim() == command
        })
        .collect()
}

/// Whether a shim has launched a VM.
pub fn has_vm(shim: i32) -> bool {
    let children = std::fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"));
    children.is_ok_and(|children| !children.trim().is_empty())
}

/// Name of the VMM's process, as the kernel has it.
pub fn vmm_command() -> &'static str {
    if std::path::Path::new("/usr/bin/cloud-hypervisor").exists() {
        "cloud-hyperviso"
    } else {
        "standin-vmm"
    }
}

/// Kills every process of a name; there must be one.
///
/// # Panics
/// When there is none.
pub fn kill_9(command: &str) {
    let pids = pids(command);
    assert!(!pids.is_empty(), "no {command} runs");
    pids.into_iter().for_each(kill_9_pid);
}

/// Kills a process; one that has ended meanwhile is as good as killed.
///
/// # Panics
/// When it may not be killed.
pub fn kill_9_pid(pid: i32) {
    let killed = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    assert!(matches!(killed, Ok(()) | Err(nix::errno::Errno::ESRCH)), "{killed:?}");
}

/// Whether the rig's daemons run under systemd, or were started by hand (`cargo xtask rig --direct`).
pub fn under_systemd() -> bool {
    let status = Command::new("systemctl")
        .args(["--quiet", "is-active", "roost-vmmshim.socket"])
        .status();
    status.expect("systemctl runs").success()
}

/// Waits until the agent serves again.
pub fn wait_for_agent() {
    eventually("the agent to serve", || roost(&["ls"]).status.success().then_some(()));
}

/// An agent with other lines in its configuration, until it is dropped.
#[derive(Debug)]
pub struct AgentConfig(String);

impl AgentConfig {
    const FILE: &str = "/etc/roost/agent.toml";

    /// Keys, or whole tables, on top of what there is; a key that there is already has the new value.
    ///
    /// # Panics
    /// When the agent does not start with them.
    pub fn with(lines: &str) -> Self {
        let before = std::fs::read_to_string(Self::FILE).unwrap_or_default();
        let text = if lines.starts_with('[') {
            format!("{before}\n{lines}")
        } else {
            let key = |line: &str| line.split_once(" = ").map(|(key, _)| key.to_owned());
            let is_new = |line: &&str| key(line).is_none_or(|old| !lines.lines().filter_map(key).any(|new| new == old));
            let kept: String = before.lines().filter(is_new).map(|line| format!("{line}\n")).collect();
            format!("{lines}{kept}")
        };
        std::fs::write(Self::FILE, text).expect("written");
        assert!(Self::restart().expect("systemctl runs").success());
        wait_for_agent();
        Self(before)
    }

    fn restart() -> std::io::Result<std::process::ExitStatus> {
        Command::new("systemctl")
            .args(["restart", "roost-agent.service"])
            .status()
    }
}

impl Drop for AgentConfig {
    fn drop(&mut self) {
        let restored = std::fs::write(Self::FILE, &self.0);
        let restarted = Self::restart();
        // A test that fails anyway says why itself.
        if !std::thread::panicking() {
            restored.expect("restored");
            assert!(restarted.expect("systemctl runs").success());
            wait_for_agent();
        }
    }
}

//! The packages on a host that has never had them: installed, upgraded under what runs, downgraded, removed and purged, by apt.
//!
//! In a rig of its own, in which nothing is installed (`cargo xtask rig --bare --packages`).

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roost_tests::census::Census;
use roost_tests::roost::{self, PKI, Sandbox, find, pids, vmm_command, wait_for_agent};
use roost_tests::{PATIENCE, eventually, show};

const HOST: &str = "/root/packages/roost-host_";
const GUEST_TOOLS: &str = "/root/packages/roost-guest-tools_";
const NEWER: &str = "/root/packages/newer/roost-host_";
const UNITS: [&str; 4] = [
    "roost-privd.socket",
    "roost-vmmshim.socket",
    "roost-agent.service",
    "roost-drain.service",
];

#[test]
fn a_host_is_installed_upgraded_removed_and_purged_by_apt() {
    assert!(
        Path::new("/root/packages").exists(),
        "this test needs a rig of its own: run it by `cargo xtask test --rig -- package`"
    );
    let before = Inventory::take();
    install_on_a_clean_host();
    configure();

    let (runs, rests) = (
        Sandbox::create(&["--memory", "256"]),
        Sandbox::create(&["--memory", "256"]),
    );
    rests.plant();
    rests.pause();
    upgrade_under(&runs);
    rests.resume();
    rests.is_whole();
    downgrade_under(&runs);
    end_a_stuck_agent_over(&runs);
    roost::ok(&["rm", &rests.forget()]);

    let paused = remove_over(runs);
    step("purge", || {
        let said = apt(&["purge", "roost-host", "roost-guest-tools"]);
        assert!(
            said.contains("paused sandboxes are deleted") && said.contains(&paused),
            "{said}"
        );
        before.is_all_there_is();
    });
    step("install again", || {
        apt(&["install", &deb(HOST)]);
        assert!(is("active", "roost-privd.socket") && is("active", "roost-vmmshim.socket"));
        assert!(!Path::new("/var/lib/roost/sandboxes").join(&paused).exists());
    });
}

fn install_on_a_clean_host() {
    step("install", || {
        let said = apt(&["install", &deb(HOST), &deb(GUEST_TOOLS)]);
        assert!(
            said.contains("roost pki init"),
            "it does not say what comes next: {said}"
        );
    });
    for unit in UNITS {
        assert!(is("enabled", unit), "{unit}");
        let waits = unit == "roost-agent.service";
        assert_ne!(is("active", unit), waits, "{unit}");
    }
    let files = output("dpkg", &["-L", "roost-host", "roost-guest-tools"]);
    let files: Vec<&str> = files.lines().filter(|path| Path::new(path).is_file()).collect();
    assert!(files.len() > 15, "{files:?}");
    for file in &files {
        let mode = std::fs::metadata(file).expect("a file").mode();
        assert_eq!(mode & 0o6000, 0, "{file} is setuid or setgid");
    }
    assert_eq!(output("getcap", &files), "", "a file has capabilities");
    let group = std::fs::metadata("/dev/userfaultfd").expect("a device").gid();
    assert_eq!(
        group.to_string(),
        id_of("group", "roost-vm"),
        "on-demand memory would not work"
    );
}

/// What README has an administrator do, and what the rig's VMM and its slowness need.
fn configure() {
    step("configure", || {
        let version = output("uname", &["-r"]);
        let initramfs = format!("/var/lib/roost/kernels/initramfs-{}", version.trim());
        output("rm", &[&initramfs]);
        output(
            "roost-mkinitramfs",
            &["--kernel", version.trim(), "--output", &initramfs],
        );
        output("chown", &["-R", "roost:roost-vm", "/var/lib/roost/kernels"]);
        output("chown", &["-R", "roost:roost", "/var/lib/roost/images"]);
        output("cp", &["/usr/share/roost-tests/vmmshim.env", "/etc/roost/vmmshim.env"]);
        let config = "/etc/roost/agent.toml";
        let installed = std::fs::read_to_string(config).expect("it is installed");
        std::fs::write(
            config,
            format!("busy_cpu_percent = 70\nboot_timeout_sec = 400\n{installed}"),
        )
        .expect("written");
        output("roost", &["pki", "init", "--name", "rig.example"]);
        output("roost-agent", &["--check-config"]);
        output("systemctl", &["start", "roost-agent.service"]);
        // Warnings are of the machine: nobody has hardened it.
        let doctor = roost::roost(&["doctor"]);
        let said = said_by(&doctor);
        assert!(matches!(doctor.status.code(), Some(0 | 1)), "{said}");
    });
}

/// Counts, five a second, until it has been asked to end, or for longer than any upgrade takes.
const COUNTER: &str = "for n in $(seq 2000); do echo line $n; [ -e /end ] && exit 7; sleep 0.2; done";

/// A WebSocket's server as far as the proxy is concerned: it switches protocols, and says back whatever it is told.
const ECHO: &str = "use IO::Socket::INET; $s = IO::Socket::INET->new(LocalAddr => '0.0.0.0', LocalPort => 8080, Listen => 9, ReuseAddr => 1) or die;
    while ($c = $s->accept) { while (<$c>) { last if /^\\r?$/ }
    syswrite $c, \"HTTP/1.1 101 Switching Protocols\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\n\\r\\n\";
    while (sysread $c, $b, 4096) { syswrite $c, $b } close $c }";

fn upgrade_under(sandbox: &Sandbox) {
    roost::ok(&["exec", "--detach", &sandbox.id, "--", "perl", "-e", ECHO]);
    eventually("the guest's server", || {
        sandbox
            .sh("ss -ltn 2>/dev/null | grep -q :8080 && echo there || echo not")
            .eq("there")
            .then_some(())
    });
    let mut socket = WebSocket::open(sandbox);
    assert_eq!(socket.echoes("before"), "before");
    let mut reader = Command::new("roost")
        .args(["exec", &sandbox.id, "--", "/bin/sh", "-c", COUNTER])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut lines = BufReader::new(reader.stdout.take().expect("a pipe"));
    let mut read = String::new();
    lines.read_line(&mut read).expect("output comes while the command runs");
    let (virtual_machines, agent) = (vms(), pids("roost-agent"));

    step("upgrade", || apt(&["install", &deb(NEWER)]));
    assert!(output("dpkg-query", &["-W", "-f", "${Version}", "roost-host"]).ends_with("newer"));
    assert_eq!(vms(), virtual_machines, "an upgrade touched a VM");
    assert_ne!(pids("roost-agent"), agent, "the old agent still runs");
    assert_eq!(find(&sandbox.id).expect("listed")["status"], "running");
    assert!(
        is("active", "roost-drain.service"),
        "it would not pause what runs when the host goes down"
    );

    socket.has_ended_in_order();
    let mut again = WebSocket::open(sandbox);
    assert_eq!(again.echoes("after"), "after");
    drop(again);
    sandbox.sh("touch /end");
    lines.read_to_string(&mut read).expect("text");
    let ended = reader.wait_with_output().expect("it ends");
    assert_eq!(
        ended.status.code(),
        Some(7),
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    assert_eq!(ended.stderr, b"", "{}", String::from_utf8_lossy(&ended.stderr));
    let count = read.lines().count();
    let whole: String = (1..=count).map(|n| format!("line {n}\n")).collect();
    assert_eq!(read, whole, "a line was lost or came twice");
}

fn downgrade_under(sandbox: &Sandbox) {
    let virtual_machines = vms();
    step("downgrade", || apt(&["install", "--allow-downgrades", &deb(HOST)]));
    assert_eq!(vms(), virtual_machines, "a downgrade touched a VM");
    assert_eq!(find(&sandbox.id).expect("listed")["status"], "running");
}

/// An agent that does not say that it lives is ended by systemd, and the next one takes over what runs.
fn end_a_stuck_agent_over(sandbox: &Sandbox) {
    const DROP_IN: &str = "/etc/systemd/system/roost-agent.service.d";
    let unit = output("systemctl", &["show", "--property=WatchdogUSec", "roost-agent.service"]);
    assert_eq!(unit.trim(), "WatchdogUSec=1min");
    step("watchdog", || {
        std::fs::create_dir_all(DROP_IN).expect("made");
        let shorter = "[Service]\nWatchdogSec=6\nTimeoutAbortSec=1\n";
        std::fs::write(format!("{DROP_IN}/watchdog.conf"), shorter).expect("written");
        output("systemctl", &["daemon-reload"]);
        output("systemctl", &["restart", "roost-agent.service"]);
        wait_for_agent();
        let (virtual_machines, stuck) = (vms(), pids("roost-agent"));
        let [pid] = stuck[..] else {
            panic!("one agent runs: {stuck:?}")
        };
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("it runs");
        eventually("another agent", || {
            let now = pids("roost-agent");
            (!now.is_empty() && now != stuck).then_some(())
        });
        wait_for_agent();
        assert_eq!(vms(), virtual_machines);
        assert_eq!(sandbox.sh("echo alive"), "alive");
        std::fs::remove_dir_all(DROP_IN).expect("removed");
        output("systemctl", &["daemon-reload"]);
        output("systemctl", &["restart", "roost-agent.service"]);
        wait_for_agent();
    });
}

/// A package is not removed from under a VM that nobody can pause, and pauses the others; the one of this sandbox, whose id it returns.
fn remove_over(sandbox: Sandbox) -> String {
    step("remove", || {
        output("systemctl", &["stop", "roost-agent.service"]);
        let refused = apt_get(&["remove", "roost-host"]);
        let said = said_by(&refused);
        assert!(!refused.status.success(), "it was removed from under a VM: {said}");
        assert!(
            said.contains("could not be paused") && said.contains(&sandbox.id),
            "{said}"
        );
        output("systemctl", &["start", "roost-agent.service"]);
        assert_eq!(sandbox.sh("echo alive"), "alive");

        let id = sandbox.forget();
        apt(&["remove", "roost-host"]);
        assert_eq!(vms(), [0; 0]);
        let record = std::fs::read_to_string(format!("/var/lib/roost/sandboxes/{id}/sandbox.json"));
        assert!(record.expect("a record").contains("paused"));
        assert!(!Path::new("/usr/bin/roost").exists() && !Path::new("/run/roost").exists());
        id
    })
}

/// Runs a part of the test under its name, and says how long it took.
fn step<T>(name: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    show(&format!("{name}: {:.1} s", start.elapsed().as_secs_f64()));
    result
}

/// The package of which this is the beginning of its path.
fn deb(start: &str) -> String {
    let (dir, name) = start.rsplit_once('/').expect("a path");
    let entries = std::fs::read_dir(dir).expect("the packages").flatten();
    let mut found = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(name));
    let found = found.next().unwrap_or_else(|| panic!("no {start}*"));
    found.path().to_string_lossy().into_owned()
}

fn apt_get(args: &[&str]) -> std::process::Output {
    Command::new("apt-get")
        .args(["-q", "-y"])
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .expect("apt-get runs")
}

/// What apt and the packages say, of which dpkg has errors on either output.
fn said_by(done: &std::process::Output) -> String {
    [&done.stdout, &done.stderr]
        .map(|said| String::from_utf8_lossy(said))
        .concat()
}

/// What they say of something that must succeed.
fn apt(args: &[&str]) -> String {
    let done = apt_get(args);
    let said = said_by(&done);
    assert!(done.status.success(), "apt-get {args:?}: {said}");
    // Of a script that failed in part and went on.
    for word in ["Failed to", "No such file", "not found", "is left in"] {
        assert!(!said.contains(word), "apt-get {args:?}: {said}");
    }
    said
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8(output.stdout).expect("text")
}

/// Whether systemctl says that a unit is this.
fn is(what: &str, unit: &str) -> bool {
    let status = Command::new("systemctl")
        .args(["--quiet", &format!("is-{what}"), unit])
        .status();
    status.expect("systemctl runs").success()
}

fn id_of(database: &str, name: &str) -> String {
    let entry = output("getent", &[database, name]);
    entry.split(':').nth(2).expect("an id").to_owned()
}

/// The processes that are VMs.
fn vms() -> Vec<i32> {
    let mut found = [pids("roost-vmmshim"), pids(vmm_command())].concat();
    found.sort_unstable();
    // The agent has a shim ready for the next VM, and another one after it was started anew.
    found.retain(|pid| !is_idle_shim(*pid));
    found
}

/// Whether a process is a shim that has no VM.
fn is_idle_shim(pid: i32) -> bool {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    comm.trim() == "roost-vmmshim" && children.trim().is_empty()
}

/// A TLS client that has upgraded its connection.
struct WebSocket {
    client: Child,
    to: ChildStdin,
    from: ChildStdout,
}

impl WebSocket {
    fn open(sandbox: &Sandbox) -> Self {
        let pki = |file: &str| format!("{PKI}/{file}");
        let mut client = Command::new("openssl")
            .args([
                "s_client",
                "-quiet",
                "-verify_return_error",
                "-connect",
                "127.0.0.1:50051",
            ])
            .args([
                "-CAfile",
                &pki("ca.pem"),
                "-cert",
                &pki("client.pem"),
                "-key",
                &pki("client-key.pem"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("openssl runs");
        let (to, from) = (
            client.stdin.take().expect("a pipe"),
            client.stdout.take().expect("a pipe"),
        );
        let mut socket = Self { client, to, from };
        let request = format!(
            "GET /proxy/{}/8080/socket HTTP/1.1\r\nHost: rig\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            sandbox.id
        );
        socket.to.write_all(request.as_bytes()).expect("sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            let read = socket.from.read(&mut byte).expect("read");
            assert_eq!(read, 1, "{}", String::from_utf8_lossy(&head));
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        socket
    }

    /// What comes back of a text.
    fn echoes(&mut self, text: &str) -> String {
        self.to.write_all(text.as_bytes()).expect("sent");
        let mut back = vec![0; text.len()];
        self.from.read_exact(&mut back).expect("it comes back");
        String::from_utf8(back).expect("as it was")
    }

    /// Its end has been said, and is not what is left of a connection that broke.
    fn has_ended_in_order(mut self) {
        let mut rest = Vec::new();
        self.from.read_to_end(&mut rest).expect("an end");
        assert_eq!(rest, b"");
        let mut said = String::new();
        self.client
            .stderr
            .take()
            .expect("a pipe")
            .read_to_string(&mut said)
            .expect("text");
        for word in ["unexpected eof", "errno", "reset"] {
            assert!(!said.contains(word), "{said}");
        }
    }
}

impl Drop for WebSocket {
    fn drop(&mut self) {
        // It may have ended.
        self.client.kill().ok();
        self.client.wait().expect("a child of ours");
    }
}

/// All of a host that a package might leave something in.
struct Inventory {
    census: Census,
    things: BTreeSet<String>,
}

/// What others write while we look, apt's and dpkg's own books among it, and the copies that are made of the users' files when these change.
const NOT_LISTED: &[&str] = &[
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/rig",
    "/tmp",
    "/root",
    "/var/cache",
    "/var/log",
    "/var/backups",
    "/var/lib/apt",
    "/var/lib/dpkg",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/timers",
    "/var/lib/roost",
    "/etc/.pwd.lock",
    "/etc/passwd-",
    "/etc/shadow-",
    "/etc/group-",
    "/etc/gshadow-",
    "/etc/subuid-",
    "/etc/subgid-",
];

impl Inventory {
    fn take() -> Self {
        let mut find = vec!["/", "-xdev", "("];
        for (number, path) in NOT_LISTED.iter().enumerate() {
            if number > 0 {
                find.push("-o");
            }
            find.extend(["-path", path]);
        }
        find.extend([
            ")",
            "-prune",
            "-o",
            "(",
            "-type",
            "d",
            "-printf",
            "%p %y %m %U %G\\n",
            "-o",
        ]);
        find.extend(["-printf", "%p %y %m %U %G %s %l\\n", ")"]);
        let mut things: BTreeSet<String> = output("find", &find).lines().map(str::to_owned).collect();
        for (what, program, args) in [
            ("user", "getent", &["passwd"][..]),
            ("group", "getent", &["group"]),
            ("unit file", "systemctl", &["list-unit-files", "--no-legend", "--plain"]),
            (
                "unit",
                "systemctl",
                &["list-units", "--all", "--no-legend", "--plain", "roost*"],
            ),
            ("device", "stat", &["--format=%n %a %U %G", "/dev/userfaultfd"]),
            ("run", "find", &["/run", "-xdev", "-name", "*roost*"]),
            (
                "data",
                "find",
                &["/var/lib/roost", "-mindepth", "1", "-not", "-name", "lost+found"],
            ),
        ] {
            let lines = output(program, args);
            things.extend(lines.lines().map(|line| format!("{what}: {line}")));
        }
        // The rig's own: kernel and images of the disk that is mounted there go with a purge.
        things.retain(|thing| {
            !thing.starts_with("data: /var/lib/roost/kernels") && !thing.starts_with("data: /var/lib/roost/images")
        });
        Self {
            census: Census::take(),
            things,
        }
    }

    /// Waits until the host is as it was.
    fn is_all_there_is(&self) {
        let start = Instant::now();
        loop {
            let now = Self::take();
            let more = now.things.difference(&self.things).map(|thing| format!("+ {thing}"));
            let less = self.things.difference(&now.things).map(|thing| format!("- {thing}"));
            let mut differences: Vec<String> = more.chain(less).collect();
            differences.extend(now.census.differences(&self.census));
            if differences.is_empty() {
                assert!(!Path::new("/var/lib/roost/kernels").exists(), "a purge left data");
                return;
            }
            // Only the kernel takes its time.
            assert!(
                start.elapsed() < PATIENCE.min(std::time::Duration::from_secs(20)),
                "left on the host:\n{}",
                differences.join("\n")
            );
            std::thread::sleep(std::time::Duration::from_millis(500));
        }
    }
}

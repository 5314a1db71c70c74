//! The packages on a host that has never had them: installed, upgraded under what runs, downgraded, removed and purged, by apt.
//!
//! In a rig of its own, in which nothing is installed (`cargo xtask rig --bare --packages`).

mod apt;
mod inventory;
mod web_socket;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roost_tests::disk::run;
use roost_tests::doctor::Report;
use roost_tests::roost::{self, Sandbox, find, has_vm, pids, vmm_command, wait_for_agent};
use roost_tests::saved::Saved;
use roost_tests::{eventually, show};
use serde_json::Value;

use apt::{GUEST_TOOLS, HOST, NEWER, apt, apt_get, deb, said_by};
use inventory::Inventory;
use web_socket::WebSocket;

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
    heed_doctor();
    build_template();

    let (runs, rests) = (
        Sandbox::create(&["--template", "web", "--memory", "256"]),
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
        // The administrator's own.
        fs::remove_file(SYSCTLS).expect("removed");
        fs::remove_file(KVM).expect("removed");
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
    let files = run("dpkg", &["-L", "roost-host", "roost-guest-tools"]);
    let files: Vec<&str> = files.lines().filter(|path| Path::new(path).is_file()).collect();
    assert!(files.len() > 15, "{files:?}");
    for file in &files {
        let mode = fs::metadata(file).expect("a file").mode();
        assert_eq!(mode & 0o6000, 0, "{file} is setuid or setgid");
    }
    assert_eq!(run("getcap", &files), "", "a file has capabilities");
    let group = fs::metadata("/dev/userfaultfd").expect("a device").gid();
    assert_eq!(
        group.to_string(),
        id_of("group", "roost-vm"),
        "on-demand memory would not work"
    );
}

/// What README has an administrator do, and what the rig's VMM and its slowness need.
fn configure() {
    step("configure", || {
        let version = run("uname", &["-r"]);
        let initramfs = format!("/var/lib/roost/kernels/initramfs-{}", version.trim());
        run("rm", &[&initramfs]);
        run(
            "roost-mkinitramfs",
            &["--kernel", version.trim(), "--output", &initramfs],
        );
        let data = ["/var/lib/roost/kernels", "/var/lib/roost/images"];
        run("chown", &["-R", "roost:roost-vm", data[0], data[1]]);
        run("cp", &["/usr/share/roost-tests/vmmshim.env", "/etc/roost/vmmshim.env"]);
        let config = "/etc/roost/agent.toml";
        let installed = fs::read_to_string(config).expect("it is installed");
        fs::write(
            config,
            format!("busy_cpu_percent = 70\nboot_timeout_sec = 400\n{installed}"),
        )
        .expect("written");
        run("roost", &["pki", "init", "--name", "rig.example"]);
        run("roost-agent", &["--check-config"]);
        run("systemctl", &["start", "roost-agent.service"]);
    });
}

/// What an administrator writes on the advice of `roost doctor`.
const SYSCTLS: &str = "/etc/sysctl.d/90-doctor.conf";
const KVM: &str = "/etc/modprobe.d/kvm.conf";

/// Checks that warn here whatever is done: nothing in the rig keeps the clock, because it has no network, and its kernel leaves the holes of
/// processors open (`mitigations=off`), because an emulated one has none.
const EXCUSED: [&str; 2] = ["clock", "processor"];

/// Does what `roost doctor` advises on a fresh Debian, which then has nothing to say but what cannot be helped here.
fn heed_doctor() {
    step("doctor", || {
        fs::write(
            SYSCTLS,
            "kernel.unprivileged_userns_clone = 0\nkernel.yama.ptrace_scope = 1\n",
        )
        .expect("written");
        run("sysctl", &["--quiet", "--load", SYSCTLS]);
        fs::write(KVM, "options kvm_amd nested=0\noptions kvm_intel nested=0\n").expect("written");
        for module in ["kvm_amd", "kvm_intel"] {
            if Path::new("/sys/module").join(module).exists() {
                run("modprobe", &["--remove", module]);
                run("modprobe", &[module]);
            }
        }
        eventually("the device with its group", || {
            let device = fs::metadata("/dev/kvm").ok()?;
            (device.gid().to_string() == id_of("group", "kvm")).then_some(())
        });
        let report = Report::take();
        assert_eq!(report.said("problem"), [], "{report:?}");
        let warnings = report.said("warning");
        let unexcused: Vec<_> = warnings.iter().filter(|(check, _)| !EXCUSED.contains(check)).collect();
        assert_eq!(unexcused, [&("", ""); 0]);
        assert_eq!(report.status, Some(i32::from(!warnings.is_empty())), "{report:?}");
    });
}

/// Makes template `web` of a container's image, with the guest's agent of the package, as a user of no privilege who has a certificate.
fn build_template() {
    step("template", || {
        let image = Saved::new(&["seq", "sleep", "socat", "stat"]);
        let built = image.build(&["--name", "web", "-"]);
        assert!(built.status.success(), "{}", said_by(&built));
        let id = String::from_utf8(built.stdout).expect("text");
        let listed: Value = serde_json::from_str(&roost::ok(&["template", "ls", "--json"])).expect("JSON");
        let is_it = |template: &Value| template["name"] == "web" && template["templateId"] == id.trim();
        assert!(
            listed["templates"].as_array().expect("a list").iter().any(is_it),
            "{id}: {listed}"
        );
    });
}

/// Counts, five a second, until it has been asked to end, or for longer than any upgrade takes.
const COUNTER: &str = "for n in $(seq 2000); do echo line $n; [ -e /end ] && exit 7; sleep 0.2; done";

/// A WebSocket's server as far as the proxy is concerned: it switches protocols, and says back whatever it is told.
const ECHO: &str = r#"while read -r line && [ "$line" != $'\r' ]; do :; done
printf 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'; exec cat"#;

fn upgrade_under(sandbox: &Sandbox) {
    assert_eq!(
        sandbox.sh("echo $(</srv/changed) $(</bin/note); stat -c %u:%g /srv/suid"),
        "second by way of a link\n1234:70000",
        "it is not of the image"
    );
    sandbox.sh(&format!("cat > /srv/echo <<'END'\n{ECHO}\nEND"));
    let listen = [
        "socat",
        "TCP-LISTEN:8080,reuseaddr,fork",
        "EXEC:/usr/bin/bash /srv/echo",
    ];
    roost::ok(&[&["exec", "--detach", &sandbox.id, "--"], &listen[..]].concat());
    eventually("the guest's server", || {
        sandbox
            .sh("(exec 3<>/dev/tcp/127.0.0.1/8080) 2>/dev/null && echo there || echo not")
            .eq("there")
            .then_some(())
    });
    let mut socket = WebSocket::open(sandbox);
    assert_eq!(socket.echoes("before"), "before");
    let mut reader = Command::new("roost")
        .args(["exec", &sandbox.id, "--", "/bin/bash", "-c", COUNTER])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut lines = BufReader::new(reader.stdout.take().expect("a pipe"));
    let mut read = String::new();
    lines.read_line(&mut read).expect("output comes while the command runs");
    let (virtual_machines, agent) = (vms(), pids("roost-agent"));

    step("upgrade", || apt(&["install", &deb(NEWER)]));
    assert!(run("dpkg-query", &["-W", "-f", "${Version}", "roost-host"]).ends_with("newer"));
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
    sandbox.sh(": > /end");
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
    let unit = run("systemctl", &["show", "--property=WatchdogUSec", "roost-agent.service"]);
    assert_eq!(unit.trim(), "WatchdogUSec=1min");
    step("watchdog", || {
        fs::create_dir_all(DROP_IN).expect("made");
        let shorter = "[Service]\nWatchdogSec=6\nTimeoutAbortSec=1\n";
        fs::write(format!("{DROP_IN}/watchdog.conf"), shorter).expect("written");
        run("systemctl", &["daemon-reload"]);
        run("systemctl", &["restart", "roost-agent.service"]);
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
        fs::remove_dir_all(DROP_IN).expect("removed");
        run("systemctl", &["daemon-reload"]);
        run("systemctl", &["restart", "roost-agent.service"]);
        wait_for_agent();
    });
}

/// A package is not removed from under a VM that nobody can pause, and pauses the others; the one of this sandbox, whose id it returns.
fn remove_over(sandbox: Sandbox) -> String {
    step("remove", || {
        run("systemctl", &["stop", "roost-agent.service"]);
        let refused = apt_get(&["remove", "roost-host"]);
        let said = said_by(&refused);
        assert!(!refused.status.success(), "it was removed from under a VM: {said}");
        assert!(
            said.contains("could not be paused") && said.contains(&sandbox.id),
            "{said}"
        );
        run("systemctl", &["start", "roost-agent.service"]);
        assert_eq!(sandbox.sh("echo alive"), "alive");

        let id = sandbox.forget();
        apt(&["remove", "roost-host"]);
        assert_eq!(vms(), [0; 0]);
        let record = fs::read_to_string(format!("/var/lib/roost/sandboxes/{id}/sandbox.json"));
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

/// Whether systemctl says that a unit is this.
fn is(what: &str, unit: &str) -> bool {
    let status = Command::new("systemctl")
        .args(["--quiet", &format!("is-{what}"), unit])
        .status();
    status.expect("systemctl runs").success()
}

fn id_of(database: &str, name: &str) -> String {
    let entry = run("getent", &[database, name]);
    entry.split(':').nth(2).expect("an id").to_owned()
}

/// The processes that are VMs.
fn vms() -> Vec<i32> {
    let mut shims = pids("roost-vmmshim");
    // The agent has some ready for VMs to come, and others after it was started anew.
    shims.retain(|shim| has_vm(*shim));
    let mut found = [shims, pids(vmm_command())].concat();
    found.sort_unstable();
    found
}

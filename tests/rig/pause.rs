//! Pause and resume: what is kept, what is told, and what failures and crashes on the way leave.

use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use roost_tests::census::Census;
use roost_tests::roost::{
    self, AgentConfig, Sandbox, call, find, find_paused, kill_9, pids, tombstone, vmm_command, wait_for_agent,
};
use roost_tests::{PATIENCE, eventually, in_rig, is_full_size};
use serde_json::json;

/// A program that counts in memory, a file in memory, and a file on disk: all that a pause is to keep.
const CANARIES: &str = "mkdir -p /dev/shm && head -c 2000000 /dev/urandom > /dev/shm/canary && sha256sum < /dev/shm/canary > /root/memory.sum
    head -c 3000000 /dev/urandom > /root/disk && sha256sum < /root/disk > /root/disk.sum
    setsid bash -c 'i=0; exec 9<> <(:); until read -rt 0.2 -u 9; do i=$((i+1)); echo $i > /dev/shm/count; done' >/dev/null 2>&1 &
    echo $! > /dev/shm/counter.pid; until test -s /dev/shm/count; do sleep 0.1; done";

/// Checks the canaries; what the counter says.
fn check(sandbox: &Sandbox) -> u64 {
    let said = sandbox.sh(
        "sha256sum < /dev/shm/canary | diff - /root/memory.sum && sha256sum < /root/disk | diff - /root/disk.sum \
         && kill -0 $(cat /dev/shm/counter.pid) && dmesg | grep -ci 'ext4.*error'; cat /dev/shm/count",
    );
    let (errors, count) = said.split_once('\n').expect("two lines");
    assert_eq!(errors, "0", "the guest's filesystem found errors");
    count.parse().expect("a number")
}

/// A program that answers every datagram with the guest's time: one system call (96 is gettimeofday), for what is slow in an emulated
/// guest is starting a program.
const CLOCK: &str = r#"setsid perl -MSocket -e 'socket(S, PF_INET, SOCK_DGRAM, 0) or die; bind(S, sockaddr_in(123, INADDR_ANY)) or die;
    while ($from = recv(S, $asked, 99, 0)) { $time = "\0" x 16; syscall(96, $time, 0); send(S, sprintf("%d.%06d", unpack("qq", $time)), 0, $from) }' \
    >/dev/null 2>&1 &"#;

/// How far a guest's clock may be from the host's, in seconds, and how well that must be known.
const CLOCK_LIMIT: f64 = 0.1;
const CLOCK_CERTAINTY: f64 = 0.02;

/// Asserts that the clock of a guest that runs [`CLOCK`] is right. Of many answers the quickest counts, against the middle of its
/// exchange, so that what the exchange itself takes is no part of the answer: it is the uncertainty. What was measured, as text.
fn check_clock(sandbox: &Sandbox) -> String {
    let address = format!("{}:123", sandbox.host_ip());
    let mut best = (f64::INFINITY, f64::INFINITY);
    let began = Instant::now();
    while best.0 > CLOCK_CERTAINTY / 4.0 && began.elapsed() < Duration::from_secs(30) {
        // One for each: a late answer to another question finds nobody.
        let socket = UdpSocket::bind("0.0.0.0:0").expect("bound");
        socket.connect(&address).expect("an address");
        socket
            .set_read_timeout(Some(Duration::from_secs(1)))
            .expect("it has one");
        let mut answer = [0; 32];
        let asked = now();
        // One that gets lost, or finds no server yet, is asked again.
        let Ok(length) = socket.send(b"?").and_then(|_| socket.recv(&mut answer)) else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        let answered = now();
        let theirs: f64 = std::str::from_utf8(&answer[..length])
            .ok()
            .and_then(|text| text.parse().ok())
            .expect("a time");
        let half = (answered - asked) / 2.0;
        if half < best.0 {
            best = (half, theirs - (asked + half));
        }
    }
    let (uncertainty, offset) = best;
    let measured = format!("{:.0} ms, known to {:.0} ms", offset * 1000.0, uncertainty * 1000.0);
    assert!(uncertainty < CLOCK_CERTAINTY, "the guest's clock is off by {measured}");
    assert!(offset.abs() < CLOCK_LIMIT, "the guest's clock is off by {measured}");
    measured
}

fn now() -> f64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970")
        .as_secs_f64()
}

/// What a sandbox's files take on disk.
fn allocated(id: &str) -> u64 {
    let output = Command::new("du")
        .args(["-s", "-B1", &format!("/var/lib/roost/sandboxes/{id}/vm")])
        .output()
        .expect("du runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace()
        .next()
        .and_then(|bytes| bytes.parse().ok())
        .unwrap_or_else(|| panic!("du said {text:?}"))
}

#[test]
fn a_paused_sandbox_is_on_disk_alone_and_goes_on_where_it_was() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256", "--env", "COLOUR=teal"]);
        let (id, ip) = (sandbox.id.clone(), sandbox.host_ip());
        sandbox.sh(CANARIES);
        sandbox.sh(CLOCK);
        check_clock(&sandbox);
        let uuid = sandbox.sh("cat /proc/sys/kernel/random/boot_id");
        sandbox.pause();

        let there = Census::take();
        for kind in ["dm device", "loop", "veth", "network namespace", "process", "socket"] {
            // What the kernel removes in its own time.
            eventually("nothing but files", || (Census::take().count(kind) == 0).then_some(()));
        }
        assert!(
            there.lists("file", &format!("/var/lib/roost/sandboxes/{id}")),
            "{there:?}"
        );
        assert!(!there.lists("file", "/run/roost/vm"), "{there:?}");
        assert!(find(&id).is_none(), "a control plane would take it for running");
        let listed = find_paused(&id).expect("listed");
        assert_eq!((&listed["status"], &listed["hostIp"]), (&json!("paused"), &json!(ip)));
        let listing = call("ListSandboxes", &json!({}));
        assert_eq!(listing.body["autoPausedSandboxIds"], json!([id]));
        assert!(roost::ok(&["ls"]).contains("paused"));
        assert!(roost::fails(&["exec", &id, "--", "true"]).contains("is paused"));
        assert!(roost::fails(&["ping", &id]).contains("is paused"));
        // 256 MiB of memory, of which most was never used.
        let size = allocated(&id);
        assert!((1 << 20..200 << 20).contains(&size), "the snapshot takes {size} bytes");
        sandbox.pause();
        // Its place in the network is kept.
        let other = Sandbox::create(&["--memory", "256"]);
        assert_ne!(other.host_ip(), ip);
        drop(other);

        sandbox.resume();
        assert_eq!(sandbox.host_ip(), ip);
        assert_eq!(
            sandbox.sh("cat /proc/sys/kernel/random/boot_id"),
            uuid,
            "it booted anew"
        );
        let count = check(&sandbox);
        eventually("the counter to go on", || (check(&sandbox) > count).then_some(()));
        assert_eq!(sandbox.sh("echo $COLOUR"), "teal");
        check_clock(&sandbox);
        assert_eq!(find(&id).expect("listed")["status"], "running");
        assert!(find_paused(&id).is_none());
        eventually("the snapshot to be gone", || (allocated(&id) < 1 << 20).then_some(()));
        sandbox.resume();
        sandbox.sh("echo written after the resume > /root/after && sync");
        assert_eq!(
            sandbox.sh("curl --version >/dev/null 2>&1; cat /root/after"),
            "written after the resume"
        );

        // What a resume leaves out stays, and what it names is another from now on.
        sandbox.pause();
        let wish = json!({"sandboxId": id, "timeoutSec": 4321, "defaultEnv": {"COLOUR": "red"}});
        let answer = call("ResumeSandbox", &wish);
        assert_eq!(
            (&answer.body["status"], &answer.body["hostIp"]),
            (&json!("running"), &json!(ip)),
            "{answer:?}"
        );
        assert_eq!(find(&id).expect("listed")["timeoutSec"], 4321);
        assert_eq!(sandbox.sh("echo $COLOUR"), "red");
        sandbox.pause();
        sandbox.resume();
        assert_eq!(find(&id).expect("listed")["timeoutSec"], 4321);
        assert_eq!(
            sandbox.sh("echo $COLOUR; cat /root/after"),
            "red\nwritten after the resume"
        );
    });
}

/// What a sandbox and its host have in use, in bytes.
#[derive(Debug, Clone, Copy)]
struct Use {
    /// Its last snapshot.
    snapshot: u64,
    /// The guest's memory that is not to be had (without what it can give back).
    guest: u64,
    /// The VMM's own and the guest's, in the host's eyes.
    vm: u64,
    agent: u64,
    privd: u64,
}

impl Use {
    /// Of a sandbox that runs, and the only one. What the kernel can take back at any time is not counted: it depends on what else there is.
    fn of(sandbox: &Sandbox, snapshot: u64) -> Self {
        let kib: u64 = sandbox
            .sh("awk '/MemTotal/ {all = $2} /MemAvailable/ {print all - $2}' /proc/meminfo")
            .parse()
            .expect("a number");
        let [vmm] = pids(vmm_command())[..] else {
            panic!("one VMM runs")
        };
        let memory = |process| {
            let cgroup = std::fs::read_to_string(format!("/proc/{process}/cgroup")).expect("it runs");
            let cgroup = cgroup.trim().strip_prefix("0::").expect("cgroups of version 2");
            let stat = std::fs::read_to_string(format!("/sys/fs/cgroup{cgroup}/memory.stat")).expect("it has memory");
            let own = stat.lines().find_map(|line| line.strip_prefix("anon "));
            own.and_then(|own| own.parse().ok()).expect("a number")
        };
        let daemon = |name| *pids(name).first().expect("it runs");
        Self {
            snapshot,
            guest: kib << 10,
            vm: memory(vmm),
            agent: memory(daemon("roost-agent")),
            privd: memory(daemon("roost-privd")),
        }
    }
}

#[test]
fn many_pauses_in_a_row_lose_nothing_and_grow_nothing() {
    let cycles = if is_full_size() { 10 } else { 2 };
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.sh(CANARIES);
        sandbox.sh(CLOCK);
        // Writes to disk all the while, each file with its sum behind it.
        sandbox.sh(
            "mkdir /root/log; setsid bash -c 'i=0; while true; do i=$((i+1)); head -c 20000 /dev/urandom > /root/log/new
             sha256sum < /root/log/new > /root/log/$i.sum; mv /root/log/new /root/log/$i; sleep 1; done' >/dev/null 2>&1 & echo $!",
        );
        let (mut count, mut uses) = (0, Vec::new());
        for cycle in 1..=cycles {
            sandbox.pause();
            let snapshot = allocated(&sandbox.id);
            sandbox.resume();
            let clock = check_clock(&sandbox);
            let next = check(&sandbox);
            assert!(
                next >= count,
                "cycle {cycle}: the counter went back from {count} to {next}"
            );
            count = next;
            let files = sandbox.sh(
                "cd /root/log; n=0; for sum in *.sum; do f=${sum%.sum}; test -e $f || continue; sha256sum < $f | cmp -s - $sum || echo bad $f; n=$((n+1)); done; echo $n",
            );
            assert!(!files.contains("bad") && files != "0", "cycle {cycle}: {files}");
            let used = Use::of(&sandbox, snapshot);
            eprintln!("NOTE: cycle {cycle}: {files} files, clock off by {clock}, {used:?}");
            uses.push(used);
        }
        let first = uses[0];
        // By how much the later ones may exceed the first; seen in ten cycles: 3 MB, 0.4 MB, 17 MB, 0.25 MB, 0.05 MB. A program that starts in
        // the guest just then has some of its memory; what the guest reads and writes in between is in its page cache, which a VM and a
        // snapshot hold and a guest can give back; and allocators keep some for the next time. A snapshot that holds what was never used
        // would be three times as large.
        type Reading = fn(&Use) -> u64;
        let bounds: [(&str, Reading, u64); 5] = [
            ("a snapshot", |used| used.snapshot, first.snapshot / 10),
            ("the guest", |used| used.guest, 3 << 20),
            ("the VM", |used| used.vm, first.vm / 3),
            ("the agent", |used| used.agent, 1 << 20),
            ("privd", |used| used.privd, 1 << 19),
        ];
        for (what, of, spare) in bounds {
            let most = uses.iter().map(of).max().expect("there are some");
            assert!(most <= of(&first) + spare, "{what} grows: {uses:#?}");
        }
    });
}

/// What it has read and written before, and not what it uses, is most of a guest's memory. It is on its disk, so it need not be in its snapshot.
#[test]
fn what_a_guest_has_only_cached_is_no_part_of_its_snapshot() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256", "--disk", "1024"]);
        sandbox.pause();
        let before = allocated(&sandbox.id);
        sandbox.resume();
        sandbox.sh("head -c 64M /dev/urandom > /root/cached && sync && sha256sum /root/cached > /root/sum");
        sandbox.pause();
        let after = allocated(&sandbox.id);
        eprintln!("NOTE: {before} bytes, and with 64 MiB more in the guest's cache {after}");
        assert!(after < before + (24 << 20), "{before} bytes became {after}");
        sandbox.resume();
        assert_eq!(
            sandbox.sh("cd / && sha256sum --check --quiet /root/sum && echo whole"),
            "whole"
        );
    });
}

#[test]
fn a_paused_sandbox_can_be_destroyed_as_it_is() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.pause();
        roost::ok(&["rm", &sandbox.id]);
        assert!(find_paused(&sandbox.id).is_none());
        assert!(roost::fails(&["resume", &sandbox.id]).contains("no sandbox"));
        sandbox.forget();
    });
}

#[test]
fn a_sandbox_boots_from_its_disk_alone_where_its_memory_cannot_be_used() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.sh(CANARIES);
        let boot = sandbox.sh("cat /proc/sys/kernel/random/boot_id");
        sandbox.pause();
        let state = format!("/var/lib/roost/sandboxes/{}/vm/2/state.json", sandbox.id);
        let whole = std::fs::read(&state).expect("read");
        std::fs::write(&state, [b" ", &whole[1..]].concat()).expect("written");
        let error = roost::fails(&["resume", &sandbox.id]);
        assert!(
            error.contains("state.json") && error.contains("from its disk alone"),
            "{error}"
        );
        // Refused before anything was started, so with the damage mended all is as it was.
        assert!(pids("roost-vmmshim").is_empty());
        std::fs::write(&state, whole).expect("written");
        sandbox.resume();
        check(&sandbox);

        sandbox.pause();
        roost::ok(&["resume", "--disk-only", &sandbox.id]);
        assert_ne!(sandbox.sh("cat /proc/sys/kernel/random/boot_id"), boot);
        assert_eq!(
            sandbox.sh("sha256sum < /root/disk | diff - /root/disk.sum && echo same"),
            "same"
        );
        // And from there on as any other.
        sandbox.pause();
        sandbox.resume();
        assert_eq!(sandbox.sh("test -e /dev/shm/count && echo there || echo gone"), "gone");
    });
}

#[test]
fn a_resume_whose_vmm_dies_leaves_it_paused_and_the_next_one_works() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.sh(CANARIES);
        for victim in ["roost-vmmshim", vmm_command()] {
            sandbox.pause();
            let resume = roost::start(&["resume", &sandbox.id]);
            eventually("the victim", || (!pids(victim).is_empty()).then_some(()));
            kill_9(victim);
            let output = resume.wait_with_output().expect("it ends");
            if !output.status.success() {
                let listed = find_paused(&sandbox.id);
                assert!(listed.is_some(), "{}", String::from_utf8_lossy(&output.stderr));
                sandbox.resume();
            }
            check(&sandbox);
        }
    });
}

#[test]
fn callers_that_go_away_and_come_back_find_one_pause_and_one_resume() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.sh(CANARIES);
        let mut first = roost::start(&["pause", &sandbox.id]);
        eventually("the pause to begin", || {
            find(&sandbox.id)
                .is_none_or(|listed| listed["status"] == "pausing")
                .then_some(())
        });
        first.kill().expect("killed");
        first.wait().expect("reaped");
        let others = [0, 1].map(|_| roost::start(&["pause", &sandbox.id]));
        for other in others {
            let output = other.wait_with_output().expect("it ends");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        assert!(find_paused(&sandbox.id).is_some());
        let resumes = [0, 1, 2].map(|_| roost::start(&["resume", &sandbox.id]));
        for resume in resumes {
            let output = resume.wait_with_output().expect("it ends");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        check(&sandbox);
    });
}

#[test]
fn a_destroy_wins_over_a_pause_and_over_a_resume() {
    in_rig(|| {
        for paused in [false, true] {
            let sandbox = Sandbox::create(&["--memory", "256"]);
            let under_way = if paused {
                sandbox.pause();
                "resume"
            } else {
                "pause"
            };
            let call = roost::start(&[under_way, &sandbox.id]);
            eventually("it to begin", || {
                let status = find(&sandbox.id).map(|listed| listed["status"].clone());
                (status == Some(json!(format!("{}ing", under_way.trim_end_matches('e'))))).then_some(())
            });
            roost::ok(&["rm", &sandbox.id]);
            call.wait_with_output().expect("it ends");
            assert!(find(&sandbox.id).is_none() && find_paused(&sandbox.id).is_none());
            sandbox.forget();
        }
    });
}

#[test]
fn an_agent_killed_at_any_moment_of_a_pause_or_resume_loses_nothing() {
    let moments: &[u64] = if is_full_size() {
        &[0, 100, 200, 400, 700, 1000, 1500, 2000, 3000, 4000]
    } else {
        &[700]
    };
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.sh(CANARIES);
        for moment in moments {
            for call in ["pause", "resume"] {
                let under_way = roost::start(&[call, &sandbox.id]);
                std::thread::sleep(Duration::from_millis(*moment));
                kill_9("roost-agent");
                under_way.wait_with_output().expect("it ends");
                wait_for_agent();
                let is = |found: Option<serde_json::Value>| found.map(|found| found["status"].clone());
                eventually(&format!("it to come to rest after {moment} ms of a {call}"), || {
                    let state = is(find(&sandbox.id)).or_else(|| is(find_paused(&sandbox.id)));
                    // A guest that was frozen when its agent was killed is thawed first.
                    assert!(
                        [json!("running"), json!("paused"), json!("pausing")].contains(state.as_ref().expect("lost")),
                        "killed {moment} ms into a {call}: {state:?}"
                    );
                    (state != Some(json!("pausing"))).then_some(())
                });
                // Whatever it has come to, both work, and everything is there.
                sandbox.resume();
                check(&sandbox);
                if call == "pause" {
                    sandbox.pause();
                }
            }
        }
    });
}

#[test]
fn a_sandbox_that_nobody_uses_is_paused_and_one_in_use_is_not() {
    in_rig(|| {
        let chatty = Sandbox::create(&["--memory", "128", "--timeout", "60"]);
        // Some 40 KiB a second, whoever takes them.
        chatty.sh("setsid bash -c 'exec 9<> <(:) 8>/dev/udp/169.254.0.22/9; printf -v words %8192s; until read -rt 0.2 -u 9; do echo \"$words\" >&8; done' \
                   >/dev/null 2>&1 &");
        let used = Sandbox::create(&["--memory", "128", "--timeout", "60"]);
        // The last, so that its time begins with what follows.
        let idle = Sandbox::create(&["--memory", "128", "--timeout", "60"]);
        let began = Instant::now();
        // One call is use for as long as it takes.
        let call = roost::start(&["exec", "--timeout", "110", &used.id, "--", "sleep", "80"]);
        eventually("the idle one to be paused", || find_paused(&idle.id));
        assert!(
            began.elapsed() > Duration::from_secs(50),
            "paused after {:?}",
            began.elapsed()
        );
        for sandbox in [&used, &chatty] {
            assert_eq!(find(&sandbox.id).expect("listed")["status"], "running");
        }
        let output = call.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let events = std::fs::read_to_string("/var/lib/roost/outbox/events.log").expect("an outbox");
        assert!(
            events.contains("sandbox.auto_paused") && events.contains(&idle.id),
            "{events}"
        );
        idle.resume();
        assert_eq!(idle.sh("echo back"), "back");
        assert_eq!(
            find(&chatty.id).expect("listed")["status"],
            "running",
            "its network counts for nothing"
        );
    });
}

#[test]
#[ignore = "at full size only: cargo xtask test --all"]
fn a_guest_at_work_is_not_idle_and_one_that_cannot_be_paused_when_it_is_idle_ends_and_says_so() {
    in_rig(|| {
        let busy = Sandbox::create(&["--memory", "128", "--timeout", "60"]);
        // Nothing but its processor: no disk, no network, and nobody calls.
        busy.sh("setsid bash -c 'while true; do :; done' >/dev/null 2>&1 & echo $! > /dev/shm/busy.pid");
        let deaf = Sandbox::create(&["--memory", "128", "--timeout", "60"]);
        // envd cannot be told to freeze it any more: its own fault, so it must not hold its memory for ever.
        drop(deaf.exec(&[
            "/bin/bash",
            "-c",
            "setsid bash -c 'sleep 1; echo 0x1002 > /sys/class/net/eth0/flags' >/dev/null 2>&1 &",
        ]));
        let began = Instant::now();
        let id = deaf.forget();
        // A minute, and three attempts, after each of which it has two minutes to thaw.
        while find(&id).is_some() {
            assert!(began.elapsed() < 3 * PATIENCE, "it stays");
            std::thread::sleep(Duration::from_secs(1));
        }
        let tombstone = tombstone(&id);
        assert!(
            began.elapsed() > Duration::from_secs(50),
            "gone after {:?}",
            began.elapsed()
        );
        assert_eq!(tombstone["reason"], "not_paused", "{tombstone}");
        assert!(find_paused(&id).is_none());
        let why = roost::ok(&["why", &id]);
        assert!(
            why.contains("could not be paused") && why.contains("not_paused"),
            "{why}"
        );
        let events = std::fs::read_to_string("/var/lib/roost/outbox/events.log").expect("an outbox");
        assert!(events.contains("sandbox.stopped") && events.contains(&id), "{events}");
        // It has been left alone for longer.
        assert_eq!(
            find(&busy.id).expect("its processor counts for nothing")["status"],
            "running"
        );
    });
}

#[test]
fn a_host_is_drained_by_its_unit_and_takes_work_again_when_the_agent_is_started_anew() {
    in_rig(|| {
        let running = Sandbox::create(&["--memory", "256"]);
        running.sh(CANARIES);
        let paused = Sandbox::create(&["--memory", "256"]);
        paused.pause();
        let half = roost::start(&["create", "--memory", "256", "--id", "half"]);
        eventually("the create to be accepted", || find("half"));
        // As at a shutdown: started with the host, stopped first, and by what goes before it, not by hand.
        systemctl(&["start", "roost-drain.service"]);
        let by_hand = Command::new("systemctl").args(["stop", "roost-drain.service"]).output();
        assert!(
            !by_hand.expect("systemctl runs").status.success(),
            "stopping a unit empties a host"
        );
        assert!(find(&running.id).is_some());
        let shutdown = "[Unit]\nDefaultDependencies=no\nConflicts=roost-drain.service\nAfter=roost-drain.service\n";
        std::fs::write("/run/systemd/system/as-shutdown.target", shutdown).expect("written");
        systemctl(&["daemon-reload"]);
        systemctl(&["start", "as-shutdown.target"]);
        half.wait_with_output().expect("it ends");
        systemctl(&["stop", "as-shutdown.target"]);
        assert!(find_paused(&running.id).is_some() && find_paused(&paused.id).is_some());
        assert!(find("half").is_none() && find_paused("half").is_none());
        for refused in [&["create"][..], &["resume", &paused.id]] {
            let error = roost::fails(refused);
            assert!(error.contains("being drained"), "{error}");
        }
        systemctl(&["restart", "roost-agent.service"]);
        wait_for_agent();
        running.resume();
        check(&running);
        paused.resume();
    });
}

#[test]
fn a_host_that_is_given_up_pauses_everything_and_its_agent_stays_away_until_it_is_started() {
    in_rig(|| {
        let running = Sandbox::create(&["--memory", "128"]);
        running.sh(CANARIES);
        let before = Instant::now();
        let answer = call("Terminate", &json!({}));
        assert_eq!(answer.status, 200, "{answer:?}");
        // Answered first, and done then.
        let answered = before.elapsed();
        eventually("the agent to end", || pids("roost-agent").is_empty().then_some(()));
        assert!(answered < before.elapsed(), "{answered:?}");
        assert!(pids(vmm_command()).is_empty(), "a VM was left without an agent");
        eventually("the unit to be inactive, and not about to start again", || {
            let state = Command::new("systemctl")
                .args(["is-active", "roost-agent.service"])
                .output()
                .expect("systemctl runs");
            (state.stdout == b"inactive\n").then_some(())
        });
        systemctl(&["start", "roost-agent.service"]);
        wait_for_agent();
        assert!(find_paused(&running.id).is_some());
        running.resume();
        check(&running);
    });
}

#[test]
fn memory_that_is_still_being_loaded_is_waited_for_before_the_next_pause() {
    in_rig(|| {
        let config = AgentConfig::with("restore_memory = \"on_demand\"\n");
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.sh(CANARIES);
        for _ in 0..2 {
            sandbox.pause();
            sandbox.resume();
            let [vmm] = pids(vmm_command())[..] else {
                panic!("one VMM runs")
            };
            let words = std::fs::read_to_string(format!("/proc/{vmm}/cmdline")).expect("it runs");
            assert!(words.contains("memory_restore_mode=ondemand"), "{words:?}");
            // At once: most of its memory has not been touched yet.
        }
        check(&sandbox);
        drop(config);
    });
}

fn systemctl(args: &[&str]) {
    let output = Command::new("systemctl").args(args).output().expect("systemctl runs");
    assert!(
        output.status.success(),
        "systemctl {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

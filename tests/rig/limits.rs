//! Where a sandbox's or a host's room ends: guests that end themselves, hosts that fill up, guests that are at work although nobody
//! calls, and hosts that are given up.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roost_tests::disk::{Filler, run};
use roost_tests::roost::{self, AgentConfig, Sandbox, find, find_paused, pids, tombstone};
use roost_tests::{eventually, in_rig};

const DATA: &str = "/var/lib/roost";
/// Longer than the agent takes to look at its disk twice.
const TWO_LOOKS: Duration = Duration::from_secs(5);
const MIB: u64 = 1 << 20;

/// What a sandbox's disk has allocated.
fn disk(sandbox: &Sandbox) -> u64 {
    let cow = std::fs::metadata(format!("{DATA}/sandboxes/{}/rootfs.cow", sandbox.id));
    cow.expect("it is there").blocks() * 512
}

/// Has a guest write on and on to new places of its disk, at most so many MiB.
fn write_on(sandbox: &Sandbox, mebibytes: u64) {
    sandbox.sh(&format!(
        "setsid bash -c 'for i in {{1..{}}}; do head -c 262144 /dev/urandom > /root/grows.$i; sync; done' >/dev/null 2>&1 &",
        mebibytes * 4
    ));
}

#[test]
fn a_sandboxs_disk_is_no_faster_than_its_host_allows() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.pause();
        let limited = AgentConfig::with("[rate_limits]\ndisk_mb_per_sec = 2\n");
        sandbox.resume();
        // A second's worth may come at once.
        let least = Duration::from_secs(5);
        let began = std::time::Instant::now();
        sandbox.sh("dd if=/dev/vda of=/dev/null bs=1M count=14 iflag=direct");
        let took = began.elapsed();
        assert!(took > least, "its guest took {took:?}");
        // A VMM that was taken over asks nobody's limiter but its cgroup's.
        let [vmm] = pids(roost::vmm_command())[..] else {
            panic!("one VMM runs")
        };
        let cgroup = std::fs::read_to_string(format!("/proc/{vmm}/cgroup")).expect("it runs");
        let cgroup = cgroup.trim().strip_prefix("0::").expect("cgroups of version 2");
        let disk = roost::disk_of(&sandbox.id).expect("it has a disk");
        let began = std::time::Instant::now();
        let read = format!("dd if=/dev/{disk} of=/dev/null bs=1M count=14 iflag=direct");
        let inside = format!("echo $$ > /sys/fs/cgroup{cgroup}/cgroup.procs && exec {read}");
        run("bash", &["-c", &inside]);
        let took = began.elapsed();
        assert!(took > least, "what runs in its cgroup took {took:?}");
        drop(limited);
    });
}

#[test]
fn a_guest_that_panics_or_reboots_is_a_sandbox_gone_and_says_which() {
    in_rig(|| {
        for (trigger, reason, said) in [
            ("c", "guest_panic", "kernel panicked"),
            ("b", "guest_reset", "rebooted"),
        ] {
            let sandbox = Sandbox::create(&["--memory", "256"]);
            // The answer is lost with the guest.
            drop(sandbox.exec(&[
                "/bin/bash",
                "-c",
                &format!("echo 1 > /proc/sys/kernel/sysrq; echo {trigger} > /proc/sysrq-trigger; sleep 60"),
            ]));
            let id = sandbox.forget();
            let tombstone = tombstone(&id);
            assert_eq!(tombstone["reason"], reason, "{tombstone}");
            let console = tombstone["console_tail"].as_str().expect("a console");
            assert_eq!(
                console.contains("Kernel panic - not syncing"),
                reason == "guest_panic",
                "{console}"
            );
            let why = roost::ok(&["why", &id]);
            assert!(why.contains(said) && why.contains(reason), "{why}");
            let events = std::fs::read_to_string("/var/lib/roost/outbox/events.log").expect("an outbox");
            assert!(events.contains("sandbox.error") && events.contains(&id), "{events}");
        }
    });
}

#[test]
fn a_host_whose_disk_fills_up_takes_no_work_then_holds_who_fills_it_and_goes_on_with_room() {
    in_rig(|| {
        let (running, paused) = (
            Sandbox::create(&["--memory", "128"]),
            Sandbox::create(&["--memory", "128"]),
        );
        running.plant();
        paused.plant();
        paused.pause();
        let calls = [&["create"][..], &["resume", &paused.id]];

        // Kept are 256 MiB, and what one small guest has of memory, which is at most 128.
        let filler = Filler::leave(Path::new(DATA), 225 * MIB);
        std::thread::sleep(TWO_LOOKS);
        for call in calls {
            let error = roost::fails(call);
            assert!(error.contains("no room") && error.contains("unavailable"), "{error}");
        }
        // There is more than half of it: what runs is left alone.
        running.is_whole();
        drop(filler);

        write_on(&running, 60);
        let filler = Filler::leave(Path::new(DATA), 100 * MIB);
        // One that is under way when the guest stands still is not to be waited for.
        let exec = || roost::roost(&["exec", "--timeout", "10", &running.id, "--", "/bin/true"]);
        eventually("the guest to be held", || {
            let output = exec();
            String::from_utf8_lossy(&output.stderr)
                .contains("is held")
                .then_some(())
        });
        assert_eq!(find(&running.id).expect("listed")["status"], "running");
        // What it wrote before is on its way still.
        run("sync", &[]);
        let held_at = disk(&running);
        std::thread::sleep(TWO_LOOKS);
        run("sync", &[]);
        assert_eq!(disk(&running), held_at, "a guest that is held writes");
        drop(filler);

        eventually("the guest to run again", || exec().status.success().then_some(()));
        running.is_whole();
        eventually("new work to be taken", || {
            roost::roost(&["resume", &paused.id]).status.success().then_some(())
        });
        paused.is_whole();
        running.pause();
        running.resume();
        running.is_whole();
    });
}

#[test]
fn a_sandbox_whose_disk_found_no_room_has_ended_and_says_so_and_a_paused_one_has_lost_nothing() {
    in_rig(|| {
        let (writer, paused) = (
            Sandbox::create(&["--memory", "128"]),
            Sandbox::create(&["--memory", "128"]),
        );
        paused.plant();
        paused.pause();
        write_on(&writer, 60);
        // Without anybody to hold it.
        let [agent] = pids("roost-agent")[..] else {
            panic!("one agent runs")
        };
        let signal = |signal| kill(Pid::from_raw(agent), signal).expect("it runs");
        signal(Signal::SIGSTOP);
        let filler = Filler::fill(Path::new(DATA));
        let disk = roost_common::names::disk(&writer.id.parse().expect("an id"));
        eventually("its disk to be lost", || {
            run("dmsetup", &["status", &disk]).contains("Invalid").then_some(())
        });
        signal(Signal::SIGCONT);
        let id = writer.forget();
        // What its removal gave back has room for this.
        let tombstone = tombstone(&id);
        assert_eq!(tombstone["reason"], "disk_lost", "{tombstone}");
        drop(filler);
        assert!(find_paused(&paused.id).is_some());
        eventually("work to be taken", || {
            roost::roost(&["resume", &paused.id]).status.success().then_some(())
        });
        paused.is_whole();
    });
}

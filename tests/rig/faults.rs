//! `kill -9` of every process while a sandbox runs.

use std::process::Command;

use roost_tests::census::Census;
use roost_tests::roost::{self, Sandbox, find, kill_9, kill_9_pid, pids, tombstone, vmm_command, wait_for_agent};
use roost_tests::{eventually, in_rig, is_full_size};

#[test]
fn a_killed_vmm_is_a_sandbox_gone_with_its_reason() {
    in_rig(|| {
        let id = Sandbox::create(&["--memory", "256"]).forget();
        kill_9(vmm_command());
        let tombstone = tombstone(&id);
        assert_eq!(
            (&tombstone["reason"], &tombstone["signal"]),
            (&"vmm_killed".into(), &9.into()),
            "{tombstone}"
        );
        let error = roost::fails(&["exec", &id, "--", "true"]);
        assert!(error.contains("signal 9"), "{error}");
        let why = roost::ok(&["why", &id]);
        assert!(why.contains("signal 9") && why.contains("vmm_killed"), "{why}");
        assert!(roost::fails(&["why", "never-was"]).contains("no sandbox never-was"));
    });
}

#[test]
fn a_guest_that_powers_off_is_a_sandbox_gone_with_its_console() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        // The answer is lost with the guest.
        drop(sandbox.exec(&[
            "/bin/bash",
            "-c",
            "echo last words > /dev/console; echo o > /proc/sysrq-trigger; sleep 60",
        ]));
        let id = sandbox.forget();
        let tombstone = tombstone(&id);
        assert_eq!(tombstone["reason"], "guest_powered_off", "{tombstone}");
        assert!(
            tombstone["console_tail"]
                .as_str()
                .is_some_and(|tail| tail.contains("last words")),
            "{tombstone}"
        );
    });
}

#[test]
#[ignore = "at full size only: cargo xtask test --all"]
fn a_vmm_that_the_kernel_ends_for_memory_is_a_sandbox_gone_and_says_so() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "512"]);
        let [vmm] = pids(vmm_command())[..] else {
            panic!("one VMM runs")
        };
        let cgroup = std::fs::read_to_string(format!("/proc/{vmm}/cgroup")).expect("it runs");
        let cgroup = cgroup.trim().strip_prefix("0::").expect("cgroups of version 2");
        let file = |name: &str| format!("/sys/fs/cgroup{cgroup}/{name}");
        let now: u64 = std::fs::read_to_string(file("memory.current"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .expect("a number");
        // More than it has: less would have the kernel end all there is in the cgroup, the shim too, before this is written.
        std::fs::write(file("memory.max"), (now + (8 << 20)).to_string()).expect("root may");
        let script = "mkdir -p /dev/shm; head -c 200M /dev/zero > /dev/shm/much";
        let output = sandbox.exec(&["/bin/bash", "-c", script]);
        assert!(!output.status.success(), "there was room for it");
        let tombstone = tombstone(&sandbox.id);
        let id = sandbox.forget();
        assert_eq!(tombstone["reason"], "out_of_memory", "{tombstone}");
        let why = roost::ok(&["why", &id]);
        assert!(
            why.contains("ran out of memory") && why.contains("out_of_memory"),
            "{why}"
        );
        let error = roost::fails(&["exec", &id, "--", "true"]);
        assert!(error.contains("ran out of memory"), "{error}");
    });
}

#[test]
#[ignore = "at full size only: cargo xtask test --all"]
fn a_vmm_that_ends_by_itself_is_a_sandbox_gone_with_its_exit_code() {
    if vmm_command() != "standin-vmm" {
        eprintln!("NOT TESTED: there is no way to have a real VMM end with an error");
        return;
    }
    in_rig(|| {
        let id = Sandbox::create(&["--memory", "128"]).forget();
        // The stand-in's own QEMU, without which it ends.
        kill_9("qemu-system-x86");
        let tombstone = tombstone(&id);
        assert_eq!(
            (&tombstone["reason"], &tombstone["exit_code"]),
            (&"vmm_exited".into(), &1.into()),
            "{tombstone}"
        );
        let why = roost::ok(&["why", &id]);
        assert!(why.contains("exit code 1") && why.contains("vmm_exited"), "{why}");
    });
}

#[test]
fn a_killed_shim_takes_its_vmm_along() {
    in_rig(|| {
        let id = Sandbox::create(&["--memory", "256"]).forget();
        kill_9("roost-vmmshim");
        eventually("the VMM to be gone", || pids(vmm_command()).is_empty().then_some(()));
        eventually("the sandbox to be gone", || find(&id).is_none().then_some(()));
        assert_eq!(tombstone(&id)["reason"], "shim_lost");
    });
}

#[test]
fn a_killed_privd_is_not_noticed_by_a_sandbox_nor_by_the_next_create() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        kill_9("roost-privd");
        assert_eq!(
            sandbox.sh("echo still here; dd if=/dev/zero of=/x bs=1M count=8 oflag=direct 2>/dev/null; sync"),
            "still here"
        );
        let next = Sandbox::create(&["--memory", "256"]);
        assert_eq!(next.sh("echo and one more"), "and one more");
    });
}

#[test]
fn a_killed_agent_leaves_guests_running_and_the_next_one_takes_them_over() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256", "--env", "COLOUR=teal"]);
        let ip = sandbox.host_ip();
        sandbox.sh("setsid sleep 12345 >/dev/null 2>&1 & echo started");
        let vmm = pids(vmm_command());
        assert_eq!(vmm.len(), 1);
        // systemd would start it anew at once, and there would be no time without an agent to look at.
        let unattended = NoRestart::set();
        kill_9("roost-agent");
        eventually("the agent to be gone", || pids("roost-agent").is_empty().then_some(()));
        eventually("systemd to have noticed", || (unit_result() == "signal").then_some(()));
        assert_eq!(pids(vmm_command()), vmm, "the VMM ended with the agent");
        let health = roost::curl(&[&format!("http://{ip}:49983/health")]);
        assert_eq!(health.status, 204, "the guest does not answer: {health:?}");

        assert!(pids("roost-agent").is_empty(), "an agent was started meanwhile");
        drop(unattended);
        wait_for_agent();
        assert_eq!(pids(vmm_command()), vmm, "the VMM was not taken over");
        assert_eq!(sandbox.host_ip(), ip);
        assert_eq!(sandbox.sh("pgrep -c -x sleep; echo $COLOUR"), "1\nteal");
        let other = Sandbox::create(&["--memory", "256"]);
        assert_ne!(other.host_ip(), ip, "a slot was given out twice");
        // The next agent hears of its end as the first one would have.
        let id = sandbox.forget();
        kill_9_pid(vmm[0]);
        eventually("the sandbox to be gone", || find(&id).is_none().then_some(()));
        assert_eq!(tombstone(&id)["reason"], "vmm_killed");
    });
}

#[test]
fn a_vm_that_ended_while_no_agent_was_there_is_a_sandbox_gone_with_its_reason() {
    in_rig(|| {
        let id = Sandbox::create(&["--memory", "256"]).forget();
        let unattended = NoRestart::set();
        kill_9("roost-agent");
        eventually("systemd to have noticed", || (unit_result() == "signal").then_some(()));
        kill_9(vmm_command());
        eventually("the shim to be gone", || pids("roost-vmmshim").is_empty().then_some(()));
        drop(unattended);
        wait_for_agent();
        assert!(find(&id).is_none());
        let tombstone = tombstone(&id);
        assert_eq!(
            (&tombstone["reason"], &tombstone["signal"]),
            (&"vmm_killed".into(), &9.into()),
            "{tombstone}"
        );
    });
}

#[test]
fn an_agent_killed_in_the_middle_of_creates_leaves_nothing() {
    let (moments, apart) = if is_full_size() { (4, 500) } else { (2, 1500) };
    in_rig(|| {
        for moment in 0..moments {
            let create = roost::start(&["create", "--memory", "256", "--id", "half"]);
            eventually("the create to be accepted", || find("half"));
            std::thread::sleep(std::time::Duration::from_millis(apart * moment));
            kill_9("roost-agent");
            create.wait_with_output().expect("it ends");
            wait_for_agent();
            eventually("recovery to remove it", || {
                let census = Census::take();
                (find("half").is_none() && census.count("file") == 0 && census.count("process") == 0).then_some(())
            });
        }
    });
}

/// Keeps systemd from starting a killed agent anew, for as long as this value lives; the agent runs again afterwards, whatever
/// became of the test.
struct NoRestart(());

impl NoRestart {
    const DIR: &str = "/run/systemd/system/roost-agent.service.d";

    fn set() -> Self {
        let set = Self(());
        std::fs::create_dir_all(Self::DIR).expect("made");
        std::fs::write(format!("{}/no-restart.conf", Self::DIR), "[Service]\nRestart=no\n").expect("written");
        systemctl(&["daemon-reload"]);
        set
    }
}

impl Drop for NoRestart {
    fn drop(&mut self) {
        let removed = std::fs::remove_dir_all(Self::DIR);
        let restored = [
            "daemon-reload",
            "reset-failed roost-agent.service",
            "start roost-agent.service",
        ]
        .map(|words| Command::new("systemctl").args(words.split(' ')).output());
        // A test that fails anyway says why itself.
        if !std::thread::panicking() {
            removed.expect("removed");
            for output in restored {
                let output = output.expect("systemctl runs");
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
        }
    }
}

/// How the agent's unit ended last.
fn unit_result() -> String {
    systemctl(&["show", "--property=Result", "--value", "roost-agent.service"])
}

fn systemctl(args: &[&str]) -> String {
    let output = Command::new("systemctl").args(args).output().expect("it runs");
    assert!(
        output.status.success(),
        "systemctl {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

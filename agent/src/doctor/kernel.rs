//! What VMs and their disks and networks need of the kernel.

use std::os::unix::fs::MetadataExt as _;

use super::{Finding, Host};
use crate::config::RestoreMemory;

/// The oldest kernel on which roost is tested.
const OLDEST: (u32, u32) = (6, 1);
/// What the kernel loads at boot, one a line.
pub(super) const MODULES: &str = include_str!("../../../packaging/modules-load.d/roost.conf");
/// Devices that privd and VMMs open.
pub(super) const DEVICES: [&str; 4] = ["/dev/kvm", "/dev/mapper/control", "/dev/loop-control", "/dev/net/tun"];
/// What a VM's limits are kept by.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

pub(super) fn version(host: &Host) -> Vec<Finding> {
    let check = "kernel";
    let release = match host.read("/proc/sys/kernel/osrelease") {
        Ok(release) => release,
        Err(unseen) => return vec![Finding::not_checked(check, unseen)],
    };
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let finding = match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST => Finding::ok(check, release),
        _ => Finding::problem(
            check,
            format!("Linux {release} is older than 6.1"),
            "install a newer kernel",
        ),
    };
    vec![finding]
}

pub(super) fn cgroups(host: &Host) -> Vec<Finding> {
    let check = "cgroup v2";
    let advice = "boot with systemd.unified_cgroup_hierarchy=1 and without cgroup_disable=";
    let finding = match host.read("/sys/fs/cgroup/cgroup.controllers") {
        Ok(there) => {
            let is_there = |name: &&&str| there.split(' ').any(|one| one == **name);
            let missing: Vec<_> = CONTROLLERS.iter().filter(|name| !is_there(name)).copied().collect();
            if missing.is_empty() {
                Finding::ok(check, there)
            } else {
                Finding::problem(
                    check,
                    format!("without {}, VMs have no such limits", missing.join(", ")),
                    advice,
                )
            }
        }
        Err(unseen) if unseen.is_missing() => Finding::problem(
            check,
            "not mounted at /sys/fs/cgroup: VMs have no limits, and do not start",
            advice,
        ),
        Err(unseen) => Finding::not_checked(check, unseen),
    };
    vec![finding]
}

pub(super) fn landlock(host: &Host) -> Vec<Finding> {
    let check = "Landlock";
    let finding = match host.landlock {
        0 => Finding::problem(
            check,
            "the kernel has none: no VM starts",
            "boot with lsm=landlock,… before what is in /sys/kernel/security/lsm, with a kernel that has CONFIG_SECURITY_LANDLOCK",
        ),
        version => Finding::ok(check, format!("ABI {version} or newer")),
    };
    vec![finding]
}

pub(super) fn modules(host: &Host) -> Vec<Finding> {
    let check = "modules";
    let release = host.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let builtin = ["/usr/lib/modules", "/lib/modules"]
        .iter()
        .find_map(|dir| host.read(format!("{dir}/{release}/modules.builtin")).ok())
        .unwrap_or_default();
    // The kernel takes `-` and `_` in names of modules for the same.
    let builtin: Vec<_> = builtin
        .lines()
        .filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"))
        .map(|name| name.replace('-', "_"))
        .collect();
    let is_there =
        |name: &str| builtin.iter().any(|one| one == name) || host.metadata(format!("/sys/module/{name}")).is_ok();
    let wanted = MODULES
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty());
    let missing: Vec<_> = wanted.filter(|name| !is_there(name)).collect();
    let finding = if missing.is_empty() {
        Finding::ok(check, "all are loaded")
    } else {
        let names = missing.join(" ");
        Finding::problem(
            check,
            format!("not loaded: {names}"),
            format!("modprobe -a {names}; at boot /usr/lib/modules-load.d/roost.conf has it done"),
        )
    };
    vec![finding]
}

pub(super) fn devices(host: &Host) -> Vec<Finding> {
    let advice = |device| match device {
        "/dev/kvm" => {
            "switch virtualisation on in the firmware, and load kvm_intel or kvm_amd; a VM needs nested virtualisation"
        }
        _ => "load the modules dm_mod, loop and tun",
    };
    let mut findings: Vec<_> = DEVICES
        .iter()
        .map(|device| match host.metadata(device) {
            Ok(_) => Finding::ok("devices", *device),
            Err(unseen) if unseen.is_missing() => {
                Finding::problem("devices", format!("there is no {device}"), advice(*device))
            }
            Err(unseen) => Finding::not_checked("devices", unseen),
        })
        .collect();
    if let Ok(kvm) = host.metadata("/dev/kvm") {
        let is_groups = Some(kvm.gid()) == host.gid("kvm") && kvm.mode() & 0o060 == 0o060;
        if !is_groups && kvm.mode() & 0o006 != 0o006 {
            findings.push(Finding::problem(
                "devices",
                format!(
                    "/dev/kvm has mode {:04o} and is not for group kvm: VMMs cannot open it",
                    kvm.mode() & 0o7777
                ),
                "chgrp kvm /dev/kvm && chmod 0660 /dev/kvm; udev's rules say so by default",
            ));
        }
    }
    findings
}

pub(super) fn on_demand(host: &Host) -> Vec<Finding> {
    let check = "userfaultfd";
    let finding = match (host.config.restore_memory, host.metadata("/dev/userfaultfd")) {
        (RestoreMemory::Copy, _) => Finding::ok(check, "not needed with restore_memory = \"copy\""),
        (RestoreMemory::OnDemand, Ok(device)) => {
            if Some(device.gid()) == host.gid("roost-vm") && device.mode() & 0o060 == 0o060 {
                Finding::ok(check, "/dev/userfaultfd")
            } else {
                Finding::problem(
                    check,
                    "/dev/userfaultfd is not for group roost-vm: VMMs cannot open it",
                    "install udev/40-roost.rules and run udevadm trigger /dev/userfaultfd",
                )
            }
        }
        (RestoreMemory::OnDemand, Err(unseen)) if unseen.is_missing() => Finding::problem(
            check,
            "there is no /dev/userfaultfd, which restore_memory = \"on_demand\" needs",
            "take a kernel with CONFIG_USERFAULTFD, or restore_memory = \"copy\"",
        ),
        (RestoreMemory::OnDemand, Err(unseen)) => Finding::not_checked(check, unseen),
    };
    vec![finding]
}

pub(super) fn forwarding(host: &Host) -> Vec<Finding> {
    let check = "forwarding";
    let finding = match host.read("/proc/sys/net/ipv4/ip_forward") {
        Ok(value) if value == "1" => Finding::ok(check, "net.ipv4.ip_forward = 1"),
        Ok(value) => Finding::problem(
            check,
            format!("net.ipv4.ip_forward = {value}: sandboxes do not reach the internet"),
            "install sysctl.d/60-roost.conf and run sysctl --system; sandboxes that are there must be resumed anew",
        ),
        Err(unseen) => Finding::not_checked(check, unseen),
    };
    vec![finding]
}

#[cfg(test)]
mod tests {
    use super::super::host::fake::Fake;
    use super::super::{Text, examine};

    /// What is said of a good host once it has been changed, by those that are not well.
    fn bad(change: impl FnOnce(&mut Fake)) -> String {
        let mut fake = Fake::good();
        change(&mut fake);
        let findings = examine(&fake.host());
        let bad: Vec<_> = findings
            .into_iter()
            .filter(|finding| finding.state != super::super::State::Ok)
            .collect();
        Text(&bad).to_string()
    }

    #[test]
    fn each_thing_that_the_kernel_lacks_is_named() {
        type Change = fn(&mut Fake);
        let cases: [(Change, &str); 12] = [
            (
                |fake| fake.write("proc/sys/kernel/osrelease", "5.10.0-9"),
                "PROBLEM   kernel: Linux 5.10.0-9",
            ),
            (
                |fake| fake.write("proc/sys/kernel/osrelease", "odd"),
                "PROBLEM   kernel: Linux odd",
            ),
            (
                |fake| fake.remove("sys/fs/cgroup/cgroup.controllers"),
                "PROBLEM   cgroup v2: not mounted",
            ),
            (
                |fake| fake.write("sys/fs/cgroup/cgroup.controllers", "cpu pids"),
                "PROBLEM   cgroup v2: without memory,",
            ),
            (|fake| fake.landlock = 0, "PROBLEM   Landlock"),
            (
                |fake| fake.remove("sys/module/dm_snapshot"),
                "PROBLEM   modules: not loaded: dm_snapshot",
            ),
            (|fake| fake.remove("dev/kvm"), "PROBLEM   devices: there is no /dev/kvm"),
            (
                |fake| fake.remove("dev/net/tun"),
                "PROBLEM   devices: there is no /dev/net/tun",
            ),
            (
                |fake| fake.mode("dev/kvm", 0o600),
                "PROBLEM   devices: /dev/kvm has mode 0600",
            ),
            (
                |fake| fake.write("proc/sys/net/ipv4/ip_forward", "0"),
                "PROBLEM   forwarding",
            ),
            (
                |fake| fake.write("etc/roost/agent.toml", "restore_memory = \"on_demand\""),
                "PROBLEM   userfaultfd: there is no",
            ),
            (
                |fake| {
                    fake.write("etc/roost/agent.toml", "restore_memory = \"on_demand\"");
                    fake.write("dev/userfaultfd", "");
                    fake.mode("dev/userfaultfd", 0o600);
                },
                "PROBLEM   userfaultfd: /dev/userfaultfd is not for group roost-vm",
            ),
        ];
        for (change, said) in cases {
            let bad = bad(change);
            assert!(bad.starts_with(said), "{said:?} is not what comes first in\n{bad}");
        }
    }
}

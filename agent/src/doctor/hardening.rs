//! What a host of other people's guests had better have switched off.

use super::{Finding, Host, State};

/// A setting of the kernel that opens more than a host of guests needs.
struct Switch {
    check: &'static str,
    path: &'static str,
    is_open: fn(&str) -> bool,
    said: &'static str,
    advice: &'static str,
}

const SWITCHES: [Switch; 8] = [
    Switch {
        check: "same-page merging",
        path: "/sys/kernel/mm/ksm/run",
        is_open: |value| value == "1",
        said: "guests may share pages of memory, and learn from the time of a write what another has",
        advice: "echo 2 > /sys/kernel/mm/ksm/run, and disable ksm.service and ksmtuned.service",
    },
    Switch {
        check: "hyper-threading",
        path: "/sys/devices/system/cpu/smt/active",
        is_open: |value| value == "1",
        said: "two guests may run on one core, and learn from its caches what the other does",
        advice: "boot with nosmt, or echo off > /sys/devices/system/cpu/smt/control, unless all guests are one owner's",
    },
    Switch {
        check: "nested virtualisation",
        path: "/sys/module/kvm_intel/parameters/nested",
        is_open: |value| matches!(value, "1" | "Y"),
        said: "kvm_intel emulates virtualisation for guests, which none of roost's is offered: more of the kernel is open to a VMM",
        advice: "options kvm_intel nested=0 in /etc/modprobe.d/kvm.conf",
    },
    Switch {
        check: "nested virtualisation",
        path: "/sys/module/kvm_amd/parameters/nested",
        is_open: |value| matches!(value, "1" | "Y"),
        said: "kvm_amd emulates virtualisation for guests, which none of roost's is offered: more of the kernel is open to a VMM",
        advice: "options kvm_amd nested=0 in /etc/modprobe.d/kvm.conf",
    },
    Switch {
        check: "user namespaces",
        path: "/proc/sys/kernel/unprivileged_userns_clone",
        is_open: |value| value == "1",
        said: "any user may be root in a namespace of its own, which opens much of the kernel",
        advice: "kernel.unprivileged_userns_clone = 0 in /etc/sysctl.d; roost's units do without",
    },
    Switch {
        check: "BPF",
        path: "/proc/sys/kernel/unprivileged_bpf_disabled",
        is_open: |value| value == "0",
        said: "any user may load programs into the kernel",
        advice: "kernel.unprivileged_bpf_disabled = 1 in /etc/sysctl.d",
    },
    Switch {
        check: "io_uring",
        path: "/proc/sys/kernel/io_uring_disabled",
        is_open: |value| value == "0",
        said: "any user may use it, and most holes in kernels of late were there",
        advice: "kernel.io_uring_disabled = 2 in /etc/sysctl.d; nothing of roost uses it",
    },
    Switch {
        check: "ptrace",
        path: "/proc/sys/kernel/yama/ptrace_scope",
        is_open: |value| value == "0",
        said: "a program may look into all others of its user",
        advice: "kernel.yama.ptrace_scope = 1 in /etc/sysctl.d",
    },
];

pub(super) fn switches(host: &Host) -> Vec<Finding> {
    let one = |switch: &Switch| match host.read(switch.path) {
        Ok(value) if (switch.is_open)(&value) => Finding::warning(switch.check, switch.said, switch.advice),
        Ok(value) => Finding::ok(switch.check, format!("{} is {value}", switch.path)),
        Err(unseen) => Finding::not_checked(switch.check, unseen),
    };
    let mut findings: Vec<_> = SWITCHES.iter().map(one).collect();
    // One processor is of one maker.
    let is_other_makers =
        |finding: &Finding| finding.check == "nested virtualisation" && finding.state == State::NotChecked;
    let unseen = findings.iter().filter(|finding| is_other_makers(finding)).count();
    if unseen == 1 {
        findings.retain(|finding| !is_other_makers(finding));
    }
    findings.push(core_pattern(host));
    findings
}

/// A program that takes crashes is not kept from it by the limit that roost's units have on core files (core(5)); systemd's keeps to it by itself.
fn core_pattern(host: &Host) -> Finding {
    let check = "core dumps";
    match host.read("/proc/sys/kernel/core_pattern") {
        Ok(pattern) if pattern.starts_with('|') && !pattern.contains("/systemd-coredump ") => Finding::warning(
            check,
            format!(
                "a VMM that crashes is given to {}, with what it has of its guest",
                pattern.trim_start_matches('|')
            ),
            "kernel.core_pattern = core in /etc/sysctl.d; roost's units then write none",
        ),
        Ok(pattern) => Finding::ok(check, pattern),
        Err(unseen) => Finding::not_checked(check, unseen),
    }
}

pub(super) fn swap(host: &Host) -> Vec<Finding> {
    let check = "swap";
    let swaps = match host.read("/proc/swaps") {
        Ok(swaps) => swaps,
        Err(unseen) => return vec![Finding::not_checked(check, unseen)],
    };
    let is_open = |path: &&str| {
        let name = path.rsplit('/').next().unwrap_or_default();
        let is_encrypted = host
            .read(format!("/sys/class/block/{name}/dm/uuid"))
            .is_ok_and(|uuid| uuid.starts_with("CRYPT-"));
        // Compressed, in memory.
        !is_encrypted && !name.starts_with("zram")
    };
    let paths = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let open: Vec<_> = paths.filter(is_open).collect();
    let finding = if open.is_empty() {
        Finding::ok(check, "none, or none that can be read")
    } else {
        Finding::warning(
            check,
            format!("guests' memory may be written to {}, in the clear", open.join(", ")),
            "swapoff -a and remove it from /etc/fstab, or encrypt it (crypttab, option swap)",
        )
    };
    vec![finding]
}

pub(super) fn vulnerabilities(host: &Host) -> Vec<Finding> {
    let check = "processor";
    let dir = "/sys/devices/system/cpu/vulnerabilities";
    let names = match host.names(dir) {
        Ok(names) => names,
        Err(unseen) => return vec![Finding::not_checked(check, unseen)],
    };
    let is_open = |name: &String| {
        host.read(format!("{dir}/{name}"))
            .is_ok_and(|text| text.starts_with("Vulnerable"))
    };
    let open: Vec<_> = names.into_iter().filter(is_open).collect();
    let finding = if open.is_empty() {
        Finding::ok(check, "the kernel knows of no hole that it has not closed")
    } else {
        Finding::warning(
            check,
            format!(
                "the kernel does not close what this processor leaves open: {}",
                open.join(", ")
            ),
            "install the processor's microcode and a newer kernel; do not boot with mitigations=off",
        )
    };
    vec![finding]
}

#[cfg(test)]
mod tests {
    use super::super::host::fake::Fake;
    use super::*;

    fn bad(change: impl FnOnce(&Fake)) -> Vec<Finding> {
        let fake = Fake::good();
        change(&fake);
        let host = fake.host();
        let findings = [swap(&host), switches(&host), vulnerabilities(&host)].concat();
        findings
            .into_iter()
            .filter(|finding| finding.state != State::Ok)
            .collect()
    }

    #[test]
    fn each_open_switch_is_a_warning_of_its_own() {
        for (path, value, check) in [
            ("sys/kernel/mm/ksm/run", "1", "same-page merging"),
            ("sys/devices/system/cpu/smt/active", "1", "hyper-threading"),
            ("sys/module/kvm_intel/parameters/nested", "Y", "nested virtualisation"),
            ("sys/module/kvm_amd/parameters/nested", "1", "nested virtualisation"),
            ("proc/sys/kernel/unprivileged_userns_clone", "1", "user namespaces"),
            ("proc/sys/kernel/unprivileged_bpf_disabled", "0", "BPF"),
            ("proc/sys/kernel/io_uring_disabled", "0", "io_uring"),
            ("proc/sys/kernel/yama/ptrace_scope", "0", "ptrace"),
            (
                "proc/sys/kernel/core_pattern",
                "|/usr/share/apport/apport -p%p",
                "core dumps",
            ),
            (
                "proc/swaps",
                "Filename Type\n/dev/zram0 partition\n/dev/sda2 partition 1 0 -2\n",
                "swap",
            ),
            (
                "sys/devices/system/cpu/vulnerabilities/l1tf",
                "Vulnerable: x",
                "processor",
            ),
        ] {
            let bad = bad(|fake| fake.write(path, value));
            assert_eq!(bad.len(), 1, "{path}: {bad:?}");
            assert_eq!((bad[0].check, bad[0].state), (check, State::Warning));
        }
    }

    #[test]
    fn encrypted_swap_is_well_and_what_is_not_there_is_not_checked() {
        let encrypted = bad(|fake| {
            fake.write("proc/swaps", "Filename\n/dev/dm-3 partition\n");
            fake.write("sys/class/block/dm-3/dm/uuid", "CRYPT-PLAIN-swap\n");
        });
        assert!(encrypted.is_empty(), "{encrypted:?}");
        let plain = bad(|fake| {
            fake.write("proc/swaps", "Filename\n/dev/dm-3 partition\n");
            fake.write("sys/class/block/dm-3/dm/uuid", "LVM-x\n");
        });
        assert_eq!(plain.len(), 1);
        let unseen = bad(|fake| fake.remove("proc/sys/kernel/io_uring_disabled"));
        assert_eq!(unseen.len(), 1);
        assert_eq!(
            (unseen[0].state, &*unseen[0].said),
            (State::NotChecked, "/proc/sys/kernel/io_uring_disabled is not there")
        );
    }
}

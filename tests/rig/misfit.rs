//! Hosts that a sandbox cannot run on, or its memory cannot wake on: said by name before a VMM is given anything, and nothing is lost.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use roost_tests::roost::{self, Sandbox, Template, find, find_paused, pids, vmm_command};
use roost_tests::{eventually, in_rig};
use serde_json::Value;

/// Where the stand-in is told to be of another version, as `tests/standin/src/vm.rs` has it.
const OTHER_VERSION: &str = "/usr/share/roost-tests/standin-version";
const KERNELS: &str = "/var/lib/roost/kernels";

/// A VMM of another version, until it is dropped. An agent asks the same file once, so it becomes another.
struct OtherVersion;

impl OtherVersion {
    fn set(version: &str) -> Self {
        std::fs::write(OTHER_VERSION, version).expect("written");
        Self::exchange();
        Self
    }

    fn exchange() {
        let vmm = std::fs::canonicalize("/usr/share/roost-tests/vmm").expect("there is one");
        let new = vmm.with_extension("new");
        std::fs::copy(&vmm, &new).expect("copied");
        std::fs::rename(new, vmm).expect("renamed");
    }
}

impl Drop for OtherVersion {
    fn drop(&mut self) {
        std::fs::remove_file(OTHER_VERSION).expect("removed");
        Self::exchange();
    }
}

/// A file that is called something else, until this is dropped.
struct Renamed {
    from: PathBuf,
    to: PathBuf,
}

impl Renamed {
    fn new(from: &str, to: &str) -> Self {
        let [from, to] = [from, to].map(|name| Path::new(KERNELS).join(name));
        std::fs::rename(&from, &to).expect("renamed");
        Self { from, to }
    }
}

impl Drop for Renamed {
    fn drop(&mut self) {
        std::fs::rename(&self.to, &self.from).expect("renamed back");
    }
}

/// The version of the kernel that is booted: there is one.
fn kernel_version() -> String {
    let names = std::fs::read_dir(KERNELS).expect("listed");
    let mut versions = names.filter_map(|entry| {
        let name = entry.expect("an entry").file_name().into_string().expect("ASCII");
        name.strip_prefix("vmlinux-").map(str::to_owned)
    });
    let version = versions.next().expect("a kernel");
    assert_eq!(versions.next(), None, "there is one kernel");
    version
}

/// What is kept of a paused sandbox: names, and when they were last written.
fn kept(sandbox: &Sandbox) -> BTreeMap<PathBuf, SystemTime> {
    let directory = format!("/var/lib/roost/sandboxes/{}/vm/2", sandbox.id);
    std::fs::read_dir(directory)
        .expect("listed")
        .map(|entry| {
            let entry = entry.expect("an entry");
            let written = entry.metadata().and_then(|metadata| metadata.modified());
            (entry.path(), written.expect("metadata"))
        })
        .collect()
}

/// A resume that says this, and touches nothing of what is kept.
fn is_refused(sandbox: &Sandbox, clause: &str) -> String {
    let before = kept(sandbox);
    let error = roost::fails(&["resume", &sandbox.id]);
    assert!(error.contains(clause), "{error}");
    assert!(find_paused(&sandbox.id).is_some(), "{error}");
    assert_eq!(kept(sandbox), before);
    error
}

#[test]
fn memory_that_does_not_fit_its_host_is_refused_by_name_and_wakes_once_it_does() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "192"]);
        sandbox.sh("echo here > /dev/shm/canary");
        let version = kernel_version();
        sandbox.pause();
        eventually("the VM to be gone", || pids("roost-vmmshim").is_empty().then_some(()));
        let refused_at_once = |clause: &str| {
            let error = is_refused(&sandbox, clause);
            assert!(error.contains("from its disk alone"), "{error}");
            assert!(pids("roost-vmmshim").is_empty(), "a shim was started");
        };

        let [kernel, initramfs] = ["vmlinux", "initramfs"].map(|file| format!("{file}-{version}"));
        let moved = Renamed::new(&kernel, "vmlinux-1");
        refused_at_once(&format!("its kernel, version {version}, is not on this host"));
        drop(moved);
        if Path::new(KERNELS).join(&initramfs).exists() {
            let moved = Renamed::new(&initramfs, "initramfs-1");
            refused_at_once(&format!(
                "the initramfs of its kernel, version {version}, is not on this host"
            ));
            drop(moved);
        }

        let manifest = format!("/var/lib/roost/sandboxes/{}/vm/2/manifest.json", sandbox.id);
        let whole = std::fs::read(&manifest).expect("read");
        let mut other: Value = serde_json::from_slice(&whole).expect("JSON");
        other["about"]["cpu"]["model_name"] = "Another".into();
        std::fs::write(&manifest, other.to_string()).expect("written");
        refused_at_once("it was made on another CPU (Another, ");
        std::fs::write(&manifest, whole).expect("written");

        sandbox.resume();
        assert_eq!(sandbox.sh("cat /dev/shm/canary"), "here");
    });
}

#[test]
fn a_vmm_of_another_version_is_not_given_memory_it_may_not_understand_nor_anything_where_it_is_too_old() {
    in_rig(|| {
        if vmm_command() != "standin-vmm" {
            eprintln!("NOT TESTED: a real VMM is of one version");
            return;
        }
        let sandbox = Sandbox::create(&["--memory", "192"]);
        sandbox.sh("echo here > /dev/shm/canary; echo here > /root/canary; sync");
        sandbox.pause();
        let template = Template::named(7);
        roost::ok(&[&["snapshot", &sandbox.id], &template.arguments()[..]].concat());

        let too_old = OtherVersion::set("52.1.0");
        let clause = "it needs cloud-hypervisor 53 or newer, this host has \"v52.1.0-standin\"";
        is_refused(&sandbox, clause);
        for call in [&["create"][..], &["resume", "--disk-only", &sandbox.id]] {
            let error = roost::fails(call);
            assert!(error.contains(clause), "{error}");
        }
        assert!(find_paused(&sandbox.id).is_some() && find(&sandbox.id).is_none());
        drop(too_old);

        let newer = OtherVersion::set("54.0.0");
        let clause =
            "it was made by version 53.0.0-standin of the VMM, whose state version v54.0.0-standin may not understand";
        let error = is_refused(&sandbox, clause);
        assert!(error.contains("from its disk alone"), "{error}");
        let made = roost::ok(&[&["create", "--json"], &template.arguments()[..]].concat());
        let made: Value = serde_json::from_str(&made).expect("JSON");
        let cold = Sandbox {
            id: made["sandboxId"].as_str().expect("an id").to_owned(),
        };
        let reason = made["metadata"]["cold_boot_reason"].as_str().unwrap_or_default();
        assert!(reason.contains(clause), "{made}");
        assert_eq!(cold.sh("cat /root/canary"), "here");
        drop(cold);
        drop(newer);

        // No agent was started anew: what it does goes by the VMM there is.
        sandbox.resume();
        assert_eq!(sandbox.sh("cat /dev/shm/canary"), "here");
        sandbox.pause();
        let newer = OtherVersion::set("54.0.0");
        roost::ok(&["resume", "--disk-only", &sandbox.id]);
        assert_eq!(
            sandbox.sh("cat /root/canary; test -e /dev/shm/canary || echo gone"),
            "here\ngone"
        );
        drop(newer);
    });
}

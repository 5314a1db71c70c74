//! apt, and the packages that it is given.

use std::process::{Command, Output, Stdio};

pub(super) const HOST: &str = "/root/packages/roost-host_";
pub(super) const GUEST_TOOLS: &str = "/root/packages/roost-guest-tools_";
pub(super) const NEWER: &str = "/root/packages/newer/roost-host_";

/// The package of which this is the beginning of its path.
pub(super) fn deb(start: &str) -> String {
    let (dir, name) = start.rsplit_once('/').expect("a path");
    let entries = std::fs::read_dir(dir).expect("the packages").flatten();
    let mut found = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(name));
    let found = found.next().unwrap_or_else(|| panic!("no {start}*"));
    found.path().to_string_lossy().into_owned()
}

pub(super) fn apt_get(args: &[&str]) -> Output {
    Command::new("apt-get")
        .args(["-q", "-y"])
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .expect("apt-get runs")
}

/// What apt and the packages say, of which dpkg has errors on either output.
pub(super) fn said_by(done: &Output) -> String {
    [&done.stdout, &done.stderr]
        .map(|said| String::from_utf8_lossy(said))
        .concat()
}

/// What they say of something that must succeed.
pub(super) fn apt(args: &[&str]) -> String {
    let done = apt_get(args);
    let said = said_by(&done);
    assert!(done.status.success(), "apt-get {args:?}: {said}");
    // Of a script that failed in part and went on.
    for word in ["Failed to", "No such file", "not found", "is left in"] {
        assert!(!said.contains(word), "apt-get {args:?}: {said}");
    }
    said
}

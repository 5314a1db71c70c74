//! Everything roost makes on a host, counted from the kernel's own view and not from roost's.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What there is at one moment, one line for each thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census(BTreeSet<String>);

impl Census {
    /// Takes a census.
    ///
    /// # Panics
    /// When the host cannot be read, which is no host of ours then.
    pub fn take() -> Self {
        let mut found = BTreeSet::new();
        let mut add = |kind: &str, name: String| {
            found.insert(format!("{kind}: {name}"));
        };
        for block in entries("/sys/block") {
            if let Some(name) = read(&format!("/sys/block/{block}/dm/name")) {
                add("dm device", name);
            }
            if let Some(file) = read(&format!("/sys/block/{block}/loop/backing_file")) {
                add("loop", format!("{block} on {file}"));
            }
        }
        for link in entries("/sys/class/net")
            .into_iter()
            .filter(|link| link.starts_with("roost-"))
        {
            add("veth", link);
        }
        for line in output("ip", &["netns", "list-id"]).lines() {
            // Namespaces that a test named itself are the test's.
            if !line.contains("name:") && !line.trim().is_empty() {
                add("network namespace", line.trim().to_owned());
            }
        }
        for line in output("ip", &["-4", "route", "show", "table", "all"]).lines() {
            if line.contains("10.11.") || line.contains("10.12.") {
                add("route", line.trim().to_owned());
            }
        }
        for line in output("nft", &["list", "ruleset"])
            .lines()
            .filter(|line| !line.trim().is_empty())
        {
            add("nft", line.trim_end().to_owned());
        }
        for pid in entries("/proc")
            .into_iter()
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        {
            // Some end while we look.
            let Some(command) = read(&format!("/proc/{pid}/comm")) else {
                continue;
            };
            let ours = ["roost-vmmshim", "cloud-hyperviso", "standin-vmm", "qemu-system"];
            if ours.iter().any(|name| command.starts_with(name)) {
                add("process", format!("{command} {pid}"));
            }
        }
        for unit in output(
            "systemctl",
            &["list-units", "--all", "--plain", "--no-legend", "roost-vmmshim@*"],
        )
        .lines()
        {
            add("unit", unit.split_whitespace().next().unwrap_or_default().to_owned());
        }
        for cgroup in descendants(Path::new("/sys/fs/cgroup")) {
            if cgroup.contains("/roost-vmmshim@") {
                add("cgroup", cgroup);
            }
        }
        for dir in ["/run/roost/vm", "/var/lib/roost/sandboxes"] {
            for name in entries(dir) {
                add("file", format!("{dir}/{name}"));
            }
        }
        for team in entries("/var/lib/roost/images/teams") {
            // The team's own directory stays, for its next template.
            for name in entries(&format!("/var/lib/roost/images/teams/{team}")) {
                add("template", format!("{team}/{name}"));
            }
        }
        for line in fs::read_to_string("/proc/net/unix").expect("/proc/net/unix").lines() {
            if let Some(path) = line
                .split_whitespace()
                .nth(7)
                .filter(|path| path.starts_with("/run/roost/vm/"))
            {
                add("socket", path.to_owned());
            }
        }
        Self(found)
    }

    /// What is in this census and not in `before`, and the other way round.
    pub fn differences(&self, before: &Self) -> Vec<String> {
        let more = self.0.difference(&before.0).map(|line| format!("+ {line}"));
        let less = before.0.difference(&self.0).map(|line| format!("- {line}"));
        more.chain(less).collect()
    }

    /// Whether there is a thing of this kind and text.
    pub fn lists(&self, kind: &str, text: &str) -> bool {
        let wanted = format!("{kind}: ");
        self.0
            .iter()
            .any(|line| line.strip_prefix(&wanted).is_some_and(|line| line.contains(text)))
    }

    /// How many lines there are of a kind.
    pub fn count(&self, kind: &str) -> usize {
        self.0
            .iter()
            .filter(|line| line.starts_with(&format!("{kind}: ")))
            .count()
    }
}

fn entries(dir: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(Path::new(dir)) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// All directories below one.
fn descendants(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let dirs = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    dirs.flat_map(|entry| {
        let mut found = descendants(&entry.path());
        found.push(entry.path().to_string_lossy().into_owned());
        found
    })
    .collect()
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

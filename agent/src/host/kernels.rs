//! Guest kernels: `kernels/vmlinux-<version>`, with `initramfs-<version>` beside it where the kernel needs one. The highest
//! version is used.

use std::cmp::Ordering;
use std::io;
use std::path::{Path, PathBuf};

/// A kernel to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Its version, the part of the file's name behind `vmlinux-`.
    pub version: String,
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initramfs's file, where there is one.
    pub initramfs: Option<PathBuf>,
}

/// The kernel of the highest version in `dir`, `None` where there is none.
///
/// # Errors
/// When the directory cannot be read.
pub fn latest(dir: &Path) -> io::Result<Option<Kernel>> {
    let mut best: Option<String> = None;
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        let Some(version) = name.to_str().and_then(|name| name.strip_prefix("vmlinux-")) else {
            continue;
        };
        if best
            .as_deref()
            .is_none_or(|best| compare(version, best) == Ordering::Greater)
        {
            best = Some(version.to_owned());
        }
    }
    Ok(best.and_then(|version| of_version(dir, &version)))
}

/// The kernel of one version in `dir`, `None` where it is not there.
pub fn of_version(dir: &Path, version: &str) -> Option<Kernel> {
    // A version is part of one file's name.
    if version.contains('/') {
        return None;
    }
    let existing = |name: &str| {
        let path = dir.join(format!("{name}-{version}"));
        path.exists().then_some(path)
    };
    Some(Kernel {
        version: version.to_owned(),
        kernel: existing("vmlinux")?,
        initramfs: existing("initramfs"),
    })
}

/// Compares versions run by run: digits as numbers, the rest as text.
fn compare(left: &str, right: &str) -> Ordering {
    let (left, right) = (runs(left), runs(right));
    for pair in left.iter().zip(&right) {
        let order = match pair {
            (Run::Number(a), Run::Number(b)) => a.cmp(b),
            (Run::Text(a), Run::Text(b)) => a.cmp(b),
            (Run::Number(_), Run::Text(_)) => Ordering::Greater,
            (Run::Text(_), Run::Number(_)) => Ordering::Less,
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    left.len().cmp(&right.len())
}

enum Run<'a> {
    Number(u128),
    Text(&'a str),
}

fn runs(text: &str) -> Vec<Run<'_>> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let digits = first.is_ascii_digit();
        let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
        let (run, tail) = rest.split_at(end);
        found.push(match run.parse() {
            Ok(number) if digits => Run::Number(number),
            _ => Run::Text(run),
        });
        rest = tail;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_version_wins_and_brings_its_initramfs() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(latest(dir.path()).expect("read"), None);
        for name in [
            "vmlinux-6.1.0-9",
            "vmlinux-6.1.0-41",
            "vmlinux-5.10.0",
            "initramfs-6.1.0-41",
            "README",
        ] {
            std::fs::write(dir.path().join(name), "").expect("written");
        }
        let kernel = latest(dir.path()).expect("read").expect("found");
        assert_eq!(kernel.version, "6.1.0-41");
        assert_eq!(kernel.initramfs, Some(dir.path().join("initramfs-6.1.0-41")));
    }

    #[test]
    fn an_older_version_is_found_by_its_name() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in [
            "vmlinux-6.1.0-9",
            "initramfs-6.1.0-9",
            "vmlinux-6.1.0-41",
            "initramfs-6.1.0-8",
        ] {
            std::fs::write(dir.path().join(name), "").expect("written");
        }
        let kernel = of_version(dir.path(), "6.1.0-9").expect("found");
        assert_eq!(kernel.kernel, dir.path().join("vmlinux-6.1.0-9"));
        assert_eq!(kernel.initramfs, Some(dir.path().join("initramfs-6.1.0-9")));
        assert_eq!(of_version(dir.path(), "6.1.0-41").expect("found").initramfs, None);
        assert_eq!(of_version(dir.path(), "6.1.0-8"), None);
        assert_eq!(of_version(&dir.path().join("x"), "/../vmlinux-6.1.0-9"), None);
    }

    #[test]
    fn versions_compare_as_people_read_them() {
        for (lower, higher) in [
            ("6.1.9", "6.1.10"),
            ("6.1", "6.1.1"),
            ("6.1-rc1", "6.1.1"),
            ("5.99", "6.0"),
        ] {
            assert_eq!(compare(lower, higher), Ordering::Less, "{lower} < {higher}");
            assert_eq!(compare(higher, lower), Ordering::Greater, "{higher} > {lower}");
        }
    }
}

//! Who the sandbox is, for the programs in it: variables and files under the names that programs of this family look
//! for.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The directory below `/run`, and the prefix of variables and file names.
const FAMILIES: [(&str, &str); 2] = [("e2b", "E2B"), ("wrenn", "WRENN")];

/// Most bytes of an id.
pub(crate) const MAX_ID: usize = 256;

/// The variables of a sandbox; ids that the host has not told are left out.
pub(crate) fn variables(sandbox: Option<&str>, template: Option<&str>) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    for (_, prefix) in FAMILIES {
        variables.insert(format!("{prefix}_SANDBOX"), "true".to_owned());
        for (suffix, value) in [("SANDBOX_ID", sandbox), ("TEMPLATE_ID", template)] {
            variables.extend(value.map(|value| (format!("{prefix}_{suffix}"), value.to_owned())));
        }
    }
    variables
}

/// The directories of [`write_files`], below `root`.
pub(crate) fn directories(root: &Path) -> [PathBuf; 2] {
    FAMILIES.map(|(directory, _)| root.join("run").join(directory))
}

/// Writes the same as files, below `root`: `/run/e2b/.E2B_SANDBOX_ID` and so on, without a newline. Those that say so
/// already are not touched.
///
/// # Errors
/// A file cannot be written; others may have been.
pub(crate) fn write_files(root: &Path, variables: &BTreeMap<String, String>) -> io::Result<()> {
    for ((_, prefix), directory) in FAMILIES.iter().zip(directories(root)) {
        fs::create_dir_all(&directory)?;
        for (name, value) in variables.iter().filter(|(name, _)| name.starts_with(prefix)) {
            replace(&directory.join(format!(".{name}")), value.as_bytes())?;
        }
    }
    Ok(())
}

/// Writes `/etc/resolv.conf` below `root`, unless it says so already.
///
/// # Errors
/// The file cannot be written; the old one is still there.
pub(crate) fn write_resolvers(root: &Path, resolvers: &[IpAddr]) -> io::Result<()> {
    let text: String = resolvers
        .iter()
        .map(|address| format!("nameserver {address}\n"))
        .collect();
    let directory = root.join("etc");
    // An image may have nothing but a program in it.
    fs::create_dir_all(&directory)?;
    replace(&directory.join("resolv.conf"), text.as_bytes())
}

/// By rename: a reader sees the old or the new, and a symbolic link (as systemd-resolved leaves) is replaced, not
/// followed.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    // A guest that wakes is told what it knows, mostly, and each block that it writes is one of the host's disk.
    if holds(path, content) {
        return Ok(());
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".envd-new");
    let new = path.with_file_name(name);
    fs::write(&new, content)?;
    fs::rename(&new, path)
}

/// Whether `path` is a file, no link to one, with this content. What cannot be read holds something else.
fn holds(path: &Path, content: &[u8]) -> bool {
    // The length first: the guest may have made it a file of any size, or a pipe.
    path.symlink_metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.len() == content.len() as u64)
        && fs::read(path).is_ok_and(|held| held == content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dir;

    #[test]
    fn files_say_what_the_variables_say() {
        let root = Dir::new("identity");
        write_files(root.path(), &variables(Some("s-1"), Some("t-1"))).unwrap();
        let read = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
        assert_eq!(read("run/e2b/.E2B_SANDBOX"), "true");
        assert_eq!(read("run/e2b/.E2B_SANDBOX_ID"), "s-1");
        assert_eq!(read("run/wrenn/.WRENN_TEMPLATE_ID"), "t-1");
        assert_eq!(fs::read_dir(root.path().join("run/e2b")).unwrap().count(), 3);
    }

    #[test]
    fn an_unknown_id_is_no_variable() {
        assert_eq!(
            variables(None, None).into_keys().collect::<Vec<_>>(),
            ["E2B_SANDBOX", "WRENN_SANDBOX"]
        );
    }

    #[test]
    fn resolvers_are_written_where_there_is_no_etc() {
        let root = Dir::new("no-etc");
        write_resolvers(root.path(), &["192.0.2.1".parse().unwrap()]).unwrap();
        let written = fs::read_to_string(root.path().join("etc/resolv.conf")).unwrap();
        assert_eq!(written, "nameserver 192.0.2.1\n");
    }

    #[test]
    fn a_link_in_place_of_resolv_conf_is_replaced() {
        let root = Dir::new("resolv");
        fs::create_dir_all(root.path().join("etc")).unwrap();
        let path = root.path().join("etc/resolv.conf");
        std::os::unix::fs::symlink("../run/nowhere/stub-resolv.conf", &path).unwrap();
        write_resolvers(
            root.path(),
            &["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        )
        .unwrap();
        assert!(path.symlink_metadata().unwrap().is_file());
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "nameserver 192.0.2.1\nnameserver 2001:db8::1\n"
        );
    }

    #[test]
    fn what_says_so_already_is_not_touched() {
        use std::os::unix::fs::MetadataExt as _;
        let root = Dir::new("same");
        fs::create_dir_all(root.path().join("etc")).unwrap();
        let path = root.path().join("etc/resolv.conf");
        let write = |resolver: &str| {
            write_resolvers(root.path(), &[resolver.parse().unwrap()]).unwrap();
            fs::metadata(&path).unwrap().ino()
        };
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        let before = fs::metadata(&path).unwrap().ino();
        assert_eq!(write("192.0.2.1"), before);
        write("192.0.2.2");
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 192.0.2.2\n");
    }
}

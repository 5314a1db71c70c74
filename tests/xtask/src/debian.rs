//! Debian trees and disk images without root and without mounting: mmdebstrap, then `mke2fs -d`.
//!
//! Packages come from where this machine gets its own: its apt sources for the release, Debian's archive only.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::Uid;

use crate::cache;
use crate::step::shown;

/// The release of guest template and rig host.
pub(crate) const RELEASE: &str = "bookworm";

/// What to put into a tree.
pub(crate) struct Recipe<'a> {
    /// mmdebstrap's variant.
    pub(crate) variant: &'a str,
    /// Packages on top of the variant.
    pub(crate) packages: &'a [&'a str],
    /// More arguments for mmdebstrap, such as hooks.
    pub(crate) extra: &'a [&'a str],
}

impl Recipe<'_> {
    /// The recipe's content key.
    pub(crate) fn key(&self) -> cache::Key {
        let mut key = cache::Key::default().text(RELEASE).text(self.variant);
        for word in self.packages.iter().chain(self.extra) {
            key = key.text(word);
        }
        key
    }

    /// Makes the tree as a tar file.
    pub(crate) fn make_tar(&self, tar: &Path) -> Result<()> {
        let mut command = Command::new("mmdebstrap");
        command.args(["--format=tar", "--architectures=amd64"]);
        command.arg(format!("--variant={}", self.variant));
        command.arg(format!("--include={}", self.packages.join(",")));
        command.args([
            "--aptopt=APT::Install-Recommends \"false\"",
            "--aptopt=Acquire::Retries \"5\"",
        ]);
        // Documentation and translations are half of a small system; copyright files stay.
        command.args([
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            "--dpkgopt=path-exclude=/usr/share/info/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        ]);
        command.args(self.extra).arg(RELEASE).arg(tar);
        if let Some(sources) = host_sources()? {
            command.arg(sources);
        }
        shown(&mut command)
    }
}

/// The size of an image.
pub(crate) enum Size {
    /// This many MiB.
    Fixed(u64),
    /// What the tree needs and this many MiB.
    Slack(u64),
}

/// An ext4 image to be made from a tar file.
pub(crate) struct Image<'a> {
    /// How large; the file is sparse.
    pub(crate) size: Size,
    /// More arguments for mke2fs.
    pub(crate) mke2fs: &'a [&'a str],
    /// Shell commands to run in the unpacked tree first, as (what is or looks like) root.
    pub(crate) prepare: &'a str,
}

impl Image<'_> {
    /// Unpacks `tar` and makes the image from the tree.
    pub(crate) fn make(&self, tar: &Path, image: &Path) -> Result<()> {
        let tree = image.with_extension("tree");
        let size = match self.size {
            Size::Fixed(mib) => mib.to_string(),
            // A twentieth for the filesystem's own tables, and its journal.
            Size::Slack(mib) => format!("$(( $(du -sm \"$tree\" | cut -f1) * 21 / 20 + 16 + {mib} ))"),
        };
        // One shell, so that without root all of it sees the same user namespace: owners in the tree, then in the image.
        let script = format!(
            "set -eu; tree=$1; tar=$2; image=$3; shift 3; umask 022\n\
             rm -rf \"$tree\"; mkdir -p \"$tree\"; trap 'cd /; rm -rf \"$tree\"' EXIT\n\
             tar -C \"$tree\" --numeric-owner --exclude='./dev/*' -xf \"$tar\"\n\
             cd \"$tree\"\n{}\n\
             mke2fs -q -F -t ext4 -b 4096 -I 256 -i 16384 \"$@\" -d \"$tree\" \"$image\" \"{size}M\"\n",
            self.prepare
        );
        let mut command = as_root(&["sh", "-c", &script, "image"]);
        shown(command.arg(&tree).arg(tar).arg(image).args(self.mke2fs))
    }
}

/// A command that is root, or root of a user namespace with all its ids mapped.
pub(crate) fn as_root(words: &[&str]) -> Command {
    let mut command = if Uid::effective().is_root() {
        Command::new(words[0])
    } else {
        let mut helper = Command::new("mmdebstrap");
        helper.args(["--unshare-helper", words[0]]);
        helper
    };
    command.args(&words[1..]);
    command
}

/// This machine's sources for the release as a file for mmdebstrap, or nothing where it has none (then mmdebstrap's own
/// default is used).
fn host_sources() -> Result<Option<PathBuf>> {
    let mut lines = Vec::new();
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => lines.extend(from_list(&text)),
            Some("sources") => lines.extend(from_deb822(&text)),
            _ => {}
        }
    }
    // Security and updates build on the release itself; without it they are of no use.
    if !lines.iter().any(|line| line.suite == RELEASE) {
        return Ok(None);
    }
    let text: String = lines.iter().map(|line| format!("{}\n", line.line)).collect();
    let path = cache::dir()?.join("sources.list");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Some(path))
}

#[derive(Debug, PartialEq)]
struct Source {
    suite: String,
    line: String,
}

/// One usable source line, when it is Debian's own archive for the release.
fn source(uri: &str, suite: &str, components: &[&str], signed_by: Option<&str>) -> Option<Source> {
    let ours = suite == RELEASE
        || suite
            .strip_prefix(RELEASE)
            .is_some_and(|rest| rest == "-updates" || rest == "-security");
    let path = uri.trim_end_matches('/');
    let debian = path.ends_with("/debian") || path.ends_with("/debian-security");
    let keyring = signed_by.is_none_or(|file| file.contains("debian-archive"));
    if !(ours && debian && keyring && components.contains(&"main")) {
        return None;
    }
    let options = match signed_by {
        Some(file) => format!(" [signed-by={file}]"),
        None => String::new(),
    };
    Some(Source {
        suite: suite.to_owned(),
        line: format!("deb{options} {uri} {suite} main"),
    })
}

fn from_list(text: &str) -> Vec<Source> {
    let parse = |line: &str| {
        let rest = line.trim().strip_prefix("deb ")?.trim();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(tail) => tail.split_once(']')?,
            None => ("", rest),
        };
        let signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="));
        let words: Vec<&str> = rest.split_whitespace().collect();
        let [uri, suite, components @ ..] = words.as_slice() else {
            return None;
        };
        source(uri, suite, components, signed_by)
    };
    text.lines().filter_map(parse).collect()
}

fn from_deb822(text: &str) -> Vec<Source> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let mut found = Vec::new();
    for stanza in lines.split(|line| line.trim().is_empty()) {
        let field = |name: &str| {
            stanza.iter().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let words = |name: &str| field(name).unwrap_or_default().split_whitespace().collect::<Vec<_>>();
        if field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no")) || !words("Types").contains(&"deb") {
            continue;
        }
        for uri in words("URIs") {
            for suite in words("Suites") {
                found.extend(source(uri, suite, &words("Components"), field("Signed-By")));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debians_own_archive_of_the_release_is_taken() {
        let list = "\
            deb http://mirror.example/debian bookworm main contrib\n\
            # deb http://mirror.example/debian bookworm-updates main\n\
            deb-src http://mirror.example/debian bookworm main\n\
            deb [arch=amd64 signed-by=/usr/share/keyrings/other.gpg] https://apt.example/debian bookworm main\n\
            deb https://apt.example/vendor bookworm main\n\
            deb http://mirror.example/debian trixie main\n\
            deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian-security/ bookworm-security main\n";
        let suites: Vec<String> = from_list(list).into_iter().map(|source| source.suite).collect();
        assert_eq!(suites, ["bookworm", "bookworm-security"]);
    }

    #[test]
    fn a_deb822_stanza_yields_a_line_for_each_suite_unless_disabled() {
        let stanza = "Types: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
            # a comment\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n";
        let lines: Vec<String> = from_deb822(stanza).into_iter().map(|source| source.line).collect();
        let signed = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian";
        assert_eq!(
            lines,
            [
                format!("{signed} bookworm main"),
                format!("{signed} bookworm-updates main")
            ]
        );
        assert_eq!(from_deb822(&format!("{stanza}Enabled: no\n")), []);
    }
}

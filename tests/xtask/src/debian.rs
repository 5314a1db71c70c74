//! Debian trees and disk images without root and without mounting: mmdebstrap, then `mke2fs -d`.
//!
//! Packages come from where this machine gets its own: its apt sources for the release, or the same mirror of Debian's archive where it
//! has none for that.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::unistd::Uid;

use crate::cache;
use crate::step::{quiet, shown};

/// The release of guest template and rig host.
pub(crate) const RELEASE: &str = "bookworm";

/// What to put into a tree.
pub(crate) struct Recipe<'a> {
    /// Debian's release; with `-backports` behind it, what there is of it in its backports comes from there.
    pub(crate) release: &'a str,
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
        let mut key = cache::Key::default().text(self.release).text(self.variant);
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
        let sources = host_sources(self.release)?;
        if base(self.release) != self.release {
            ensure!(
                sources.is_some(),
                "packages of {} are wanted, and apt has no source of Debian's archive here to take them from",
                self.release
            );
            // apt takes nothing from backports unasked.
            command.arg(format!("--aptopt=APT::Default-Release \"{}\"", self.release));
        }
        command.args(self.extra).arg(base(self.release)).arg(tar);
        shown(command.args(sources))
    }

    /// Makes the tree's files that match one of these patterns below `dir`, which is made.
    pub(crate) fn make_files(&self, dir: &Path, patterns: &[&str]) -> Result<()> {
        fs::create_dir_all(dir)?;
        let tar = dir.join("packages.tar");
        self.make_tar(&tar)?;
        let mut extract = Command::new("tar");
        extract.args(["--no-same-owner", "--wildcards", "-C"]).arg(dir);
        quiet(extract.arg("-xf").arg(&tar).args(patterns))?;
        cache::remove(&tar)
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

/// This machine's sources for a release as a file for mmdebstrap, or nothing where it has none of Debian's (then mmdebstrap's own
/// default is used).
fn host_sources(release: &str) -> Result<Option<PathBuf>> {
    let mut found = Vec::new();
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => found.extend(from_list(&text)),
            Some("sources") => found.extend(from_deb822(&text)),
            _ => {}
        }
    }
    let lines = lines_for(release, &found);
    if lines.is_empty() {
        return Ok(None);
    }
    let path = cache::dir()?.join("sources.list");
    fs::write(&path, lines.concat()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Some(path))
}

/// One of Debian's own archives.
#[derive(Debug, PartialEq)]
struct Source {
    uri: String,
    suite: String,
    signed_by: Option<String>,
}

impl Source {
    fn line(&self, suite: &str) -> String {
        let options = self
            .signed_by
            .as_ref()
            .map_or(String::new(), |file| format!(" [signed-by={file}]"));
        format!("deb{options} {} {suite} main\n", self.uri)
    }
}

/// The release that a suite of backports builds on, and any other one itself.
fn base(release: &str) -> &str {
    release.strip_suffix("-backports").unwrap_or(release)
}

/// Lines of a sources.list for a release, of what this machine has.
fn lines_for(release: &str, sources: &[Source]) -> Vec<String> {
    let mirror = sources.iter().find(|source| !source.suite.contains('-'));
    if base(release) != release {
        let mut lines = lines_for(base(release), sources);
        lines.extend(mirror.map(|mirror| mirror.line(release)));
        return lines;
    }
    let is_ours = |suite: &str| {
        let rest = suite.strip_prefix(release);
        rest.is_some_and(|rest| ["", "-updates", "-security"].contains(&rest))
    };
    // Security and updates build on the release itself; without it they are of no use.
    if sources.iter().any(|source| source.suite == release) {
        let ours = sources.iter().filter(|source| is_ours(&source.suite));
        return ours.map(|source| source.line(&source.suite)).collect();
    }
    mirror.map(|mirror| mirror.line(release)).into_iter().collect()
}

/// A source, when it is Debian's own archive.
fn source(uri: &str, suite: &str, components: &[&str], signed_by: Option<&str>) -> Option<Source> {
    let path = uri.trim_end_matches('/');
    let debian = path.ends_with("/debian") || path.ends_with("/debian-security");
    let keyring = signed_by.is_none_or(|file| file.contains("debian-archive"));
    (debian && keyring && components.contains(&"main")).then(|| Source {
        uri: uri.to_owned(),
        suite: suite.to_owned(),
        signed_by: signed_by.map(str::to_owned),
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

    const LIST: &str = "\
        deb http://mirror.example/debian bookworm main contrib\n\
        # deb http://mirror.example/debian bookworm-updates main\n\
        deb-src http://mirror.example/debian bookworm main\n\
        deb [arch=amd64 signed-by=/usr/share/keyrings/other.gpg] https://apt.example/debian bookworm main\n\
        deb https://apt.example/vendor bookworm main\n\
        deb http://mirror.example/debian sid main\n\
        deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian-security/ bookworm-security main\n";

    #[test]
    fn only_debians_own_archive_of_the_release_is_taken() {
        assert_eq!(
            lines_for("bookworm", &from_list(LIST)),
            [
                "deb http://mirror.example/debian bookworm main\n",
                "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian-security/ \
                 bookworm-security main\n",
            ]
        );
    }

    #[test]
    fn another_release_comes_from_the_same_mirror() {
        let lines = lines_for("trixie", &from_list(LIST));
        assert_eq!(lines, ["deb http://mirror.example/debian trixie main\n"]);
        assert_eq!(
            lines_for("trixie-backports", &from_list(LIST)),
            [
                "deb http://mirror.example/debian trixie main\n",
                "deb http://mirror.example/debian trixie-backports main\n"
            ]
        );
        assert_eq!(lines_for("trixie", &[]), [""; 0]);
    }

    #[test]
    fn a_deb822_stanza_yields_a_source_for_each_suite_unless_disabled() {
        let stanza = "Types: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
            # a comment\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n";
        let signed = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian";
        assert_eq!(
            lines_for("bookworm", &from_deb822(stanza)),
            [
                format!("{signed} bookworm main\n"),
                format!("{signed} bookworm-updates main\n")
            ]
        );
        assert_eq!(from_deb822(&format!("{stanza}Enabled: no\n")), []);
    }
}

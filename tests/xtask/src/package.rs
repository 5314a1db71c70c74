//! `cargo xtask package`: the Debian packages `roost-host` and `roost-guest-tools`.
//!
//! ```text
//! target/package/roost-host_0.1.0-1_amd64.deb     release builds, for hosts
//! target/rig/packages-<key>/*~rig-1_amd64.deb       the rig's own builds, for its tests alone: they have faults and profiles for tests
//! target/rig/packages-<key>/newer/…               the same with a higher version
//! ```
//!
//! debhelper packs in a tree of its own what cargo has built (`packaging/debian`), lintian has nothing to say about it, and every option that a
//! program tells of is in its manual page and the other way round.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;

use crate::binaries::{self, Binaries, cargo};
use crate::cache::{self, Key};
use crate::setup;
use crate::step::{quiet, shown, step};

/// The programs of `roost-host` and of `roost-guest-tools`, with the pages that have their options. Those of `roost` are made by itself.
const PROGRAMS: &[(&str, Option<&str>)] = &[
    ("roost", None),
    ("roost-agent", Some("roost-agent.8")),
    ("roost-privd", Some("roost-privd.8")),
    ("roost-vmmshim", Some("roost-vmmshim.8")),
    ("roost-mkinitramfs", Some("roost-mkinitramfs.8")),
    (ENVD, Some("envd.8")),
];

/// The program that is linked statically, and comes from elsewhere.
const ENVD: &str = "envd";

/// What is in the tree beside programs and `packaging/`.
const DOCUMENTS: &[&str] = &["ARCHITECTURE.md", "CHANGELOG.md", "README.md", "SECURITY.md"];

/// The version that the rig's packages are upgraded to.
const NEWER: &str = "newer";

/// Arguments of `cargo xtask package`.
#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Pack the rig's builds, which have faults and profiles for tests, as its tests do
    #[arg(long)]
    rig: bool,
}

/// What programs are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Release builds, each with the features that it asks for alone.
    Release,
    /// Those that the rig has.
    Rig,
}

/// Both packages.
pub(crate) struct Packages {
    dir: PathBuf,
}

/// Runs `cargo xtask package`.
pub(crate) fn run(options: &Options) -> Result<()> {
    setup::run()?;
    let dir = if options.rig {
        let binaries = binaries::build()?;
        let _lock = cache::lock()?;
        for_rig(&binaries)?.dir
    } else {
        let programs = step("building the programs", build_release)?;
        let dir = cache::target().join("package");
        cache::remove(&dir)?;
        pack(&dir, Kind::Release, &programs)?;
        dir
    };
    for package in debs(&dir)? {
        println!("{}", package.display());
    }
    Ok(())
}

/// The packages of the rig's tests, and the same of a higher version.
pub(crate) fn for_rig(binaries: &Binaries) -> Result<Packages> {
    let programs: Vec<PathBuf> = PROGRAMS.iter().map(|(name, _)| binaries.program(name)).collect();
    let mut key = Key::default().text(&version(Kind::Rig)?);
    for program in &programs {
        key = key.file(program)?;
    }
    for file in files(&cache::workspace().join("packaging"))? {
        key = key.text(&file.display().to_string()).file(&file)?;
    }
    let dir = cache::artefact("packages", key, |path| {
        pack(path, Kind::Rig, &programs)?;
        debs(path)?.iter().try_for_each(|package| raise(path, package))
    })?;
    Ok(Packages { dir })
}

impl Packages {
    /// The folder of the packages, with those of the higher version in `newer`.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

/// The programs in the order of [`PROGRAMS`]. One call for each package: in one for all of them features would add up.
fn build_release() -> Result<Vec<PathBuf>> {
    for package in ["roost-privd", "roost-vmmshim", "roost-agent", "roost-initramfs"] {
        shown(cargo().args(["build", "--release", "--locked", "--package", package]))?;
    }
    let envd = binaries::build_static(&["--release", "--locked", "--package", "roost-envd"])?.join("release/envd");
    let release = cache::target().join("release");
    let path = |name: &str| {
        if name == ENVD { envd.clone() } else { release.join(name) }
    };
    Ok(PROGRAMS.iter().map(|(name, _)| path(name)).collect())
}

/// Makes both packages in `dir`, which is made.
fn pack(dir: &Path, kind: Kind, programs: &[PathBuf]) -> Result<()> {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("programs"))?;
    for program in programs {
        copy(program, &tree.join("programs"))?;
    }
    let workspace = cache::workspace();
    copy(&workspace.join("packaging"), &tree)?;
    copy(&workspace.join("packaging/debian"), &tree)?;
    for document in DOCUMENTS {
        copy(&workspace.join(document), &tree)?;
    }
    check_manuals(&tree)?;
    fs::write(tree.join("debian/changelog"), changelog(kind)?)?;
    step("packing", || {
        let mut rules = Command::new("debian/rules");
        rules
            .arg("binary")
            .current_dir(&tree)
            .env("DEB_RULES_REQUIRES_ROOT", "no");
        if kind == Kind::Rig {
            rules.env("ROOST_COMPRESSION", "-Zgzip -z1");
        }
        quiet(&mut rules).map(drop)
    })?;
    cache::remove(&tree)?;
    step("lintian", || {
        let mut lintian = Command::new("lintian");
        lintian.args(["--fail-on", "error,warning", "--allow-root"]);
        // Debian's archive has no bug that asks for it.
        lintian.args(["--suppress-tags", "initial-upload-closes-no-bugs"]);
        shown(lintian.args(debs(dir)?))
    })
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    quiet(Command::new("cp").arg("-r").arg(from).arg(to)).map(drop)
}

/// The version of this source; below any release where it is none.
fn version(kind: Kind) -> Result<String> {
    let version = env!("CARGO_PKG_VERSION");
    let changes = cache::workspace().join("CHANGELOG.md");
    let changes = fs::read_to_string(&changes).with_context(|| format!("cannot read {}", changes.display()))?;
    Ok(match kind {
        Kind::Rig => format!("{version}~rig-1"),
        Kind::Release if is_released(&changes, version) => format!("{version}-1"),
        Kind::Release => format!("{version}~dev-1"),
    })
}

/// Whether there is a section of a version.
fn is_released(changes: &str, version: &str) -> bool {
    let titles = changes.lines().filter_map(|line| line.strip_prefix("## "));
    let mut first_words = titles.filter_map(|title| title.split_whitespace().next());
    first_words.any(|word| word.trim_matches(['[', ']']) == version)
}

/// Debian's changelog. What has changed is in ours.
fn changelog(kind: Kind) -> Result<String> {
    let workspace = cache::workspace();
    let control = fs::read_to_string(workspace.join("packaging/debian/control"))?;
    let maintainer = control.lines().find_map(|line| line.strip_prefix("Maintainer: "));
    let maintainer = maintainer.context("packaging/debian/control names no maintainer")?;
    // Of the commit, so that two builds of it are the same; a source without commits has the time of its changelog.
    let git = Command::new("git")
        .args(["log", "-1", "--format=%cD"])
        .current_dir(&workspace)
        .output();
    let date = match git {
        Ok(output) if output.status.success() => output.stdout,
        _ => quiet(
            Command::new("date")
                .args(["-R", "-r"])
                .arg(workspace.join("CHANGELOG.md")),
        )?,
    };
    let date = String::from_utf8(date).context("the date is no text")?;
    Ok(format!(
        "roost ({}) unstable; urgency=medium\n\n  * See changelog.gz beside this file.\n\n -- {maintainer}  {}\n",
        version(kind)?,
        date.trim()
    ))
}

/// Makes the same package with a higher version, in the folder [`NEWER`] of `dir`.
fn raise(dir: &Path, package: &Path) -> Result<()> {
    let tree = dir.join("tree");
    quiet(Command::new("dpkg-deb").arg("--raw-extract").arg(package).arg(&tree))?;
    let control = tree.join("DEBIAN/control");
    let text = fs::read_to_string(&control)?;
    let raised: String = text
        .lines()
        .map(|line| match line.strip_prefix("Version: ") {
            Some(version) => format!("Version: {version}.{NEWER}\n"),
            None => format!("{line}\n"),
        })
        .collect();
    ensure!(raised.contains(NEWER), "{} has no version", package.display());
    fs::write(&control, raised)?;
    let newer = dir.join(NEWER);
    fs::create_dir_all(&newer)?;
    quiet(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Zgzip", "-z1", "--build"])
            .arg(&tree)
            .arg(&newer),
    )?;
    cache::remove(&tree)
}

/// Compares what programs tell of their options with their pages.
fn check_manuals(tree: &Path) -> Result<()> {
    for (program, page) in PROGRAMS {
        let Some(page) = page else { continue };
        // Some of them know no --help, and tell of their options all the same.
        let output = Command::new(tree.join("programs").join(program))
            .arg("--help")
            .stdin(std::process::Stdio::null())
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        let told = [output.stdout, output.stderr].concat();
        let mut told = long_options(&String::from_utf8_lossy(&told));
        let text = fs::read_to_string(tree.join("packaging/man").join(page))?;
        let written = long_options(&text.replace("\\-", "-"));
        if !written.contains("help") {
            told.remove("help");
        }
        ensure!(
            told == written,
            "{program} --help and packaging/man/{page} differ: {:?}",
            told.symmetric_difference(&written).collect::<Vec<_>>()
        );
    }
    Ok(())
}

/// The long options in a text, without their dashes.
fn long_options(text: &str) -> BTreeSet<String> {
    let is_name = |character: char| character.is_ascii_lowercase() || character == '-';
    let rests = text.split("--").skip(1);
    rests
        .map(|rest| rest.split(|character| !is_name(character)).next().unwrap_or_default())
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The packages in a folder.
fn debs(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    found.sort();
    ensure!(found.len() == 2, "{} packages in {}", found.len(), dir.display());
    Ok(found)
}

/// All files below a folder, in order.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| anyhow!("cannot list {}: {error}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_released_once_the_changelog_has_a_section_of_it() {
        let changes = "# Changelog\n\n## Unreleased\n\n- For 0.3.0.\n\n## 0.2.0 (2026-12-01)\n\n## [0.1.0]\n";
        for (version, released) in [("0.1.0", true), ("0.2.0", true), ("0.3.0", false), ("0.2", false)] {
            assert_eq!(is_released(changes, version), released, "{version}");
        }
    }

    #[test]
    fn the_rigs_packages_are_below_any_release_and_say_what_they_are() {
        let rig = version(Kind::Rig).expect("a version");
        assert_eq!(rig, concat!(env!("CARGO_PKG_VERSION"), "~rig-1"));
        let later = |a: &str, b: &str| {
            let status = Command::new("dpkg").args(["--compare-versions", a, "gt", b]).status();
            status.expect("dpkg runs").success()
        };
        assert!(later(env!("CARGO_PKG_VERSION"), &rig));
        assert!(later(&format!("{rig}.{NEWER}"), &rig));
        assert!(later(env!("CARGO_PKG_VERSION"), &format!("{rig}.{NEWER}")));
    }

    #[test]
    fn options_are_found_in_help_and_in_pages() {
        let found = long_options("usage: x [--socket PATH | --peer-uid UID]\n  -o, --output <FILE>  a -- b --\n");
        assert_eq!(found, ["output", "peer-uid", "socket"].map(str::to_owned).into());
    }
}

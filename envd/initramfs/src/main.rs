//! `roost-mkinitramfs`: the initramfs of a guest, of the envd and the kernel modules that are on this machine.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use roost_initramfs::guest;
use roost_initramfs::modules::Modules;

/// Makes the initramfs of a guest: envd, and the kernel modules that it needs to reach its disk.
#[derive(Parser)]
#[command(version, name = "roost-mkinitramfs")]
struct Arguments {
    /// The kernel, as `uname -r` says it: its modules are taken from /lib/modules/VERSION
    #[arg(long, value_name = "VERSION", required_unless_present = "modules")]
    kernel: Option<String>,
    /// Directory of the kernel's modules, with modules.dep in it
    #[arg(long, value_name = "DIR", conflicts_with = "kernel")]
    modules: Option<PathBuf>,
    /// The guest's first process, statically linked
    #[arg(long, value_name = "FILE", default_value = "/usr/lib/roost/envd")]
    envd: PathBuf,
    /// File to write; one that is there is replaced
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let dir = match (arguments.modules, arguments.kernel) {
        (Some(dir), _) => dir,
        (None, Some(version)) => of_kernel(&version)?,
        (None, None) => unreachable!("clap demands one of the two"),
    };
    let envd = fs::read(&arguments.envd).with_context(|| format!("cannot read {}", arguments.envd.display()))?;
    ensure!(
        envd.starts_with(b"\x7fELF"),
        "{} is no program that a kernel can run",
        arguments.envd.display()
    );
    let content = guest(&envd, &Modules::read(&dir)?)?;
    replace(&arguments.output, &content).with_context(|| format!("cannot write {}", arguments.output.display()))
}

fn of_kernel(version: &str) -> Result<PathBuf> {
    let is_name = !version.is_empty() && !version.contains('/') && !version.starts_with('.');
    ensure!(is_name, "{version:?} is no version of a kernel, as uname -r says it");
    Ok(Path::new("/lib/modules").join(version))
}

/// Whoever boots from it meanwhile has the old one or the new one.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let name = path.file_name().context("it has no file name")?;
    let mut new = name.to_owned();
    new.push(".new");
    let new = path.with_file_name(new);
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    let replaced = written.and_then(|()| fs::rename(&new, path));
    if replaced.is_err() {
        // Where it could not even be made there is none.
        fs::remove_file(&new).ok();
    }
    Ok(replaced?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernels_version_is_a_name_and_no_path() {
        assert_eq!(
            of_kernel("6.1.0-41-cloud-amd64").expect("a version"),
            Path::new("/lib/modules/6.1.0-41-cloud-amd64")
        );
        for wrong in ["", "..", "../../etc", "a/b", "/etc"] {
            assert!(of_kernel(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_output_is_replaced_whole_and_a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("initramfs");
        fs::write(&path, "old").expect("written");
        replace(&path, b"new").expect("replaced");
        assert_eq!(fs::read(&path).expect("read"), b"new");
        fs::create_dir(dir.path().join("taken")).expect("made");
        assert!(replace(&dir.path().join("taken"), b"new").is_err());
        assert!(replace(&dir.path().join("none/initramfs"), b"new").is_err());
        assert_eq!(
            fs::read_dir(dir.path()).expect("read").count(),
            2,
            "a temporary file was left"
        );
    }

    #[test]
    fn one_of_kernel_and_modules_is_needed() {
        let parse = |words: &[&str]| Arguments::try_parse_from([&["roost-mkinitramfs", "-o", "x"], words].concat());
        assert!(parse(&[]).is_err());
        assert!(parse(&["--kernel", "1", "--modules", "/m"]).is_err());
        assert!(parse(&["--kernel", "1"]).is_ok());
        assert!(parse(&["--modules", "/m"]).is_ok());
    }
}

//! The Debian packages that builds, guest image and rig need.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use crate::step::{shown, step};

/// Package, and why it is needed.
const PACKAGES: &[(&str, &str)] = &[
    ("binutils", "strip the guest's envd"),
    ("busybox-static", "the rig's initramfs"),
    ("ca-certificates", "crate downloads"),
    ("clang", "bindgen of privd's dependencies"),
    ("debhelper", "the packages"),
    ("dpkg-dev", "the packages"),
    ("e2fsprogs", "mke2fs, debugfs, resize2fs"),
    ("gcc", "linking"),
    ("kmod", "module order of the initramfs"),
    ("libc6-dev", "linking, static envd"),
    ("libclang-dev", "bindgen of privd's dependencies"),
    ("libdevmapper-dev", "device-mapper's header for privd"),
    ("libmnl-dev", "nftables in privd"),
    ("libnftnl-dev", "nftables in privd"),
    ("lintian", "looks over the packages"),
    ("lz4", "kernel image"),
    ("mmdebstrap", "Debian images, the rig's QEMU"),
    ("pkg-config", "finds libnftnl and libmnl"),
    ("protobuf-compiler", "the agent's API"),
    ("util-linux", "setpriv"),
    ("xz-utils", "kernel image"),
    ("zstd", "kernel image"),
];

/// Installs what is missing when root, else fails with the list.
pub(crate) fn run() -> Result<()> {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .map(|(package, _)| *package)
        .filter(|package| !is_installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !Uid::effective().is_root() {
        for (package, reason) in PACKAGES.iter().filter(|(package, _)| missing.contains(package)) {
            eprintln!("missing: {package} ({reason})");
        }
        bail!(
            "please install: apt-get install --no-install-recommends {}",
            missing.join(" ")
        );
    }
    step(&format!("installing {}", missing.join(" ")), || {
        shown(apt_get().arg("update"))?;
        shown(
            apt_get()
                .args(["install", "-y", "--no-install-recommends"])
                .args(&missing),
        )
    })
    .context("cannot install Debian packages")
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.arg("-q").env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| output.stdout == b"installed")
}

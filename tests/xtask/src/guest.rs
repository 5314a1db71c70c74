//! What a sandbox boots: kernel, initramfs (envd and the virtio modules) and the `minimal` Debian template.
//!
//! Each part is an artefact of its own, so a changed envd costs a second: the initramfs is written again, and the binary
//! goes into a copy of the finished template through debugfs. No image is mounted, nothing needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use roost_initramfs::modules::Modules;
use roost_initramfs::{GUEST_MODULES, guest};

use crate::cache::{self, Key};
use crate::debian::{Image, RELEASE, Recipe, Size};
use crate::kernel::{self, Kernel};
use crate::step::{quiet, step};
use crate::{binaries, setup};

const TEMPLATE: Recipe<'_> = Recipe {
    release: RELEASE,
    variant: "minbase",
    packages: &[
        "ca-certificates",
        "curl",
        "iproute2",
        "iputils-ping",
        "less",
        "netbase",
        "procps",
        "sudo",
        // What is hard on a terminal.
        "vim-tiny",
    ],
    extra: &[],
};

/// Runs in the template's tree.
const PREPARE: &str = "\
    echo sandbox > etc/hostname\n\
    printf '127.0.0.1 localhost\\n127.0.1.1 sandbox\\n::1 localhost\\n' > etc/hosts\n\
    : > etc/fstab\n\
    : > etc/machine-id\n\
    rm -f etc/resolv.conf var/log/*.log var/log/apt/* var/cache/debconf/*-old\n\
    chroot . useradd --create-home --shell /bin/bash --uid 1000 user\n\
    echo 'user ALL=(ALL) NOPASSWD: ALL' > etc/sudoers.d/user\n\
    chmod 440 etc/sudoers.d/user\n";

/// Free space in the template in MiB; a sandbox's disk is usually larger, and envd grows the filesystem.
const SLACK_MIB: u64 = 64;

/// The journal does not grow with the filesystem, so it gets a size that suits larger disks. Lazy initialisation would
/// have every guest write into its copy-on-write disk for nothing.
const MKE2FS: &[&str] = &[
    "-L",
    "rootfs",
    "-m",
    "0",
    "-J",
    "size=16",
    "-E",
    "lazy_itable_init=0,lazy_journal_init=0",
];

/// Room in the rig's /var/lib/roost; the file is sparse.
const STATE_MIB: u64 = 10 * 1024;

/// The guest's files.
pub(crate) struct Guest {
    vmlinux: PathBuf,
    initramfs: PathBuf,
    rootfs: PathBuf,
    /// Names kernel and initramfs on the host.
    version: String,
}

/// `cargo xtask guest`.
pub(crate) fn run() -> Result<()> {
    setup::run()?;
    let envd = binaries::build_envd()?;
    let lock = cache::lock()?;
    let guest = ensure(&kernel::ensure()?, &envd)?;
    drop(lock);
    for (what, path) in [
        ("kernel", &guest.vmlinux),
        ("initramfs", &guest.initramfs),
        ("template", &guest.rootfs),
    ] {
        println!("{what}\t{}", path.display());
    }
    Ok(())
}

/// The guest's files with this envd, made where missing.
pub(crate) fn ensure(kernel: &Kernel, envd: &Path) -> Result<Guest> {
    let stripped = cache::artefact("envd", Key::default().file(envd)?, |path| {
        quiet(Command::new("objcopy").arg("--strip-debug").arg(envd).arg(path)).map(drop)
    })?;
    Ok(Guest {
        vmlinux: kernel.vmlinux(),
        initramfs: initramfs(kernel, &stripped)?,
        rootfs: rootfs(&stripped)?,
        version: kernel.version.clone(),
    })
}

fn initramfs(kernel: &Kernel, envd: &Path) -> Result<PathBuf> {
    let key = Key::default()
        .text(&kernel.version)
        .text(&format!("{GUEST_MODULES:?}"))
        .file(envd)?;
    cache::artefact("guest-initramfs", key, |path| {
        let envd = fs::read(envd).context("cannot read envd")?;
        let content = guest(&envd, &Modules::read(&kernel.modules())?)?;
        fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
    })
}

/// The template without envd, made when missing.
pub(crate) fn template() -> Result<PathBuf> {
    let mut key = TEMPLATE.key().text(PREPARE);
    for word in MKE2FS {
        key = key.text(word);
    }
    cache::artefact("template", key, |path| {
        let tar = path.with_extension("tar");
        TEMPLATE.make_tar(&tar)?;
        Image {
            size: Size::Slack(SLACK_MIB),
            mke2fs: MKE2FS,
            prepare: PREPARE,
        }
        .make(&tar, path)?;
        cache::remove(&tar)
    })
}

fn rootfs(envd: &Path) -> Result<PathBuf> {
    let base = template()?;
    let base_name = base
        .file_name()
        .expect("an artefact has a name")
        .to_string_lossy()
        .into_owned();
    cache::artefact("rootfs", Key::default().text(&base_name).file(envd)?, |path| {
        quiet(
            Command::new("cp")
                .args(["--reflink=auto", "--sparse=always"])
                .arg(&base)
                .arg(path),
        )?;
        write_into(path, envd, "/usr/bin", "envd")
    })
}

/// Writes an executable into an ext4 image. debugfs reports errors by text alone, so the result is checked.
fn write_into(image: &Path, file: &Path, folder: &str, name: &str) -> Result<()> {
    let script = format!(
        "cd {folder}\nwrite {} {name}\nsif {name} mode 0100755\nsif {name} uid 0\nsif {name} gid 0\n",
        file.display()
    );
    let commands = image.with_extension("debugfs");
    fs::write(&commands, script)?;
    quiet(
        Command::new("/sbin/debugfs")
            .args(["-w", "-f"])
            .arg(&commands)
            .arg(image),
    )?;
    fs::remove_file(&commands)?;
    let copy = image.with_extension("copy");
    quiet(
        Command::new("/sbin/debugfs")
            .arg("-R")
            .arg(format!("dump {folder}/{name} {}", copy.display()))
            .arg(image),
    )?;
    let same = fs::read(&copy).is_ok_and(|copy| fs::read(file).is_ok_and(|file| file == copy));
    cache::remove(&copy)?;
    ensure!(same, "debugfs could not write {name} into {}", image.display());
    quiet(Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(image)).map(drop)
}

/// The disk that becomes /var/lib/roost in the rig, with the guest's files where the agent looks for them.
pub(crate) fn state_disk(guest: &Guest) -> Result<PathBuf> {
    let mut key = Key::default().text(&guest.version).text(&STATE_MIB.to_string());
    for part in [&guest.vmlinux, &guest.initramfs, &guest.rootfs] {
        key = key.text(&part.display().to_string());
    }
    cache::artefact("state", key, |path| {
        let tree = path.with_extension("tree");
        cache::remove(&tree)?;
        fs::create_dir_all(tree.join("kernels"))?;
        fs::create_dir_all(tree.join("images/minimal"))?;
        let places = [
            (&guest.vmlinux, format!("kernels/vmlinux-{}", guest.version)),
            (&guest.initramfs, format!("kernels/initramfs-{}", guest.version)),
            (&guest.rootfs, "images/minimal/rootfs.ext4".to_owned()),
        ];
        for (from, to) in places {
            fs::hard_link(from, tree.join(to)).with_context(|| format!("cannot link {}", from.display()))?;
        }
        make_state(path, Some(&tree))?;
        cache::remove(&tree)
    })
}

/// The same disk with nothing on it, for a rig without this build.
pub(crate) fn empty_state_disk() -> Result<PathBuf> {
    let key = Key::default().text(&STATE_MIB.to_string());
    cache::artefact("empty_state", key, |path| make_state(path, None))
}

fn make_state(path: &Path, tree: Option<&Path>) -> Result<()> {
    let mut command = Command::new("/sbin/mke2fs");
    command.args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-L",
        "state",
        "-m",
        "0",
        "-E",
        "lazy_itable_init=1",
    ]);
    if let Some(tree) = tree {
        command.arg("-d").arg(tree);
    }
    step("writing the disk for /var/lib/roost", || {
        quiet(command.arg(path).arg(format!("{STATE_MIB}M"))).map(drop)
    })
}

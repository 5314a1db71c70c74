//! The rig's host: a small Debian with systemd, as an ext4 image, and the initramfs that starts it.
//!
//! The image holds nothing of ours; what a run adds comes on a disk of its own and is unpacked before systemd starts.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use roost_initramfs::cpio::Archive;
use roost_initramfs::modules::{Modules, Wanted};

use crate::cache::{self, Key};
use crate::debian::{Image, RELEASE, Recipe, Size};
use crate::guest;
use crate::kernel::{self, Kernel};
use crate::qemu;

const RECIPE: Recipe<'_> = Recipe {
    release: RELEASE,
    variant: "minbase",
    packages: &[
        "acl",
        "ca-certificates",
        "curl",
        "dmsetup",
        "e2fsprogs",
        "iproute2",
        "iputils-ping",
        "jq",
        "kmod",
        "libcap2-bin",
        "libmnl0",
        "libnftnl11",
        "nftables",
        // What the agent's proxy is measured against.
        "nginx",
        "openssl",
        "procps",
        // The stand-in VMM drives it.
        "qemu-system-x86",
        "seabios",
        "socat",
        "strace",
        "systemd",
        "systemd-sysv",
        // A terminal that tests type into and read.
        "tmux",
        "udev",
        "util-linux",
    ],
    extra: &[],
};

/// What a throw-away host does not need at each of its boots.
const MASKED: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "getty.target",
    "ldconfig.service",
    "logrotate.timer",
    "nginx.service",
    "serial-getty@ttyS0.service",
    "systemd-binfmt.service",
    "systemd-firstboot.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-logind.service",
    "systemd-machine-id-commit.service",
    "systemd-pcrphase.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pstore.service",
    "systemd-remount-fs.service",
    "systemd-timesyncd.service",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
];

/// Room for what tests write; the file is sparse.
const SIZE_MIB: u64 = 6 * 1024;

/// virtio on PCI for the disks, and the ports that carry the command's output.
const MODULES: &[Wanted<'_>] = &[
    Wanted::Needed("virtio_pci"),
    Wanted::Needed("virtio_blk"),
    Wanted::Needed("virtio_console"),
    Wanted::Needed("virtio_rng"),
];

/// The first program in the rig.
const INIT: &str = include_str!("../rig/init.sh");

/// Files to boot the rig's host from.
pub(crate) struct Host {
    /// Root filesystem; to be used through a throw-away overlay.
    pub(crate) root: PathBuf,
    /// Its initramfs.
    pub(crate) initramfs: PathBuf,
}

/// `cargo xtask images`: what needs a network and long, and nothing of this build.
pub(crate) fn run() -> Result<()> {
    let _lock = cache::lock()?;
    qemu::ensure()?;
    ensure(&kernel::ensure()?)?;
    guest::template().map(drop)
}

/// The host's files, made when missing.
pub(crate) fn ensure(kernel: &Kernel) -> Result<Host> {
    let prepare = prepare(kernel);
    let key = RECIPE.key().text(&prepare).text(&kernel.version);
    let root = cache::artefact("host", key, |path| {
        let tar = path.with_extension("tar");
        RECIPE.make_tar(&tar)?;
        let image = Image {
            size: Size::Fixed(SIZE_MIB),
            mke2fs: &["-L", "rig", "-E", "lazy_itable_init=1"],
            prepare: &prepare,
        };
        image.make(&tar, path)?;
        cache::remove(&tar)
    })?;
    let busybox = Path::new("/bin/busybox");
    let key = Key::default()
        .text(INIT)
        .text(&kernel.version)
        .text(&format!("{MODULES:?}"))
        .file(busybox)?;
    let initramfs = cache::artefact("host-initramfs", key, |path| {
        let mut archive = Archive::default();
        for directory in ["bin", "dev", "proc", "root"] {
            archive.directory(directory);
        }
        archive.character_device("dev/console", 5, 1);
        archive.file("bin/busybox", 0o755, &fs::read(busybox).context("cannot read busybox")?);
        archive.file("init", 0o755, INIT.as_bytes());
        Modules::read(&kernel.modules())?.add_to(&mut archive, MODULES)?;
        fs::write(path, archive.finish()).with_context(|| format!("cannot write {}", path.display()))
    })?;
    Ok(Host { root, initramfs })
}

/// What turns a fresh Debian tree into the rig's host; runs in the tree.
fn prepare(kernel: &Kernel) -> String {
    let modules = kernel.modules();
    let masked: String = MASKED
        .iter()
        .map(|unit| format!("ln -sf /dev/null etc/systemd/system/{unit}\n"))
        .collect();
    format!(
        "mkdir -p usr/lib/modules rig var/lib/roost\n\
         cp -r --no-preserve=ownership '{}' usr/lib/modules/\n\
         chown -R 0:0 usr/lib/modules\n\
         echo rig > etc/hostname\n\
         printf '127.0.0.1 localhost\\n127.0.1.1 rig\\n::1 localhost\\n' > etc/hosts\n\
         rm -f etc/resolv.conf; echo 'nameserver 192.0.2.53' > etc/resolv.conf\n\
         echo 5a1d0c0ffee0123456789abcdef01234 > etc/machine-id\n\
         printf '[Journal]\\nStorage=volatile\\nRuntimeMaxUse=256M\\nRateLimitIntervalSec=0\\n' > etc/systemd/journald.conf\n\
         : > etc/fstab\n\
         {masked}\
         ln -sf /lib/systemd/system/multi-user.target etc/systemd/system/default.target\n",
        modules.display()
    )
}

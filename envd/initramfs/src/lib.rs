//! Initramfs images, as files of the kernel's own format, made without root: the guest's, and what others are made of.
//!
//! ```text
//! guest():  /init (envd)   /modules/*.ko   /modules/order (one file name a line)   /dev/{console,null}   /dev /proc /sys
//! ```
//!
//! Holds: this crate depends on no other of the workspace, so `cargo xtask` can be built with it before any of them.
//! Not here: the kernel itself, which is no part of an initramfs.

pub mod cpio;
pub mod modules;

use cpio::Archive;
use modules::{ModuleError, Modules, Wanted};

/// What a guest cannot reach its disk without: virtio on PCI, the disk, the filesystem on it; its network, random numbers and balloon.
/// What a kernel has built in is not in the archive, so its names are here for kernels that have not.
pub const GUEST_MODULES: &[Wanted<'_>] = &[
    Wanted::Needed("virtio_pci"),
    Wanted::Needed("virtio_blk"),
    Wanted::Needed("virtio_net"),
    Wanted::Needed("virtio_rng"),
    Wanted::Needed("virtio_balloon"),
    Wanted::Needed("ext4"),
    // ext4's checksums by the processor. Newer kernels have them under another name, and built in.
    Wanted::Helpful("crc32c_intel"),
];

/// The initramfs of a guest that is `envd` first, with the modules of its kernel.
///
/// # Errors
/// Any [`ModuleError`].
pub fn guest(envd: &[u8], modules: &Modules) -> Result<Vec<u8>, ModuleError> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "sysroot"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    archive.file("init", 0o755, envd);
    modules.add_to(&mut archive, GUEST_MODULES)?;
    Ok(archive.finish())
}

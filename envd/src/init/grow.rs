//! Growing the root filesystem to its disk, on line: a sandbox's disk may be larger than the image it was made from,
//! and the host never touches a guest's filesystem.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;

use nix::mount::{MsFlags, mount};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

use crate::console::say;
use crate::sys;

/// Bytes of a sector in sysfs, whatever the disk's own is.
const SECTOR: u64 = 512;

/// Grows the root filesystem to the size of its device; one that has the size is left alone by the kernel. Other kinds
/// of filesystem are left alone by us.
///
/// # Errors
/// The size cannot be read, or the kernel refuses. The filesystem works as it is.
pub(crate) fn grow() -> io::Result<()> {
    let root = File::open("/")?;
    let stat = fstatfs(&root)?;
    if stat.filesystem_type() != EXT4_SUPER_MAGIC {
        return Ok(());
    }
    let device = root.metadata()?.dev();
    let path = format!("/sys/dev/block/{}:{}/size", major(device), minor(device));
    let sectors: u64 = fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)?;
    let block = u64::try_from(stat.block_size()).map_err(io::Error::other)?;
    let blocks = sectors.saturating_mul(SECTOR) / block.max(1);
    // The kernel would zero the inode tables of the new groups: now, or (init_itable) from a thread later. They are
    // zero already: behind the image the disk is. Zeroing them would only fill the sandbox's copy-on-write file.
    // Source: ext4_setup_next_flex_gd and ext4_remount, fs/ext4.
    remount("init_itable");
    let grown = sys::resize_ext4(root.as_fd(), blocks);
    remount("noinit_itable");
    grown
}

/// A refusal costs disk space on the host, nothing else.
fn remount(option: &str) {
    if let Err(error) = mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT, Some(option)) {
        say!("cannot remount the root filesystem with {option}: {error}");
    }
}

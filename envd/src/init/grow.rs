//! Growing the root filesystem to its disk, on line: a sandbox's disk may be larger than the image it was made from,
//! and the host never touches a guest's filesystem.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use nix::mount::{MsFlags, mount};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

use crate::console::say;
use crate::sys;

/// Bytes of a sector in sysfs, whatever the disk's own is.
const SECTOR: u64 = 512;
/// Where ext4's superblock is on its device, and how long it is.
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK: usize = 1024;

/// Grows the root filesystem to the size of its device. One that has the size is left alone, and so are other kinds of filesystem.
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
    let sysfs = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let sectors = fs::read_to_string(format!("{sysfs}/size"))?;
    let sectors: u64 = sectors.trim().parse().map_err(io::Error::other)?;
    let block = u64::try_from(stat.block_size()).map_err(io::Error::other)?;
    let blocks = sectors.saturating_mul(SECTOR) / block.max(1);
    // Most sandboxes ask for no more than their image has, and two remounts are a part of a boot that is felt.
    if blocks_of(&sysfs).is_ok_and(|present| present >= blocks) {
        return Ok(());
    }
    // The kernel would zero the inode tables of the new groups: now, or (init_itable) from a thread later. They are
    // zero already: behind the image the disk is. Zeroing them would only fill the sandbox's copy-on-write file.
    // Source: ext4_setup_next_flex_gd and ext4_remount, fs/ext4.
    remount("init_itable");
    let grown = sys::resize_ext4(root.as_fd(), blocks);
    remount("noinit_itable");
    grown
}

/// Blocks of the ext4 filesystem on a device, by its superblock.
fn blocks_of(sysfs: &str) -> io::Result<u64> {
    let uevent = fs::read_to_string(format!("{sysfs}/uevent"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| io::Error::other("a device without a name"))?;
    let mut superblock = [0; SUPERBLOCK];
    File::open(format!("/dev/{name}"))?.read_exact_at(&mut superblock, SUPERBLOCK_AT)?;
    Ok(blocks_in(&superblock))
}

/// Source: `struct ext4_super_block`, fs/ext4/ext4.h.
fn blocks_in(superblock: &[u8; SUPERBLOCK]) -> u64 {
    const BLOCKS_LOW: usize = 0x4;
    const INCOMPATIBLE: usize = 0x60;
    const HAS_64_BITS: u32 = 0x80;
    const BLOCKS_HIGH: usize = 0x150;
    let word = |at: usize| {
        superblock[at..at + 4]
            .iter()
            .rev()
            .fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte))
    };
    let high = if word(INCOMPATIBLE) & HAS_64_BITS == 0 {
        0
    } else {
        word(BLOCKS_HIGH)
    };
    u64::from(high) << 32 | u64::from(word(BLOCKS_LOW))
}

/// A refusal costs disk space on the host, nothing else.
fn remount(option: &str) {
    if let Err(error) = mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT, Some(option)) {
        say!("cannot remount the root filesystem with {option}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_filesystem_is_of_64_bits_where_it_says_so() {
        let mut superblock = [0; SUPERBLOCK];
        superblock[0x4..0x8].copy_from_slice(&61_696_u32.to_le_bytes());
        superblock[0x150..0x154].copy_from_slice(&3_u32.to_le_bytes());
        assert_eq!(
            blocks_in(&superblock),
            61_696,
            "what is no part of the number is something else"
        );
        superblock[0x60] = 0x80 | 0x42;
        assert_eq!(blocks_in(&superblock), (3 << 32) + 61_696);
    }
}

//! Quantities with their unit in the type. Arithmetic that could overflow is checked by its caller or saturates here, and says so.

use std::fmt;

/// 512-byte sectors, the unit of device-mapper tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "ipc", derive(serde::Serialize, serde::Deserialize))]
pub struct Sectors(pub u64);

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "ipc", derive(serde::Serialize, serde::Deserialize))]
pub struct Bytes(pub u64);

/// Mebibytes, the unit in which callers give memory and disk sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "ipc", derive(serde::Serialize, serde::Deserialize))]
pub struct Mebibytes(pub u32);

/// Virtual CPUs of one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "ipc", derive(serde::Serialize, serde::Deserialize))]
pub struct Vcpus(pub u8);

/// Bytes in a sector.
pub const SECTOR: u64 = 512;

/// Sectors in a chunk of a copy-on-write store: 4 KiB, the guest's page and block size.
pub const CHUNK_SECTORS: u64 = 8;

/// Largest disk of a sandbox: 2 TiB. Its exception store stays below 2^32 chunks, and a caller's typo is caught early.
pub const MAX_DISK: Sectors = Sectors(1 << 32);

impl Sectors {
    /// The size in bytes; saturates, which no size up to [`MAX_DISK`] reaches.
    pub fn bytes(self) -> Bytes {
        Bytes(self.0.saturating_mul(SECTOR))
    }

    /// Length in bytes of the cow file for a disk of this size: every chunk rewritten once, its 16-byte exception, the store's
    /// header chunk, one metadata chunk started but not full, and a margin of 1 MiB, so that the store cannot overflow.
    /// `None` for an empty disk, one above [`MAX_DISK`], or one that is not whole chunks.
    /// Source: `drivers/md/dm-snap-persistent.c` (one metadata chunk for each `chunk / 16` exceptions).
    pub fn cow_length(self) -> Option<Bytes> {
        if self.0 == 0 || self > MAX_DISK || !self.0.is_multiple_of(CHUNK_SECTORS) {
            return None;
        }
        let chunk = CHUNK_SECTORS * SECTOR;
        let chunks = self.0 / CHUNK_SECTORS;
        let metadata = chunks.div_ceil(chunk / 16) + 2;
        Some(Bytes((chunks + metadata) * chunk + (1 << 20)))
    }
}

impl Mebibytes {
    /// The size in bytes.
    pub fn bytes(self) -> Bytes {
        Bytes(u64::from(self.0) << 20)
    }

    /// The size in sectors.
    pub fn sectors(self) -> Sectors {
        Sectors(u64::from(self.0) << 11)
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sectors", self.0)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

impl fmt::Display for Vcpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cow_file_holds_a_full_rewrite_and_its_metadata() {
        for mib in [1, 5, 512, 5120, 1 << 20] {
            let disk = Mebibytes(mib).sectors();
            let length = disk.cow_length().expect("whole mebibytes are whole chunks").0;
            let chunks = disk.0 / CHUNK_SECTORS;
            // Header, then for each 256 exceptions one metadata chunk, then the chunks themselves.
            assert!(length >= (1 + chunks.div_ceil(256) + chunks) * 4096, "{mib} MiB");
        }
    }

    #[test]
    fn no_cow_file_for_sizes_that_are_no_disk() {
        for bad in [0, 1, 7, 9, MAX_DISK.0 + 8, u64::MAX] {
            assert_eq!(Sectors(bad).cow_length(), None, "{bad}");
        }
    }
}

//! The kernel's initramfs format (`newc` cpio), written without root: device nodes are just entries.
//!
//! Layout per entry: 110 bytes of ASCII hex header, name with NUL padded to 4, data padded to 4. Source:
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_600;
const TRAILER: &str = "TRAILER!!!";

/// An archive in the making. Parents must be added before what is in them.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Adds a directory.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, (0, 0), &[]);
    }

    /// Adds a regular file with these permission bits.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) {
        self.entry(name, FILE | permissions, (0, 0), data);
    }

    /// Adds a character device.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(data.len()).expect("an initramfs member is far below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        let (uid, gid, links, mtime, checksum) = (0, 0, 1, 0, 0);
        let fields = [
            self.inode, mode, uid, gid, links, mtime, size, 0, 0, device.0, device.1, name_size, checksum,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_start_on_four_bytes_and_carry_their_sizes() {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[6 + 6 * 8..6 + 7 * 8], b"00000005", "file size");
        assert_eq!(&bytes[6 + 11 * 8..6 + 12 * 8], b"00000005", "name size with its NUL");
        assert_eq!(&bytes[110..116], b"init\0\0", "110 + 5 is padded to 116");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701", "the trailer follows");
        assert_eq!(bytes.len() % 4, 0);
    }
}

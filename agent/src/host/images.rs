//! Templates: what sandboxes are cut from.
//!
//! `images/minimal/` is the platform's own (team and template id all zero); all others are
//! `images/teams/<base36 team>/<base36 template>/`. Each holds `rootfs.ext4`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use roost_common::units::{SECTOR, Sectors};
use uuid::Uuid;

use crate::errors::FileError;

/// Which template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct TemplateRef {
    /// The team it belongs to.
    pub team: Uuid,
    /// The template.
    pub template: Uuid,
}

impl TemplateRef {
    /// Whether this is the platform's own `minimal` image.
    pub fn is_minimal(&self) -> bool {
        self.team.is_nil() && self.template.is_nil()
    }

    fn dir(&self, images: &Path) -> PathBuf {
        if self.is_minimal() {
            images.join("minimal")
        } else {
            images
                .join("teams")
                .join(base36(self.team.as_u128()))
                .join(base36(self.template.as_u128()))
        }
    }
}

/// An image, opened.
#[derive(Debug)]
pub struct Image {
    /// The root filesystem, read-only.
    pub rootfs: File,
    /// Its size.
    pub size: Sectors,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No such template on this host.
    #[error("no template {0} of team {1} on this host")]
    Unknown(Uuid, Uuid),
    /// The template's file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The template's file is no root filesystem.
    #[error("{} is no image: it is not a regular file of whole sectors", path.display())]
    NotAnImage {
        /// The file.
        path: PathBuf,
    },
}

/// Opens the root filesystem of a template.
///
/// # Errors
/// Any [`ImageError`].
pub fn open(images: &Path, which: TemplateRef) -> Result<Image, ImageError> {
    let path = which.dir(images).join("rootfs.ext4");
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
    let rootfs = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ImageError::Unknown(which.template, which.team));
        }
        Err(source) => return Err(FileError::new("opening", &path, source).into()),
    };
    let metadata = rootfs
        .metadata()
        .map_err(|source| FileError::new("inspecting", &path, source))?;
    let length = metadata.len();
    if !metadata.is_file() || length == 0 || !length.is_multiple_of(SECTOR) {
        return Err(ImageError::NotAnImage { path });
    }
    Ok(Image {
        rootfs,
        size: Sectors(length / SECTOR),
    })
}

/// A number in base 36, `0-9a-z`, without leading zeros.
pub fn base36(mut number: u128) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut text = Vec::new();
    loop {
        text.push(DIGITS[usize::try_from(number % 36).expect("below 36")]);
        number /= 36;
        if number == 0 {
            break;
        }
    }
    text.reverse();
    String::from_utf8(text).expect("digits are ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_template_is_told_apart_from_a_broken_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let minimal = TemplateRef::default();
        assert!(matches!(open(dir.path(), minimal), Err(ImageError::Unknown(..))));
        let rootfs = dir.path().join("minimal/rootfs.ext4");
        std::fs::create_dir_all(&rootfs).expect("a directory where a file should be");
        assert!(matches!(open(dir.path(), minimal), Err(ImageError::NotAnImage { .. })));
        std::fs::remove_dir(&rootfs).expect("removed");
        for (content, good) in [(0, false), (511, false), (4096, true)] {
            std::fs::write(&rootfs, vec![0; content]).expect("written");
            assert_eq!(open(dir.path(), minimal).is_ok(), good, "{content} bytes");
        }
        std::fs::remove_file(&rootfs).expect("removed");
        std::os::unix::fs::symlink("/dev/zero", &rootfs).expect("linked");
        assert!(open(dir.path(), minimal).is_err(), "a link was followed");
    }

    #[test]
    fn numbers_in_base_36() {
        assert_eq!(base36(0), "0");
        assert_eq!(base36(35), "z");
        assert_eq!(base36(36), "10");
        assert_eq!(base36(u128::MAX), "f5lxx1zz5pnorynqglhzmsp33");
    }
}

//! Templates: what sandboxes are cut from.
//!
//! `images/minimal/` is the platform's own (team and template id all zero); all others are
//! `images/teams/<base36 team>/<base36 template>/`. Each holds `rootfs.ext4`; what else one may hold is in [`crate::templates`].

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use roost_common::units::{SECTOR, Sectors};
use uuid::Uuid;

use super::files::changed_at;
use crate::errors::FileError;
use crate::templates;

/// The root filesystem of a template.
pub(crate) const ROOTFS: &str = "rootfs.ext4";

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

    /// Its directory.
    pub(crate) fn dir(&self, images: &Path) -> PathBuf {
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
    /// Which file it is.
    pub origin: Origin,
    /// The template's directory.
    pub dir: PathBuf,
}

/// What tells one file from another that takes its place, by a rename or by being written over. A disk's changes are of no use over any
/// other file than the one that they were made over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Origin {
    /// Number in its filesystem.
    pub inode: u64,
    /// In bytes.
    pub length: u64,
    /// When its content was last changed, in nanoseconds since 1970.
    pub written_at: i64,
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
    /// It is another file than the one that a sandbox was made of.
    #[error(
        "{} is not the image that the sandbox was made of; put that one back, as the same file, for the sandbox's disk is of no use \
         without it",
        path.display()
    )]
    Replaced {
        /// The file.
        path: PathBuf,
    },
}

/// Opens the root filesystem of a template.
///
/// # Errors
/// Any [`ImageError`].
pub fn open(images: &Path, which: TemplateRef) -> Result<Image, ImageError> {
    open_in(which.dir(images), which)
}

/// Opens the root filesystem that a sandbox was made of, also where its template has been deleted since. `None`: its record does not say
/// which file that was.
///
/// # Errors
/// Any [`ImageError`].
pub fn open_origin(images: &Path, which: TemplateRef, origin: Option<Origin>) -> Result<Image, ImageError> {
    let live = open(images, which);
    let Some(origin) = origin else { return live };
    if live.as_ref().is_ok_and(|image| image.origin == origin) {
        return live;
    }
    let place = which.dir(images);
    let deleted = if which.is_minimal() {
        Vec::new()
    } else {
        templates::deleted(&place)
    };
    let found = deleted.into_iter().find_map(|dir| {
        let image = open_in(dir, which).ok()?;
        (image.origin == origin).then_some(image)
    });
    match found {
        Some(image) => Ok(image),
        None => live.and(Err(ImageError::Replaced {
            path: place.join(ROOTFS),
        })),
    }
}

fn open_in(dir: PathBuf, which: TemplateRef) -> Result<Image, ImageError> {
    let path = dir.join(ROOTFS);
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
    let origin = Origin {
        inode: metadata.ino(),
        length,
        written_at: changed_at(&metadata),
    };
    Ok(Image {
        rootfs,
        size: Sectors(length / SECTOR),
        origin,
        dir,
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

/// The number that [`base36`] writes as this, if there is one.
pub(crate) fn from_base36(text: &str) -> Option<u128> {
    let digits = text.bytes().map(|digit| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'z' => Some(digit - b'a' + 10),
        _ => None,
    });
    let number = digits.into_iter().try_fold(0_u128, |number, digit| {
        number.checked_mul(36)?.checked_add(u128::from(digit?))
    })?;
    (base36(number) == text).then_some(number)
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
        for number in [0, 7, 35, 36, u128::MAX] {
            assert_eq!(from_base36(&base36(number)), Some(number));
        }
        for other in [
            "",
            "00",
            "07",
            "A",
            "-",
            ".making-7-0",
            "f5lxx1zz5pnorynqglhzmsp34",
            "\u{e4}",
        ] {
            assert_eq!(from_base36(other), None, "{other}");
        }
    }
}

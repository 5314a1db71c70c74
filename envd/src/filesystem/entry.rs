//! What is told of a file: its kind, size, owner, times and the attributes that clients attached.
//!
//! Of a symbolic link, size, times and owner are its own; kind and mode are those of what it leads to, so that a client
//! sees at once what it can do with it. One that leads nowhere is of kind symlink.

use std::collections::BTreeMap;
use std::fs::{self, FileType, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use roost_common::guest::filesystem::{EntryInfo, FileType as Kind};

use super::{FileError, Step, at};
use crate::users::Names;

/// Attributes of clients are extended attributes with this before their name.
pub(crate) const METADATA_PREFIX: &str = "user.e2b.";

/// Describes what is at `path`, without following a link there.
///
/// # Errors
/// The kernel's, from looking at it.
pub(crate) fn entry(path: &Path, names: &Names) -> Result<EntryInfo, FileError> {
    let own = fs::symlink_metadata(path).map_err(at(Step::Look, path))?;
    let is_link = own.is_symlink();
    let target = if is_link {
        fs::metadata(path).ok()
    } else {
        Some(own.clone())
    };
    let kind = target.as_ref().map_or(Kind::FILE_TYPE_SYMLINK, kind);
    let symlink_target = is_link.then(|| fs::canonicalize(path).or_else(|_| fs::read_link(path)));
    Ok(EntryInfo {
        name: name(path),
        r#type: kind.into(),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(own.len()).unwrap_or(i64::MAX),
        mode: target.as_ref().map_or(0, |target| target.mode() & 0o7777),
        permissions: permissions(own.file_type(), own.mode()),
        owner: names.user(own.uid()),
        group: names.group(own.gid()),
        modified_time: own.modified().map(Into::into).ok().into(),
        symlink_target: symlink_target
            .and_then(Result::ok)
            .map(|target| target.to_string_lossy().into_owned()),
        metadata: match kind {
            Kind::FILE_TYPE_FILE | Kind::FILE_TYPE_DIRECTORY => metadata(path).into_iter().collect(),
            Kind::FILE_TYPE_SYMLINK | Kind::FILE_TYPE_UNSPECIFIED => Default::default(),
        },
        ..Default::default()
    })
}

/// The last part of a path; of the root, the path itself.
pub(crate) fn name(path: &Path) -> String {
    let last = path.components().next_back();
    last.map(|last| last.as_os_str().to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn kind(metadata: &Metadata) -> Kind {
    if metadata.is_dir() {
        Kind::FILE_TYPE_DIRECTORY
    } else if metadata.is_file() {
        Kind::FILE_TYPE_FILE
    } else {
        Kind::FILE_TYPE_UNSPECIFIED
    }
}

/// The attributes that clients attached; those that are not text, or cannot be read, are left out.
pub(crate) fn metadata(path: &Path) -> BTreeMap<String, String> {
    let names = xattr::list_deref(path).into_iter().flatten();
    names
        .filter_map(|name| {
            let key = name.to_str()?.strip_prefix(METADATA_PREFIX)?.to_owned();
            let value = xattr::get_deref(path, &name).ok()??;
            Some((key, String::from_utf8(value).ok()?))
        })
        .collect()
}

/// As ls(1) shows them.
fn permissions(kind: FileType, mode: u32) -> String {
    let first = match kind {
        kind if kind.is_dir() => 'd',
        kind if kind.is_symlink() => 'l',
        kind if kind.is_fifo() => 'p',
        kind if kind.is_socket() => 's',
        kind if kind.is_char_device() => 'c',
        kind if kind.is_block_device() => 'b',
        _ => '-',
    };
    let bit = |bit: u32, letter| if mode & bit != 0 { letter } else { '-' };
    let special = |execute: u32, flag: u32, both, alone| match (mode & execute != 0, mode & flag != 0) {
        (true, true) => both,
        (false, true) => alone,
        (true, false) => 'x',
        (false, false) => '-',
    };
    [
        first,
        bit(0o400, 'r'),
        bit(0o200, 'w'),
        special(0o100, 0o4000, 's', 'S'),
        bit(0o040, 'r'),
        bit(0o020, 'w'),
        special(0o010, 0o2000, 's', 'S'),
        bit(0o004, 'r'),
        bit(0o002, 'w'),
        special(0o001, 0o1000, 't', 'T'),
    ]
    .into_iter()
    .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::testing::Dir;

    fn of(path: &Path) -> EntryInfo {
        entry(path, &Names::read(Path::new("/nonexistent"))).unwrap()
    }

    #[test]
    fn a_link_shows_what_it_leads_to_and_one_that_leads_nowhere_itself() {
        let dir = Dir::new("entry");
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "12345").unwrap();
        fs::set_permissions(at("file"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("file", at("link")).unwrap();
        symlink("nowhere", at("dangling")).unwrap();
        symlink("loop", at("loop")).unwrap();
        let file = of(&at("file"));
        assert_eq!((file.name.as_str(), file.size, file.mode), ("file", 5, 0o640));
        assert_eq!((file.permissions.as_str(), file.symlink_target), ("-rw-r-----", None));
        assert!(file.modified_time.is_set());
        let link = of(&at("link"));
        let target = fs::canonicalize(at("file")).unwrap().display().to_string();
        assert_eq!(
            (link.r#type, link.mode, link.symlink_target),
            (file.r#type, 0o640, Some(target))
        );
        assert_eq!(link.permissions, "lrwxrwxrwx");
        for (name, target) in [("dangling", "nowhere"), ("loop", "loop")] {
            let entry = of(&at(name));
            assert_eq!(entry.r#type.as_known(), Some(Kind::FILE_TYPE_SYMLINK));
            assert_eq!((entry.mode, entry.symlink_target.as_deref()), (0, Some(target)));
        }
        assert_eq!(of(dir.path()).r#type.as_known(), Some(Kind::FILE_TYPE_DIRECTORY));
        assert_eq!(of(Path::new("/")).name, "/");
        assert_eq!(
            of(Path::new("/dev/null")).r#type.as_known(),
            Some(Kind::FILE_TYPE_UNSPECIFIED)
        );
    }

    #[test]
    fn permissions_are_those_of_ls() {
        let dir = fs::metadata("/").unwrap().file_type();
        assert_eq!(permissions(dir, 0o1777), "drwxrwxrwt");
        assert_eq!(permissions(dir, 0o7000), "d--S--S--T");
        assert_eq!(permissions(dir, 0o6755), "drwsr-sr-x");
    }
}

//! Access of one VM's uid to one directory of ours, as a POSIX ACL.
//!
//! A VM runs under a dynamic uid that the agent can neither `chown` to nor share a group of its own with, so the directories it
//! needs carry an entry for that uid. systemd hands dynamic uids out again: an entry that outlives its VM would admit another
//! tenant, so these directories go, or lose their entries, with the VM.

use std::io;
use std::path::Path;

/// The attribute that holds a directory's access ACL.
const ATTRIBUTE: &str = "system.posix_acl_access";

/// What a VM may do in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Pass through to names it knows.
    Enter,
    /// Make and read files.
    Write,
}

/// Gives `uid` access to `dir`, to nobody else but the directory's owner. Replaces what was there.
///
/// # Errors
/// When the filesystem has no ACLs, or the directory is not ours.
pub fn grant(dir: &Path, uid: u32, access: Access) -> io::Result<()> {
    xattr::set(dir, ATTRIBUTE, &encode(&entries(uid, access)))
}

/// Takes every access but the owner's away. By an ACL that says no more than a mode can, which the kernel makes the mode: a chmod
/// would take the set-group-id mark away as well, and with it the group of all files to come.
///
/// Where the filesystem has no ACLs there is nothing to take away.
///
/// # Errors
/// When the directory is not ours, or has gone.
pub fn revoke(dir: &Path) -> io::Result<()> {
    let minimal = encode(&[(USER_OBJ, 0o7, NO_ID), (GROUP_OBJ, 0, NO_ID), (OTHER, 0, NO_ID)]);
    match xattr::set(dir, ATTRIBUTE, &minimal) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => Ok(()),
        outcome => outcome,
    }
}

/// The owner, a named user, the group, the bound of what those two may, everybody else; and what stands where there is no id.
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;

/// The kernel's representation: version 2, then (tag, permissions, id) in ascending order of tags, all little-endian.
/// Source: `include/uapi/linux/posix_acl_xattr.h`.
fn encode(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    const VERSION: u32 = 2;
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

/// One user besides the owner, and nobody else.
fn entries(uid: u32, access: Access) -> [(u16, u16, u32); 5] {
    let granted: u16 = match access {
        Access::Enter => 0o1,
        Access::Write => 0o7,
    };
    [
        (USER_OBJ, 0o7, NO_ID),
        (USER, granted, uid),
        (GROUP_OBJ, 0, NO_ID),
        (MASK, granted, NO_ID),
        (OTHER, 0, NO_ID),
    ]
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_encoding_is_the_kernels() {
        let bytes = encode(&entries(0x0102_0304, Access::Enter));
        assert_eq!(bytes.len(), 4 + 5 * 8);
        assert_eq!(bytes[..4], [2, 0, 0, 0]);
        assert_eq!(bytes[12..20], [0x02, 0, 1, 0, 4, 3, 2, 1], "the uid's entry");
    }

    #[test]
    fn a_granted_directory_can_be_closed_again() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o2700)).expect("marked");
        grant(dir.path(), 61_999, Access::Write).expect("granted");
        assert_eq!(
            xattr::get(dir.path(), ATTRIBUTE).expect("read").map(|acl| acl.len()),
            Some(44)
        );
        revoke(dir.path()).expect("revoked");
        revoke(dir.path()).expect("revoked again");
        assert_eq!(xattr::get(dir.path(), ATTRIBUTE).expect("read"), None);
        assert_eq!(
            std::fs::metadata(dir.path()).expect("there").permissions().mode() & 0o7777,
            0o2700
        );
    }
}

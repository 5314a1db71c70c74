//! The filesystems that programs expect. All of it may be repeated: what is there already is left as it is.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use crate::console::say;

struct Mount {
    kind: &'static str,
    at: &'static str,
    flags: MsFlags,
    options: &'static str,
}

/// For filesystems that hold no programs and no devices.
pub(super) const NO_EXEC: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const NO_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// In this order: some lie within others.
const MOUNTS: [Mount; 7] = [
    Mount {
        kind: "proc",
        at: "/proc",
        flags: NO_EXEC,
        options: "",
    },
    Mount {
        kind: "sysfs",
        at: "/sys",
        flags: NO_EXEC,
        options: "",
    },
    Mount {
        kind: "devtmpfs",
        at: "/dev",
        flags: MsFlags::MS_NOSUID,
        options: "mode=0755",
    },
    Mount {
        kind: "devpts",
        at: "/dev/pts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "mode=0620,gid=5,ptmxmode=0666",
    },
    Mount {
        kind: "tmpfs",
        at: "/dev/shm",
        flags: NO_DEV,
        options: "mode=1777",
    },
    Mount {
        kind: "tmpfs",
        at: "/run",
        flags: NO_DEV,
        options: "mode=0755",
    },
    Mount {
        kind: "cgroup2",
        at: "/sys/fs/cgroup",
        flags: NO_EXEC,
        options: "",
    },
];

/// What programs expect in `/dev` and only udev makes elsewhere: bash's process substitution lives from the first.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Why a filesystem is missing.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount {kind} on {}", .at.display())]
pub(crate) struct MountError {
    kind: &'static str,
    at: PathBuf,
    source: io::Error,
}

/// Mounts all of them, and makes the directories that must be writable to everyone.
///
/// # Errors
/// `/proc`, `/sys` or `/dev` is missing. A template without the others still runs most programs.
pub(crate) fn mount_filesystems() -> Result<(), MountError> {
    for (index, mount) in MOUNTS.iter().enumerate() {
        match ensure_mounted(mount.kind, Path::new(mount.at), mount.flags, mount.options) {
            Err(error) if index >= 3 => say!("{error}: {}", error.source),
            result => result?,
        }
    }
    for (to, link) in LINKS {
        // AlreadyExists, as after a second run.
        symlink(to, link).ok();
    }
    for directory in ["/tmp", "/run/lock"] {
        let open = fs::create_dir_all(directory)
            .and_then(|()| fs::set_permissions(directory, fs::Permissions::from_mode(0o1777)));
        if let Err(error) = open {
            say!("cannot open {directory} to everyone: {error}");
        }
    }
    Ok(())
}

/// Mounts a filesystem unless something is mounted there.
pub(super) fn ensure_mounted(kind: &'static str, at: &Path, flags: MsFlags, options: &str) -> Result<(), MountError> {
    let error = |source| MountError {
        kind,
        at: at.to_owned(),
        source,
    };
    fs::create_dir_all(at).map_err(error)?;
    if is_mount_point(at).map_err(error)? {
        return Ok(());
    }
    match mount(Some(kind), at, Some(kind), flags, Some(options)) {
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(error(errno.into())),
    }
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    let (here, above) = (fs::metadata(path)?, fs::metadata(path.join(".."))?);
    Ok(here.dev() != above.dev() || here.ino() == above.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_recognised() {
        assert!(is_mount_point(Path::new("/")).unwrap());
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(!is_mount_point(Path::new("/proc/self")).unwrap());
    }
}

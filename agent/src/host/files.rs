//! Where files are, and how they are written so that a crash leaves either the old or the new.
//!
//! ```text
//! <dir>/kernels/                  guest kernels
//! <dir>/images/                   templates
//! <dir>/sandboxes/<id>/           0700, the VM's uid may pass through
//!     sandbox.json                the record; its absence means a create that never got far
//!     rootfs.cow                  the exception store
//!     vm/<n>/                     a snapshot: what the VMM writes, then ours; the record names the one that counts
//! <dir>/sandboxes/.removing-<id>  a sandbox on its way out; recovery finishes it
//! <dir>/tombstones/<id>.json      why a sandbox ended
//! <dir>/outbox/                   lifecycle events that nobody has taken yet (see [`crate::outbox`])
//! <dir>/credentials/              who this host is to its control plane (see [`crate::control::credentials`])
//! <vm_run_dir>/<id>/              sockets, exit record, console; the VM's uid may write
//! ```
//!
//! Functions here block; callers put them on a blocking thread.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use roost_common::ids::SandboxId;
use roost_common::units::Bytes;

use crate::errors::FileError;

/// Largest record or tombstone that is read back.
const MAX_RECORD: u64 = 1 << 20;

/// The directories of a host.
#[derive(Debug, Clone)]
pub struct Layout {
    dir: PathBuf,
    vm_run: PathBuf,
}

impl Layout {
    /// The layout below a data directory and a directory of run directories.
    pub fn new(dir: &Path, vm_run: &Path) -> Self {
        Self {
            dir: dir.into(),
            vm_run: vm_run.into(),
        }
    }

    /// Guest kernels.
    pub fn kernels(&self) -> PathBuf {
        self.dir.join("kernels")
    }

    /// Templates.
    pub fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    /// All sandboxes.
    pub fn sandboxes(&self) -> PathBuf {
        self.dir.join("sandboxes")
    }

    /// Run directories of all VMs.
    pub fn vm_runs(&self) -> &Path {
        &self.vm_run
    }

    /// One sandbox.
    pub fn sandbox(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    /// A sandbox's record.
    pub fn record(&self, id: &SandboxId) -> PathBuf {
        self.sandbox(id).join("sandbox.json")
    }

    /// A sandbox's exception store.
    pub fn cow(&self, id: &SandboxId) -> PathBuf {
        self.sandbox(id).join("rootfs.cow")
    }

    /// What a sandbox's VMM may write.
    pub fn vm(&self, id: &SandboxId) -> PathBuf {
        self.sandbox(id).join("vm")
    }

    /// One snapshot of a sandbox: an attempt that its VMM writes, or a generation that is ours.
    pub fn generation(&self, id: &SandboxId, number: u32) -> PathBuf {
        self.vm(id).join(number.to_string())
    }

    /// A VM's run directory.
    pub fn vm_run(&self, id: &SandboxId) -> PathBuf {
        self.vm_run.join(id.as_str())
    }

    /// Why sandboxes ended.
    pub fn tombstones(&self) -> PathBuf {
        self.dir.join("tombstones")
    }

    /// Lifecycle events that nobody has taken yet.
    pub fn outbox(&self) -> PathBuf {
        self.dir.join("outbox")
    }

    /// Who this host is to its control plane.
    pub fn credentials(&self) -> PathBuf {
        self.dir.join("credentials")
    }
}

/// File work, on a thread for it and to its end.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("file work does not panic")
}

/// Opens a file to read in a directory where a VM's uid may write: it is neither followed elsewhere nor waited for.
///
/// # Errors
/// The kernel's, and `InvalidInput` for what is no regular file.
pub(crate) fn open_of_vm(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(file)
}

/// Makes a directory that only we can enter; one that is there already is an error.
///
/// # Errors
/// [`FileError`] naming the directory.
pub fn make_dir(path: &Path) -> Result<(), FileError> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|source| FileError::new("making", path, source))
}

/// Makes the sparse file of a new exception store and opens it.
///
/// # Errors
/// [`FileError`] naming the file; it is not left behind half-made, because its directory goes.
pub fn make_cow(path: &Path, length: Bytes) -> Result<File, FileError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| FileError::new("making", path, source))?;
    file.set_len(length.0)
        .map_err(|source| FileError::new("extending", path, source))?;
    Ok(file)
}

/// Writes `path` so that it is either the old or the new, also after a power failure: a temporary file, synced, renamed, its
/// directory synced.
///
/// # Errors
/// [`FileError`] naming the step's file; the old content is intact.
pub fn write_durably(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let temporary = path.with_extension("new");
    let step = |what, source| FileError::new(what, path, source);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(|error| step("making the new version of", error))?;
    file.write_all(content).map_err(|error| step("writing", error))?;
    file.sync_all().map_err(|error| step("syncing", error))?;
    fs::rename(&temporary, path).map_err(|error| step("replacing", error))?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// The names in a directory.
///
/// # Errors
/// [`FileError`] naming it.
pub fn names(dir: &Path) -> Result<Vec<String>, FileError> {
    let failed = |source| FileError::new("reading", dir, source);
    fs::read_dir(dir)
        .map_err(failed)?
        .map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Brings a directory's entries to disk.
///
/// # Errors
/// [`FileError`] naming it.
pub fn sync_dir(dir: &Path) -> Result<(), FileError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| FileError::new("syncing", dir, error))
}

/// Reads a small file of ours.
///
/// # Errors
/// [`FileError`] naming the file, also when it is larger than any we write.
pub fn read_small(path: &Path) -> Result<Vec<u8>, FileError> {
    let step = |source| FileError::new("reading", path, source);
    let mut content = Vec::new();
    let file = File::open(path).map_err(step)?;
    file.take(MAX_RECORD + 1).read_to_end(&mut content).map_err(step)?;
    if content.len() as u64 > MAX_RECORD {
        return Err(step(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(content)
}

/// When a file's content was last changed, in nanoseconds since 1970.
///
/// # Errors
/// [`FileError`] naming the file.
pub fn written_at(path: &Path) -> Result<i64, FileError> {
    let metadata = fs::metadata(path).map_err(|source| FileError::new("inspecting", path, source))?;
    Ok(changed_at(&metadata))
}

/// When a file's content was last changed, in nanoseconds since 1970.
pub(crate) fn changed_at(metadata: &fs::Metadata) -> i64 {
    use std::os::unix::fs::MetadataExt;
    let seconds = metadata.mtime().saturating_mul(1_000_000_000);
    seconds.saturating_add(metadata.mtime_nsec())
}

/// Removes a sandbox's files and its run directory; what is not there is no error. The sandbox's directory first gets a name
/// that says what it is, so that no crash leaves something that looks alive.
///
/// # Errors
/// [`FileError`] naming what could not be removed; a repetition goes on where this ended.
pub fn remove_sandbox(layout: &Layout, id: &SandboxId) -> Result<(), FileError> {
    remove_tree(&layout.vm_run(id))?;
    let dir = layout.sandbox(id);
    let removing = layout.sandboxes().join(format!(".removing-{id}"));
    remove_tree(&removing)?;
    match fs::rename(&dir, &removing) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        outcome => outcome.map_err(|error| FileError::new("renaming", &dir, error))?,
    }
    // Before anything of it goes: a power cut must not bring the name back with half of what was in it.
    sync_dir(&layout.sandboxes())?;
    remove_tree(&removing)
}

/// Removes a directory with all in it; what is not there is no error. Symbolic links are removed, not followed.
///
/// # Errors
/// [`FileError`] naming the directory.
pub fn remove_tree(path: &Path) -> Result<(), FileError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.map_err(|error| FileError::new("removing", path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> (tempfile::TempDir, Layout, SandboxId) {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(&dir.path().join("lib"), &dir.path().join("run"));
        fs::create_dir_all(layout.sandboxes()).expect("made");
        fs::create_dir_all(layout.vm_runs()).expect("made");
        (dir, layout, "sb-1".parse().expect("an id"))
    }

    #[test]
    fn a_removed_sandbox_leaves_nothing_and_removing_it_again_is_no_error() {
        let (_dir, layout, id) = layout();
        for _ in 0..2 {
            fs::create_dir_all(layout.vm(&id)).expect("made");
            fs::create_dir_all(layout.vm_run(&id)).expect("made");
            fs::create_dir_all(layout.sandboxes().join(".removing-sb-1/half")).expect("an earlier crash");
            make_cow(&layout.cow(&id), Bytes(1 << 30)).expect("made");
            remove_sandbox(&layout, &id).expect("removed");
            remove_sandbox(&layout, &id).expect("removed again");
            assert_eq!(fs::read_dir(layout.sandboxes()).expect("read").count(), 0);
            assert_eq!(fs::read_dir(layout.vm_runs()).expect("read").count(), 0);
        }
    }

    #[test]
    fn a_cow_file_is_sparse_and_never_an_existing_one() {
        use std::os::unix::fs::MetadataExt;
        let (_dir, layout, id) = layout();
        make_dir(&layout.sandbox(&id)).expect("made");
        let file = make_cow(&layout.cow(&id), Bytes(1 << 30)).expect("made");
        let metadata = file.metadata().expect("metadata");
        assert_eq!(
            (metadata.len(), metadata.blocks(), metadata.mode() & 0o777),
            (1 << 30, 0, 0o600)
        );
        assert!(make_cow(&layout.cow(&id), Bytes(4096)).is_err());
    }

    #[test]
    fn a_durable_write_replaces_whole_files() {
        let (_dir, layout, id) = layout();
        make_dir(&layout.sandbox(&id)).expect("made");
        for content in ["first", "second"] {
            write_durably(&layout.record(&id), content.as_bytes()).expect("written");
            assert_eq!(read_small(&layout.record(&id)).expect("read"), content.as_bytes());
        }
        assert_eq!(
            fs::read_dir(layout.sandbox(&id)).expect("read").count(),
            1,
            "no temporary file is left"
        );
    }

    #[test]
    fn errors_name_the_file() {
        let error = write_durably(Path::new("/nonexistent/x.json"), b"").expect_err("no such directory");
        assert!(error.to_string().contains("/nonexistent/x.json"), "{error}");
    }
}

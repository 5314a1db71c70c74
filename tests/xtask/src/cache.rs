//! What `target/rig` holds: artefacts named after the content they were made from.
//!
//! ```text
//! target/rig/<what>-<key>      an artefact; appears whole, by rename
//! target/rig/runs/<pid>/       one run of the rig: its payload disk and its logs
//! target/rig/lock              held while artefacts are made, not while a rig runs
//! ```
//!
//! Removing the folder is always safe and makes everything anew, which is also how newer Debian packages get in.

use std::fs::{self, File};
use std::hash::Hasher;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

/// The workspace's root folder.
pub(crate) fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .and_then(Path::parent)
        .expect("tests/xtask lies two levels below the workspace")
        .to_path_buf()
}

/// Cargo's target folder of this workspace.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => workspace().join(dir),
        None => workspace().join("target"),
    }
}

/// The folder that holds the artefacts, made when missing.
pub(crate) fn dir() -> Result<PathBuf> {
    let dir = target().join("rig");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// Waits for other runs of xtask that are making artefacts; held until dropped.
pub(crate) fn lock() -> Result<Flock<File>> {
    let path = dir()?.join("lock");
    let open = || File::create(&path).with_context(|| format!("cannot open {}", path.display()));
    match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err(_) => {
            eprintln!("xtask: waiting for another run that is making artefacts");
            Flock::lock(open()?, FlockArg::LockExclusive)
                .map_err(|(_, errno)| errno)
                .with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// A content key. The hash is stable for one toolchain; a new one makes the artefacts once more, no harm done.
#[derive(Default)]
pub(crate) struct Key(std::hash::DefaultHasher);

impl Key {
    /// Adds text, with its length so that neighbours cannot run into each other.
    pub(crate) fn text(mut self, text: &str) -> Self {
        self.0.write_usize(text.len());
        self.0.write(text.as_bytes());
        self
    }

    /// Adds a file's content.
    pub(crate) fn file(mut self, path: &Path) -> Result<Self> {
        let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut chunk = vec![0; 1 << 20];
        loop {
            let read = file
                .read(&mut chunk)
                .with_context(|| format!("cannot read {}", path.display()))?;
            if read == 0 {
                return Ok(self);
            }
            self.0.write(&chunk[..read]);
        }
    }

    /// The key as it appears in names.
    pub(crate) fn finish(self) -> String {
        format!("{:016x}", self.0.finish())
    }
}

/// The artefact `<what>-<key>`: made by `make` at a temporary path and renamed when it is whole. Older ones of the same
/// name go; a rig that still uses one holds it open.
pub(crate) fn artefact(what: &str, key: Key, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let dir = dir()?;
    let name = format!("{what}-{}", key.finish());
    let path = dir.join(&name);
    if path.exists() {
        return Ok(path);
    }
    let unfinished = dir.join(format!("{what}.unfinished"));
    remove(&unfinished)?;
    crate::step::step(&format!("making {what}"), || make(&unfinished))?;
    fs::rename(&unfinished, &path).with_context(|| format!("cannot rename {}", unfinished.display()))?;
    for entry in fs::read_dir(&dir)? {
        let entry = entry?;
        let other = entry.file_name().to_string_lossy().into_owned();
        let same_kind = other.rsplit_once('-').is_some_and(|(kind, _)| kind == what);
        if same_kind && other != name {
            remove(&entry.path())?;
        }
    }
    Ok(path)
}

/// Removes a file or a tree; missing is fine.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

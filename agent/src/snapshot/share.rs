//! A template's memory for one sandbox: what its VMM is given to read.
//!
//! All sandboxes of a template read the same file, each by a name in a directory of its own, so that a create copies nothing and the host's
//! page cache has the memory once. It belongs to us and its group may read it, so no VM can write to it, and what is written to it by
//! mistake would be every sandbox's: nothing here opens it to write. A template that is deleted is gone when the last name is.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::fstat;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::copy::copy_memory;
use super::manifest::Manifest;
use super::{MEMORY, SHARED, STATE, SnapshotDir, SnapshotError, Unkept};

/// How a sandbox has a template's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shared {
    /// The same file.
    Linked,
    /// A file of its own: on another filesystem, or made by somebody else, or before templates' files were the VMs' group's.
    Copied,
}

/// Puts the state and the memory of a template's generation into a new directory of ours, for a VMM to read. No generation: it has no
/// manifest, and nothing of it is durable.
///
/// # Errors
/// Any [`SnapshotError`]; nothing of `to` stays.
pub fn share(template: &Path, to: &Path) -> Result<Shared, SnapshotError> {
    let from = SnapshotDir::open(template)?;
    let manifest = Manifest::read_in(&from)?;
    let (state, memory) = manifest.open_template(&from)?;
    let unkept = Unkept::make(to)?;
    unkept.dir.make(STATE, SHARED, &state)?;
    let shared = if link(&from, &memory, &unkept.dir)? {
        Shared::Linked
    } else {
        copy_memory(&memory, &manifest, &unkept.dir)?;
        Shared::Copied
    };
    unkept.stay();
    Ok(shared)
}

/// Gives `memory` of `from` a name in `to` too, where a VM can read it there and nobody but us can write to it. Whether it has one.
fn link(from: &SnapshotDir, memory: &File, to: &SnapshotDir) -> Result<bool, SnapshotError> {
    let inspect = |file: &File| file.metadata().map_err(|error| to.error("inspecting", MEMORY, error));
    // What is made there is the directory's group's.
    let directory = fstat(&to.fd).map_err(|errno| to.error("inspecting", ".", errno))?;
    let known = inspect(memory)?;
    let is_ours = known.uid() == nix::unistd::geteuid().as_raw();
    if !is_ours || known.gid() != directory.st_gid || known.mode() & 0o7777 != SHARED {
        return Ok(false);
    }
    match linkat(&from.fd, MEMORY, &to.fd, MEMORY, AtFlags::empty()) {
        Ok(()) => {}
        // Another filesystem; as many names as a file can have; a filesystem without.
        Err(Errno::EXDEV | Errno::EMLINK | Errno::EPERM | Errno::EOPNOTSUPP) => return Ok(false),
        Err(errno) => return Err(to.error("linking", MEMORY, errno).into()),
    }
    // From here on the name is in a directory that only we can write.
    let linked = inspect(&to.open_named(MEMORY)?)?;
    if (linked.dev(), linked.ino()) == (known.dev(), known.ino()) {
        return Ok(true);
    }
    unlinkat(&to.fd, MEMORY, UnlinkatFlags::NoRemoveDir)
        .map_err(|errno| to.error("removing", MEMORY, io::Error::from(errno)))?;
    Err(SnapshotError::Exchanged { name: MEMORY })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::snapshot::seal::tests::Attempt;
    use crate::snapshot::{CONFIG, MANIFEST};

    fn inode(path: &Path) -> (u64, u64) {
        let found = fs::metadata(path).expect("there");
        (found.ino(), found.nlink())
    }

    /// A template's generation, which is copied from a sandbox's.
    fn template(attempt: &Attempt) -> (std::path::PathBuf, Manifest) {
        attempt.seal().expect("sealed");
        let template = attempt.vm.join("template");
        let manifest = crate::snapshot::copy_generation(&attempt.generation, &template).expect("copied");
        (template, manifest)
    }

    #[test]
    fn sandboxes_of_a_template_read_one_file_and_it_outlives_the_template() {
        let attempt = Attempt::new();
        let (template, manifest) = template(&attempt);
        let [first, second] = ["11", "12"].map(|name| attempt.vm.join(name));
        for to in [&first, &second] {
            assert_eq!(share(&template, to).expect("shared"), Shared::Linked);
            assert_eq!(
                fs::read(to.join(STATE)).expect("read"),
                fs::read(template.join(STATE)).expect("read")
            );
            assert!(!to.join(MANIFEST).exists() && !to.join(CONFIG).exists());
        }
        assert_eq!(inode(&first.join(MEMORY)), inode(&template.join(MEMORY)));
        assert_eq!(inode(&template.join(MEMORY)).1, 3);
        manifest.verify_template(&template).expect("whole, whoever shares it");
        assert!(manifest.verify(&template).is_err(), "a sandbox's own has one name");
        let content = fs::read(template.join(MEMORY)).expect("read");
        fs::remove_dir_all(&template).expect("removed");
        fs::remove_dir_all(&first).expect("removed");
        assert!(fs::read(second.join(MEMORY)).expect("read") == content);
    }

    #[test]
    fn a_memory_that_the_vm_could_not_read_or_others_could_write_is_copied() {
        for mode in [0o600, 0o660, 0o644] {
            let attempt = Attempt::new();
            let (template, _) = template(&attempt);
            fs::set_permissions(template.join(MEMORY), PermissionsExt::from_mode(mode)).expect("set");
            let to = attempt.vm.join("11");
            assert_eq!(share(&template, &to).expect("shared"), Shared::Copied, "{mode:o}");
            let copied = fs::metadata(to.join(MEMORY)).expect("there");
            assert_eq!((copied.mode() & 0o7777, copied.nlink()), (SHARED, 1));
            assert!(fs::read(to.join(MEMORY)).expect("read") == fs::read(template.join(MEMORY)).expect("read"));
        }
    }

    #[test]
    fn what_is_not_as_it_was_made_is_not_shared() {
        let attempt = Attempt::new();
        let (template, _) = template(&attempt);
        let to = attempt.vm.join("11");
        fs::write(template.join(STATE), "{}").expect("written");
        assert!(share(&template, &to).is_err());
        assert!(!to.exists());
    }
}

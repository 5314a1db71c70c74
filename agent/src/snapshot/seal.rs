//! Taking a snapshot over from the VMM that wrote it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{AtFlags, renameat};
use nix::sys::stat::fstatat;
use roost_common::units::Bytes;

use super::copy::punch_zeros;
use super::manifest::{About, Files, Manifest, MemoryFile};
use super::{MEMORY, SHARED, STATE, SnapshotDir, SnapshotError, Unkept, allocated, check_length, state};

/// Longest state that is taken over; v53 writes some 200 KiB for a small VM, most of it vCPU registers.
pub const MAX_STATE: u64 = 16 << 20;

/// Makes `generation` of the snapshot that a VMM has written into `attempt`: state parsed and copied, memory moved, all of it
/// on disk, with a manifest. `attempt` is a directory of ours in which that VMM may still be writing, and it keeps the rest of
/// its content, including `config.json`, which nobody reads; the caller removes it.
///
/// What is all zeros in the memory becomes a hole before it is on disk, through `writable`, which whoever made it says is the memory
/// file: a VMM writes every page that its guest ever used, and the guest has zeroed what it no longer needs.
///
/// The memory file goes on belonging to the VM's uid, and a VMM that holds it open can write to it until it has ended: who goes
/// on to use the generation ends the VMM first and then [verifies](Manifest::verify) it, or makes a
/// [copy](super::copy_generation).
///
/// # Errors
/// Any [`SnapshotError`]; nothing of `generation` stays, and the memory file is wherever it was, or gone.
pub fn seal(attempt: &Path, generation: &Path, about: &About, writable: &File) -> Result<Manifest, SnapshotError> {
    let attempt = SnapshotDir::open(attempt)?;
    // Other names are no matter, as long as the caller can be expected to remove them.
    attempt.names()?;
    let text = attempt.read_bounded(STATE, 1..=MAX_STATE)?;
    let length = memory_length(&text, about)?;
    let memory = attempt.open_regular(MEMORY)?;
    let identity = |file: &File| {
        let found = file
            .metadata()
            .map_err(|error| attempt.error("inspecting", MEMORY, error))?;
        Ok::<_, SnapshotError>((found.dev(), found.ino()))
    };
    if identity(writable)? != identity(&memory)? {
        return Err(SnapshotError::Exchanged { name: MEMORY });
    }

    let unkept = Unkept::make(generation)?;
    let dir = &unkept.dir;
    let state = dir.write_new(STATE, SHARED, &text)?;
    take_over(&attempt, &memory, dir)?;
    let inspect = |file: &File, name| file.metadata().map_err(|error| dir.error("inspecting", name, error));
    // Before it is read, and once more when it no longer changes.
    let found = inspect(&memory, MEMORY)?.len();
    check_length(MEMORY, found, length.clone())?;
    punch_zeros(writable, found).map_err(|error| dir.error("reading", MEMORY, error))?;
    // A read-only descriptor will do for fsync, and one opened after a failed writeback still hears of it.
    memory.sync_all().map_err(|error| dir.error("syncing", MEMORY, error))?;
    let (state, memory) = (inspect(&state, STATE)?, inspect(&memory, MEMORY)?);
    check_length(MEMORY, memory.len(), length)?;
    let files = Files::new(&text, allocated(&state), Bytes(memory.len()), allocated(&memory));
    let manifest = Manifest::new(about.clone(), files);
    unkept.keep(&manifest)?;
    Ok(manifest)
}

/// Judges a state, and says how long the memory file that goes with it must be.
fn memory_length(text: &[u8], about: &About) -> Result<std::ops::RangeInclusive<u64>, SnapshotError> {
    state::check(text).map_err(SnapshotError::State)?;
    match about.memory_file {
        // No format to know a length from.
        MemoryFile::Stream => Ok(1..=u64::MAX),
        MemoryFile::Raw => {
            let described = state::memory(text).map_err(SnapshotError::State)?;
            let expected = about.size.memory.bytes();
            for found in [described.saved, described.mapped] {
                if found != expected.0 {
                    return Err(SnapshotError::OtherMemory {
                        found: Bytes(found),
                        expected,
                    });
                }
            }
            Ok(described.saved..=described.saved)
        }
    }
}

/// Moves the memory file, and checks that what was moved is what was opened.
fn take_over(attempt: &SnapshotDir, memory: &File, dir: &SnapshotDir) -> Result<(), SnapshotError> {
    renameat(&attempt.fd, MEMORY, &dir.fd, MEMORY).map_err(|errno| attempt.error("moving", MEMORY, errno))?;
    // From here on the name is in a directory that only we can write.
    let moved = fstatat(&dir.fd, MEMORY, AtFlags::AT_SYMLINK_NOFOLLOW)
        .map_err(|errno| dir.error("inspecting", MEMORY, errno))?;
    let opened = memory
        .metadata()
        .map_err(|error| dir.error("inspecting", MEMORY, error))?;
    if (moved.st_dev, moved.st_ino) != (opened.dev(), opened.ino()) {
        return Err(SnapshotError::Exchanged { name: MEMORY });
    }
    match opened.nlink() {
        1 => Ok(()),
        links => Err(SnapshotError::Linked { name: MEMORY, links }),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    use nix::libc;
    use nix::sys::stat::Mode;
    use serde_json::json;

    use super::*;
    use crate::errors::FileError;
    use crate::snapshot::manifest::tests::about;
    use crate::snapshot::state::tests::sample;
    use crate::snapshot::{CONFIG, MANIFEST};

    /// A `vm` directory with an attempt in it, as v53 leaves one for a VM of 64 MiB.
    pub(in crate::snapshot) struct Attempt {
        _dir: tempfile::TempDir,
        pub(in crate::snapshot) vm: PathBuf,
        attempt: PathBuf,
        pub(in crate::snapshot) generation: PathBuf,
    }

    impl Attempt {
        pub(in crate::snapshot) fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            let vm = dir.path().join("vm");
            let attempt = vm.join("1");
            fs::create_dir_all(&attempt).expect("made");
            let ranges = [(0, 64 << 20)];
            fs::write(attempt.join(CONFIG), "{\"disks\": [{\"path\": \"/etc/shadow\"}]}").expect("written");
            fs::write(attempt.join(STATE), sample(&ranges, &ranges).to_string()).expect("written");
            let memory = File::create(attempt.join(MEMORY)).expect("made");
            memory.set_len(64 << 20).expect("extended");
            memory.write_all_at(&[7; 8192], 32 << 20).expect("written");
            Self {
                generation: vm.join("2"),
                _dir: dir,
                vm,
                attempt,
            }
        }

        pub(in crate::snapshot) fn seal(&self) -> Result<Manifest, SnapshotError> {
            self.seal_as(&about())
        }

        /// As the shim has it open that made it.
        fn writable(&self) -> File {
            let name = self.attempt.join(MEMORY);
            // Whatever a test puts in its place, the shim lends no other.
            let memory = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&name);
            memory.unwrap_or_else(|_| tempfile::tempfile().expect("a file"))
        }

        fn seal_as(&self, about: &About) -> Result<Manifest, SnapshotError> {
            seal(&self.attempt, &self.generation, about, &self.writable())
        }

        fn state(&self) -> PathBuf {
            self.attempt.join(STATE)
        }

        fn memory(&self) -> PathBuf {
            self.attempt.join(MEMORY)
        }

        fn refusal(&self) -> SnapshotError {
            let error = self.seal().expect_err("sealed");
            assert!(!self.generation.exists(), "a generation stays after {error}");
            error
        }
    }

    #[test]
    fn a_sealed_snapshot_is_whole_and_readable_to_the_group_and_none_of_it_is_the_vmms_word() {
        let attempt = Attempt::new();
        let manifest = attempt.seal().expect("sealed");
        assert_eq!(Manifest::read(&attempt.generation).expect("read"), manifest);
        manifest.verify(&attempt.generation).expect("as sealed");
        assert_eq!(manifest.files.memory.length, Bytes(64 << 20));
        assert!(manifest.files.memory.allocated < Bytes(1 << 20), "holes stay holes");
        let mode = |path: PathBuf| fs::metadata(path).expect("there").permissions().mode() & 0o7777;
        assert_eq!(mode(attempt.generation.clone()), 0o700);
        assert_eq!(mode(attempt.generation.join(STATE)), 0o640);
        assert_eq!(mode(attempt.generation.join(MANIFEST)), 0o600);
        assert!(!attempt.generation.join(CONFIG).exists());
    }

    #[test]
    fn the_mark_that_hands_the_group_down_stays() {
        let attempt = Attempt::new();
        fs::set_permissions(&attempt.vm, PermissionsExt::from_mode(0o2710)).expect("marked");
        attempt.seal().expect("sealed");
        let mode = fs::metadata(&attempt.generation).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o2700);
    }

    #[test]
    fn an_existing_generation_is_left_alone() {
        let attempt = Attempt::new();
        fs::create_dir(&attempt.generation).expect("made");
        fs::write(attempt.generation.join("keep"), "").expect("written");
        let error = attempt.seal().expect_err("it exists");
        assert!(
            matches!(error, SnapshotError::File(FileError { doing: "making", .. })),
            "{error}"
        );
        assert!(attempt.generation.join("keep").exists());
        assert!(attempt.memory().exists());
    }

    #[test]
    fn only_regular_files_with_one_name_are_taken_over() {
        for name in [STATE, MEMORY] {
            let replaced = |with: &dyn Fn(&Path)| {
                let attempt = Attempt::new();
                let path = attempt.attempt.join(name);
                fs::rename(&path, attempt.vm.join("elsewhere")).expect("moved away");
                with(&path);
                attempt.refusal()
            };
            let not_regular: [&dyn Fn(&Path); 4] = [
                &|path| symlink("../elsewhere", path).expect("linked"),
                &|path| nix::unistd::mkfifo(path, Mode::S_IRWXU).expect("made"),
                &|path| fs::create_dir(path).expect("made"),
                &|path| drop(std::os::unix::net::UnixListener::bind(path).expect("bound")),
            ];
            for (kind, with) in not_regular.into_iter().enumerate() {
                let error = replaced(with);
                assert!(
                    matches!(error, SnapshotError::NotRegular { .. }),
                    "{name}, {kind}: {error}"
                );
            }
            let error = replaced(&|path| fs::hard_link(path.with_file_name("../elsewhere"), path).expect("linked"));
            assert!(
                matches!(error, SnapshotError::Linked { links: 2, .. }),
                "{name}: {error}"
            );
            let error = replaced(&|_| ());
            assert!(matches!(error, SnapshotError::File(_)), "{name}: {error}");
            let error = replaced(&|path| drop(File::create(path).expect("made")));
            assert!(
                matches!(error, SnapshotError::Length { found: 0, .. }),
                "{name}: {error}"
            );
        }
    }

    #[test]
    fn only_a_whole_state_of_this_vm_is_taken_over() {
        let with = |content: &[u8]| {
            let attempt = Attempt::new();
            fs::write(attempt.state(), content).expect("written");
            attempt.refusal()
        };
        let whole = fs::read(Attempt::new().state()).expect("read");
        for bad in [
            whole[..whole.len() - 1].to_vec(),
            [whole.clone(), b"}".to_vec()].concat(),
            [b"[".repeat(100_000), b"]".repeat(100_000)].concat(),
            json!({ "standin": "53.0.0" }).to_string().into_bytes(),
        ] {
            let error = with(&bad);
            assert!(matches!(error, SnapshotError::State(_)), "{error}");
        }
        let padded = [whole.clone(), vec![b' '; 17 << 20]].concat();
        assert!(matches!(with(&padded), SnapshotError::Length { name: STATE, .. }));
        let right = [(0, 64 << 20)];
        let other = [(0, 128 << 20)];
        for (ranges, mappings) in [(right, other), (other, right), (other, other)] {
            let error = with(sample(&ranges, &mappings).to_string().as_bytes());
            assert!(matches!(error, SnapshotError::OtherMemory { .. }), "{error}");
        }
    }

    #[test]
    fn memory_must_be_as_long_as_the_state_says() {
        for length in [0, 4096, (64 << 20) - 1, (64 << 20) + 1, 1 << 40] {
            let attempt = Attempt::new();
            let file = OpenOptions::new().write(true).open(attempt.memory()).expect("opened");
            file.set_len(length).expect("resized");
            assert!(
                matches!(attempt.refusal(), SnapshotError::Length { name: MEMORY, .. }),
                "{length}"
            );
        }
    }

    #[test]
    fn a_stream_has_no_length_but_is_not_empty() {
        let attempt = Attempt::new();
        let about = About {
            memory_file: MemoryFile::Stream,
            ..about()
        };
        fs::write(attempt.state(), "{\"standin\": \"53.0.0\"}").expect("written");
        fs::write(attempt.memory(), "QEVM").expect("written");
        let manifest = attempt.seal_as(&about).expect("sealed");
        manifest.verify(&attempt.generation).expect("as sealed");
        let empty = attempt.vm.join("3");
        fs::write(attempt.memory(), "").expect("written");
        let error = seal(&attempt.attempt, &empty, &about, &attempt.writable()).expect_err("empty");
        assert!(matches!(error, SnapshotError::Length { .. }), "{error}");
    }

    #[test]
    fn other_names_are_ignored_up_to_a_bound() {
        let attempt = Attempt::new();
        fs::write(attempt.attempt.join("core"), "x").expect("written");
        symlink("/etc/shadow", attempt.attempt.join(MANIFEST)).expect("linked");
        attempt.seal().expect("sealed");
        assert!(!attempt.generation.join("core").exists());

        let attempt = Attempt::new();
        for number in 0..10_000 {
            File::create(attempt.attempt.join(format!("name-{number}"))).expect("made");
        }
        assert!(matches!(attempt.refusal(), SnapshotError::TooManyNames));
    }

    #[test]
    fn pages_that_the_guest_has_zeroed_are_not_kept() {
        let attempt = Attempt::new();
        let file = OpenOptions::new().write(true).open(attempt.memory()).expect("opened");
        file.write_all_at(&[0; 8 << 20], 8 << 20).expect("written");
        file.write_all_at(b"x", (12 << 20) + 5).expect("written");
        let before = fs::read(attempt.memory()).expect("read");
        let manifest = attempt.seal().expect("sealed");
        assert!(manifest.files.memory.allocated < Bytes(1 << 20), "{manifest:?}");
        let after = fs::read(attempt.generation.join(MEMORY)).expect("read");
        assert!(before == after, "the memory is another");
        manifest.verify(&attempt.generation).expect("as sealed");
    }

    #[test]
    fn a_memory_file_of_the_shims_that_is_not_the_attempts_is_not_touched() {
        let attempt = Attempt::new();
        let other = attempt.vm.join("other");
        fs::write(&other, [0; 1 << 20]).expect("written");
        let lent = OpenOptions::new().read(true).write(true).open(&other).expect("opened");
        let error = seal(&attempt.attempt, &attempt.generation, &about(), &lent).expect_err("another file");
        assert!(matches!(error, SnapshotError::Exchanged { name: MEMORY }), "{error}");
        assert!(!attempt.generation.exists());
        let blocks = fs::metadata(&other).expect("there").blocks();
        assert!(blocks * 512 >= 1 << 20, "{blocks} blocks are left");
    }

    #[test]
    fn memory_that_is_exchanged_before_it_is_moved_is_noticed() {
        let attempt = Attempt::new();
        let from = SnapshotDir::open(&attempt.attempt).expect("opened");
        let memory = from.open_regular(MEMORY).expect("opened");
        fs::rename(attempt.memory(), attempt.vm.join("elsewhere")).expect("moved away");
        fs::copy(attempt.vm.join("elsewhere"), attempt.memory()).expect("copied");
        {
            let unkept = Unkept::make(&attempt.generation).expect("made");
            let error = take_over(&from, &memory, &unkept.dir).expect_err("another file");
            assert!(matches!(error, SnapshotError::Exchanged { .. }), "{error}");
        }
        assert!(!attempt.generation.exists());
    }

    #[test]
    fn memory_that_gets_another_name_before_it_is_moved_is_noticed() {
        let attempt = Attempt::new();
        let from = SnapshotDir::open(&attempt.attempt).expect("opened");
        let memory = from.open_regular(MEMORY).expect("opened");
        fs::hard_link(attempt.memory(), attempt.vm.join("elsewhere")).expect("linked");
        let unkept = Unkept::make(&attempt.generation).expect("made");
        let error = take_over(&from, &memory, &unkept.dir).expect_err("two names");
        assert!(matches!(error, SnapshotError::Linked { links: 2, .. }), "{error}");
    }

    #[test]
    fn an_attempt_that_is_a_link_is_not_followed() {
        let attempt = Attempt::new();
        let link = attempt.vm.join("link");
        symlink(&attempt.attempt, &link).expect("linked");
        let error = seal(&link, &attempt.generation, &about(), &attempt.writable()).expect_err("a link");
        assert!(
            matches!(error, SnapshotError::File(FileError { doing: "opening", .. })),
            "{error}"
        );
    }
}

//! Filesystems without room, and disks that fail.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// Smallest piece that a filesystem gives away.
const BLOCK: i64 = 4096;

/// A file that has all the room there was in its filesystem, what is kept for root included; the room is back with its end.
#[derive(Debug)]
pub struct Filler {
    path: PathBuf,
}

impl Filler {
    /// Fills the filesystem of a directory. Nothing is written: the blocks are taken.
    ///
    /// # Panics
    /// When it cannot be filled.
    pub fn fill(dir: &Path) -> Self {
        Self::fill_all_but(dir, 0)
    }

    /// As [`fill`](Self::fill), but for so many bytes.
    ///
    /// # Panics
    /// When it cannot be filled.
    pub fn fill_all_but(dir: &Path, left: u64) -> Self {
        // Kept while all the rest is taken, given back then.
        let spared = dir.join("spared");
        let kept = File::create(&spared).expect("made");
        if left > 0 {
            let left = left.try_into().expect("no file is longer");
            fallocate(&kept, FallocateFlags::empty(), 0, left).expect("room");
        }
        let filler = Self {
            path: dir.join("filler"),
        };
        let file = File::create(&filler.path).expect("made");
        let (mut at, mut piece) = (0, 1 << 30);
        while piece >= BLOCK {
            match fallocate(&file, FallocateFlags::empty(), at, piece) {
                Ok(()) => at += piece,
                Err(Errno::ENOSPC) => piece /= 2,
                Err(errno) => panic!("cannot fill {}: {errno}", dir.display()),
            }
        }
        std::fs::remove_file(&spared).expect("removed");
        // Before that its blocks are nobody's.
        run("sync", &[]);
        filler
    }

    /// Leaves about so many bytes of the room there is, and at no moment less: guests may be writing.
    ///
    /// # Panics
    /// When there is less already.
    pub fn leave(dir: &Path, left: u64) -> Self {
        let space = nix::sys::statvfs::statvfs(dir).expect("a filesystem");
        let free = space.blocks_available() * space.fragment_size();
        let taken = free.checked_sub(left).expect("there is more room than that");
        let filler = Self {
            path: dir.join("filler"),
        };
        let file = File::create(&filler.path).expect("made");
        let taken = taken.try_into().expect("no file is longer");
        fallocate(&file, FallocateFlags::empty(), 0, taken).expect("room");
        filler
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let removed = std::fs::remove_file(&self.path);
        // A test that fails anyway says why itself.
        if !std::thread::panicking() {
            removed.expect("removed");
        }
    }
}

/// Takes all the blocks that a sparse file may ever need, so that writing it needs no room any more. Its time of change is not
/// kept.
///
/// # Panics
/// When there is no room for them.
pub fn preallocate(path: &Path) {
    let file = File::options().write(true).open(path).expect("opened");
    let length = file.metadata().expect("metadata").len();
    let length = length.try_into().expect("no file is longer");
    fallocate(&file, FallocateFlags::empty(), 0, length).expect("room");
}

/// What a [`FaultyDisk`] does with what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// It reads and writes.
    Good,
    /// It reads, and every write is an error. A filesystem takes no more changes after that.
    FailsWrites,
    /// Writes of what files hold are errors, and the filesystem itself lives on.
    FailsData,
    /// Everything is an error.
    Fails,
}

/// A small ext4 filesystem on a disk that can be made to fail: a file, a loop and a device-mapper device, all gone with this value.
#[derive(Debug)]
pub struct FaultyDisk {
    file: PathBuf,
    device: String,
    /// In 512-byte sectors.
    length: u64,
    mounted_at: Option<PathBuf>,
}

impl FaultyDisk {
    const NAME: &str = "faulty";
    /// Where an ext4 of up to 600 MiB has its journal and its tables, in sectors: what lies behind it is files' and directories'.
    const TABLES: u64 = 32 << 11;

    /// Makes one of so many MiB; there is one at a time.
    ///
    /// # Panics
    /// When that fails.
    pub fn new(mebibytes: u64) -> Self {
        let file = PathBuf::from("/var/tmp/faulty.ext4");
        File::create(&file)
            .and_then(|made| made.set_len(mebibytes << 20))
            .expect("made");
        let path = file.to_str().expect("ASCII");
        let device = run("losetup", &["--find", "--show", path]);
        let disk = Self {
            device,
            length: mebibytes << 11,
            mounted_at: None,
            file,
        };
        run("dmsetup", &["create", Self::NAME, "--table", &disk.table(Health::Good)]);
        run(
            "mkfs.ext4",
            &["-q", "-m", "0", "-E", "packed_meta_blocks=1", &disk.node()],
        );
        disk
    }

    fn node(&self) -> String {
        format!("/dev/mapper/{}", Self::NAME)
    }

    fn table(&self, health: Health) -> String {
        let (length, device) = (self.length, &self.device);
        match health {
            Health::Good => format!("0 {length} linear {device} 0"),
            // Up for no second, down for longer than any test.
            Health::FailsWrites => format!("0 {length} flakey {device} 0 0 100000 1 error_writes"),
            Health::FailsData => {
                let (tables, rest) = (Self::TABLES, length - Self::TABLES);
                format!(
                    "0 {tables} linear {device} 0\n{tables} {rest} flakey {device} {tables} 0 100000 1 error_writes"
                )
            }
            Health::Fails => format!("0 {length} error"),
        }
    }

    /// From now on it is so. What it holds stays.
    ///
    /// # Panics
    /// When that fails.
    pub fn becomes(&self, health: Health) {
        // Without the filesystem's consent: it would first be written out whole.
        run("dmsetup", &["suspend", "--nolockfs", "--noflush", Self::NAME]);
        run("dmsetup", &["load", Self::NAME, "--table", &self.table(health)]);
        run("dmsetup", &["resume", Self::NAME]);
    }

    /// Mounts it.
    ///
    /// # Panics
    /// When that fails.
    pub fn mount(&mut self, at: &Path) {
        run("mount", &[&self.node(), at.to_str().expect("ASCII")]);
        self.mounted_at = Some(at.to_owned());
    }

    /// Mounts it in place of a directory whose content it gets, with owners, modes and holes.
    ///
    /// # Panics
    /// When that fails.
    pub fn take_over(&mut self, dir: &Path) {
        self.mount(Path::new("/mnt"));
        run("rmdir", &["/mnt/lost+found"]);
        copy(dir, Path::new("/mnt"));
        self.unmount();
        self.mount(dir);
    }

    /// Unmounts it, and leaves its content in the directory behind it.
    ///
    /// # Panics
    /// When that fails, or it is not mounted.
    pub fn give_back(&mut self) {
        let dir = self.unmount();
        self.mount(Path::new("/mnt"));
        run("find", &[dir.to_str().expect("ASCII"), "-mindepth", "1", "-delete"]);
        copy(Path::new("/mnt"), &dir);
        self.unmount();
    }

    /// Unmounts it; from where.
    fn unmount(&mut self) -> PathBuf {
        let at = self.mounted_at.take().expect("it was mounted");
        run("umount", &[at.to_str().expect("ASCII")]);
        at
    }

    /// Unmounts it, repairs its filesystem as an operator does after a failure, and mounts it again.
    ///
    /// # Panics
    /// When that fails, or there is nothing to mount.
    pub fn repair(&mut self) {
        let at = self.unmount();
        let output = Command::new("e2fsck")
            .args(["-f", "-y", &self.node()])
            .output()
            .expect("e2fsck runs");
        // 1: errors were corrected.
        assert!(
            matches!(output.status.code(), Some(0 | 1)),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
        self.mount(&at);
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        let steps: [&dyn Fn() -> Output; 3] = [
            &|| match &self.mounted_at {
                Some(at) => output("umount", &[at.to_str().expect("ASCII")]),
                None => output("true", &[]),
            },
            &|| output("dmsetup", &["remove", "--retry", Self::NAME]),
            &|| output("losetup", &["--detach", &self.device]),
        ];
        // All of them, whatever becomes of one.
        let outputs = steps.map(|step| step());
        let removed = std::fs::remove_file(&self.file);
        // A test that fails anyway says why itself.
        if !std::thread::panicking() {
            for output in outputs {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            removed.expect("removed");
        }
    }
}

/// Copies what a directory holds, and its own owner and mode.
fn copy(from: &Path, to: &Path) {
    let [from, to] = [from, to].map(|path| path.to_str().expect("ASCII"));
    run("cp", &["--archive", "--sparse=always", &format!("{from}/."), to]);
    run("chown", &["--reference", from, to]);
    run("chmod", &["--reference", from, to]);
}

fn output(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// Standard output of a program that must succeed.
///
/// # Panics
/// When it fails.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

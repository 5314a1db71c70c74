//! Stopping all programs of the machine at once, and letting them go on: the freezer of cgroup v2.
//!
//! ```text
//! /sys/fs/cgroup      envd and kernel threads; cannot be frozen
//! |-- sandbox         whoever else is found above
//! `-- docker, ...     what programs of the guest have made
//! ```
//!
//! Programs are moved out of the root when they are to be stopped, not when they are started: moving one waits for a grace
//! period of the kernel (5 to 10 ms were measured), which every start would pay; and a guest may move its programs back.
//! What a program starts is where the program is, so most are moved once in their life.
//!
//! Holds: the tree is reached through a descriptor, so nothing that the guest mounts over it matters; nothing here waits
//! longer than it is told to.
//! Not here: when programs are stopped, and what starts meanwhile (`hold`).

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};
use nix::unistd::write;

/// Where programs are put that are in the root.
const SANDBOX: &CStr = c"sandbox";

/// Flag of kernel threads in `/proc/<pid>/stat`: PF_KTHREAD of linux/sched.h.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Why not all programs are stopped, or not all go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("the machine has no cgroup v2 at {0}")]
    Missing(&'static str),
    #[error("the cgroups cannot be read")]
    Read(#[source] io::Error),
    #[error("envd cannot be put into the root cgroup")]
    Leave(#[source] Errno),
    #[error("process {pid} cannot be put into cgroup {SANDBOX:?}")]
    Move { pid: u32, source: Errno },
    #[error("cgroup {name:?} cannot be frozen")]
    Freeze { name: CString, source: io::Error },
    #[error("cgroup {name:?} cannot be thawed")]
    Thaw { name: CString, source: io::Error },
    #[error("not all programs stopped in time")]
    Late,
}

/// The cgroups of a machine.
pub(crate) struct Cgroups {
    root: OwnedFd,
    /// Of the root's children, those that we froze: what the guest has frozen for itself stays so.
    frozen: Mutex<BTreeSet<CString>>,
}

impl Cgroups {
    /// The tree that is mounted where programs expect it.
    ///
    /// # Errors
    /// [`CgroupError::Missing`], [`CgroupError::Read`].
    pub(crate) fn of_machine() -> Result<Self, CgroupError> {
        const MOUNTED: &str = "/sys/fs/cgroup";
        let cgroups = Self::at(Path::new(MOUNTED)).map_err(|errno| CgroupError::Read(errno.into()))?;
        let stat = fstatfs(&cgroups.root).map_err(|errno| CgroupError::Read(errno.into()))?;
        if stat.filesystem_type() == CGROUP2_SUPER_MAGIC {
            Ok(cgroups)
        } else {
            Err(CgroupError::Missing(MOUNTED))
        }
    }

    fn at(root: &Path) -> Result<Self, Errno> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            root: open(root, flags, Mode::empty())?,
            frozen: Mutex::default(),
        })
    }

    /// Puts envd into the root, which cannot be frozen: a guest may have put it anywhere.
    ///
    /// # Errors
    /// [`CgroupError::Leave`]: nothing is to be frozen, because envd may be with it.
    pub(crate) fn leave(&self) -> Result<(), CgroupError> {
        // 0 is whoever writes, with all threads.
        let moved = self.open(c"cgroup.procs", OFlag::O_WRONLY);
        let moved = moved.and_then(|procs| write(&procs, b"0"));
        moved.map(drop).map_err(CgroupError::Leave)
    }

    /// Stops all programs but envd and waits until they are; those that are stopped already stay so. Blocks.
    ///
    /// # Errors
    /// Some may be running; others are stopped, or stop as soon as the kernel is done with what they asked of it. Either
    /// is so until [`Cgroups::thaw`].
    pub(crate) fn freeze(&self, deadline: Instant) -> Result<(), CgroupError> {
        let mut frozen = self.frozen();
        self.ensure_sandbox().map_err(|errno| CgroupError::Read(errno.into()))?;
        loop {
            let added = self.freeze_children(&mut frozen, deadline)?;
            let moved = self.gather(deadline)?;
            self.wait(deadline)?;
            // Who had not stopped yet may have made a cgroup, or put itself into the root. From the second round on nobody
            // can, so the end is when there was nothing to do.
            if added + moved == 0 {
                return Ok(());
            }
        }
    }

    /// Lets go on what [`Cgroups::freeze`] stopped; may be repeated. Blocks, not for long.
    ///
    /// # Errors
    /// [`CgroupError::Thaw`], the first: what it names is still stopped. The others go on.
    pub(crate) fn thaw(&self) -> Result<(), CgroupError> {
        let mut frozen = self.frozen();
        let mut result = Ok(());
        frozen.retain(|name| match self.set_frozen(name, b"0") {
            // The guest has removed it, which it can only when nobody is in it.
            Ok(()) | Err(Errno::ENOENT | Errno::ENODEV) => false,
            Err(errno) => {
                if result.is_ok() {
                    result = Err(CgroupError::Thaw {
                        name: name.clone(),
                        source: errno.into(),
                    });
                }
                true
            }
        });
        result
    }

    fn ensure_sandbox(&self) -> Result<(), Errno> {
        match mkdirat(&self.root, SANDBOX, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Freezes the root's children that are not; how many these were.
    fn freeze_children(&self, frozen: &mut BTreeSet<CString>, deadline: Instant) -> Result<usize, CgroupError> {
        let mut added = 0;
        for name in self.children()? {
            in_time(deadline)?;
            let done = self.is_frozen(&name).and_then(|is_frozen| {
                if is_frozen {
                    return Ok(());
                }
                self.set_frozen(&name, b"1")?;
                added += 1;
                frozen.insert(name.clone());
                Ok(())
            });
            match done {
                // Removed meanwhile.
                Ok(()) | Err(Errno::ENOENT | Errno::ENODEV) => {}
                Err(errno) => {
                    let source = errno.into();
                    return Err(CgroupError::Freeze { name, source });
                }
            }
        }
        Ok(added)
    }

    /// Moves the programs that are in the root; how many these were. All of them are tried.
    fn gather(&self, deadline: Instant) -> Result<usize, CgroupError> {
        let read = |errno: Errno| CgroupError::Read(errno.into());
        let mut text = String::new();
        let mut listed = File::from(self.open(c"cgroup.procs", OFlag::O_RDONLY).map_err(read)?);
        listed.read_to_string(&mut text).map_err(CgroupError::Read)?;
        let sandbox = self.open_in(SANDBOX, c"cgroup.procs", OFlag::O_WRONLY).map_err(read)?;
        let (mut moved, mut result) = (0, Ok(()));
        for pid in text.lines().filter_map(|line| line.parse::<u32>().ok()) {
            in_time(deadline)?;
            // To the kernel, 0 would be us.
            if pid == 0 || pid == std::process::id() || is_kernel_thread(pid) {
                continue;
            }
            match write(&sandbox, pid.to_string().as_bytes()) {
                Ok(_) => moved += 1,
                Err(Errno::ESRCH) => {}
                Err(source) => result = Err(CgroupError::Move { pid, source }),
            }
        }
        result.map(|()| moved)
    }

    /// Waits until all of the root's children say that they are frozen.
    fn wait(&self, deadline: Instant) -> Result<(), CgroupError> {
        for name in self.children()? {
            let events = match self.open_in(&name, c"cgroup.events", OFlag::O_RDONLY) {
                Ok(events) => File::from(events),
                Err(Errno::ENOENT | Errno::ENODEV) => continue,
                Err(errno) => return Err(CgroupError::Read(errno.into())),
            };
            wait_until_frozen(events, deadline)?;
        }
        Ok(())
    }

    fn children(&self) -> Result<Vec<CString>, CgroupError> {
        let list = || {
            // A description of its own: the position of a directory belongs to it.
            let mut directory = Dir::from_fd(self.open(c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?)?;
            let mut names = Vec::new();
            for entry in directory.iter() {
                let entry = entry?;
                let name = entry.file_name();
                if entry.file_type() == Some(Type::Directory) && name != c"." && name != c".." {
                    names.push(name.to_owned());
                }
            }
            Ok(names)
        };
        list().map_err(|errno: Errno| CgroupError::Read(errno.into()))
    }

    fn is_frozen(&self, name: &CStr) -> Result<bool, Errno> {
        let file = self.open_in(name, c"cgroup.freeze", OFlag::O_RDONLY)?;
        let mut text = [0; 1];
        let read = nix::unistd::read(&file, &mut text)?;
        Ok(text[..read] == *b"1")
    }

    fn set_frozen(&self, name: &CStr, value: &[u8]) -> Result<(), Errno> {
        let file = self.open_in(name, c"cgroup.freeze", OFlag::O_WRONLY)?;
        write(&file, value).map(drop)
    }

    fn open_in(&self, name: &CStr, file: &CStr, flags: OFlag) -> Result<OwnedFd, Errno> {
        let path = [name.to_bytes(), b"/", file.to_bytes()].concat();
        let path = CString::new(path).expect("neither of two C strings holds a NUL");
        self.open(&path, flags)
    }

    fn open(&self, path: &CStr, flags: OFlag) -> Result<OwnedFd, Errno> {
        openat(&self.root, path, flags | OFlag::O_CLOEXEC, Mode::empty())
    }

    fn frozen(&self) -> MutexGuard<'_, BTreeSet<CString>> {
        self.frozen.lock().expect("no holder of the frozen cgroups panics")
    }
}

/// By event: the kernel tells those who poll of every change of `cgroup.events` since they read it.
fn wait_until_frozen(mut events: File, deadline: Instant) -> Result<(), CgroupError> {
    let mut text = String::new();
    loop {
        text.clear();
        let read = events
            .seek(SeekFrom::Start(0))
            .and_then(|_| events.read_to_string(&mut text));
        match read {
            Ok(_) if text.lines().any(|line| line == "frozen 1") => return Ok(()),
            Ok(_) => {}
            // Removed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
            Err(error) => return Err(CgroupError::Read(error)),
        }
        in_time(deadline)?;
        let left = deadline.saturating_duration_since(Instant::now());
        // A millisecond more, so that it does not spin through the last one.
        let left = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], left) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(CgroupError::Read(errno.into())),
        }
    }
}

fn in_time(deadline: Instant) -> Result<(), CgroupError> {
    if Instant::now() < deadline {
        Ok(())
    } else {
        Err(CgroupError::Late)
    }
}

/// `false` for a process that has ended: moving it then says so.
fn is_kernel_thread(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    flags(&stat).is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

/// The flags in the text of `/proc/<pid>/stat`. The name before them may hold anything, spaces and parentheses too.
fn flags(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(6)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use super::*;
    use crate::testing::Dir;

    /// A cgroup of this machine that stands for the root of a guest's.
    struct Tree(PathBuf);

    impl Tree {
        /// `None` where the machine has no cgroup v2 that we may change.
        fn new(name: &str) -> Option<Self> {
            let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
            let is_v2 = |root: &&Path| root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists();
            let made = roots.into_iter().find(is_v2).and_then(|root| {
                let path = root.join(format!("envd-{name}-{}", std::process::id()));
                fs::create_dir(&path).ok().map(|()| Self(path))
            });
            if made.is_none() {
                assert!(
                    std::env::var_os("CI").is_none(),
                    "the freezer needs a cgroup v2 that can be written to"
                );
                writeln!(io::stderr(), "\nNOT TESTED: no cgroup v2 that we may change").unwrap();
            }
            made
        }

        fn cgroups(&self) -> Cgroups {
            Cgroups::at(&self.0).unwrap()
        }

        /// Starts a program in it that counts into a file as fast as it can.
        fn counter(&self, within: &str, file: &Path) -> Program {
            let script = "i=0; while :; do i=$((i+1)); echo $i > \"$0\"; done";
            let mut command = Command::new("sh");
            let child = command.args(["-c", script]).arg(file).stdin(Stdio::null()).spawn();
            let program = Program(child.unwrap());
            fs::write(self.0.join(within).join("cgroup.procs"), program.0.id().to_string()).unwrap();
            program
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.0.join(path)).unwrap()
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            for child in ["sandbox", "docker/inner", "docker", "paused", ""] {
                let path = self.0.join(child);
                // What has been killed leaves in its own time.
                let deadline = Instant::now() + Duration::from_secs(10);
                while path.exists() && fs::remove_dir(&path).is_err() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }

    struct Program(Child);

    impl Drop for Program {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn count(file: &Path) -> String {
        fs::read_to_string(file).unwrap_or_default()
    }

    fn moves(file: &Path) -> bool {
        let (before, deadline) = (count(file), soon());
        while count(file) == before {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    #[test]
    fn all_programs_stop_wherever_they_are_and_go_on() {
        let Some(tree) = Tree::new("all") else { return };
        let dir = Dir::new("counters");
        fs::create_dir_all(tree.0.join("docker/inner")).unwrap();
        let files = [dir.path().join("root"), dir.path().join("inner")];
        let programs = [tree.counter("", &files[0]), tree.counter("docker/inner", &files[1])];
        let cgroups = tree.cgroups();
        for _ in 0..3 {
            assert!(files.iter().all(|file| moves(file)));
            cgroups.freeze(soon()).unwrap();
            let stopped = files.each_ref().map(|file| count(file));
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(files.each_ref().map(|file| count(file)), stopped);
            // A repetition finds all as it is to be, and does not count twice.
            cgroups.freeze(soon()).unwrap();
            cgroups.thaw().unwrap();
            cgroups.thaw().unwrap();
        }
        assert!(files.iter().all(|file| moves(file)));
        assert_eq!(tree.read("cgroup.procs"), "");
        assert_eq!(tree.read("sandbox/cgroup.procs").trim(), programs[0].0.id().to_string());
        // A guest that puts it back changes nothing.
        fs::write(tree.0.join("cgroup.procs"), programs[0].0.id().to_string()).unwrap();
        cgroups.freeze(soon()).unwrap();
        assert!(tree.read("sandbox/cgroup.events").contains("frozen 1"));
        assert_eq!(tree.read("cgroup.procs"), "");
    }

    #[test]
    fn what_the_guest_has_frozen_itself_stays_frozen() {
        let Some(tree) = Tree::new("own") else { return };
        fs::create_dir(tree.0.join("paused")).unwrap();
        fs::write(tree.0.join("paused/cgroup.freeze"), "1").unwrap();
        let cgroups = tree.cgroups();
        cgroups.freeze(soon()).unwrap();
        cgroups.thaw().unwrap();
        assert_eq!(tree.read("paused/cgroup.freeze"), "1\n");
        assert_eq!(tree.read("sandbox/cgroup.freeze"), "0\n");
    }

    #[test]
    fn a_cgroup_that_is_gone_is_no_failure_of_the_thaw() {
        let Some(tree) = Tree::new("gone") else { return };
        let cgroups = tree.cgroups();
        cgroups.freeze(soon()).unwrap();
        fs::remove_dir(tree.0.join("sandbox")).unwrap();
        cgroups.thaw().unwrap();
        cgroups.freeze(soon()).unwrap();
        assert_eq!(tree.read("sandbox/cgroup.freeze"), "1\n");
    }

    /// Files without a kernel behind them: nothing ever says that it is frozen.
    #[test]
    fn what_does_not_stop_is_not_waited_for_beyond_the_deadline() {
        let dir = Dir::new("dead-cgroup");
        let write = |path: &str, text: &str| fs::write(dir.path().join(path), text).unwrap();
        fs::create_dir(dir.path().join("sandbox")).unwrap();
        write("cgroup.procs", "");
        write("sandbox/cgroup.procs", "");
        write("sandbox/cgroup.freeze", "0");
        write("sandbox/cgroup.events", "populated 1\nfrozen 0\n");
        let cgroups = Cgroups::at(dir.path()).unwrap();
        let began = Instant::now();
        let late = cgroups.freeze(began + Duration::from_millis(50));
        assert!(matches!(late, Err(CgroupError::Late)), "{late:?}");
        assert!(began.elapsed() < Duration::from_secs(5));
        let freeze = || fs::read_to_string(dir.path().join("sandbox/cgroup.freeze")).unwrap();
        assert_eq!(freeze(), "1");
        cgroups.thaw().unwrap();
        assert_eq!(freeze(), "0");
    }

    #[test]
    fn kernel_threads_are_told_apart_whatever_a_program_calls_itself() {
        assert_eq!(flags("2 (kthreadd) S 0 0 0 0 -1 2129984 0 0"), Some(2_129_984));
        assert_eq!(flags("77 (a) S 1 2) R 1 77 77 0 -1 4194304 9 0"), Some(4_194_304));
        assert!(!is_kernel_thread(std::process::id()));
        assert_eq!(flags(""), None);
    }
}

//! Stage one: `/init` of the initramfs. Loads the drivers, mounts the disk, makes it the root, and becomes the envd
//! that is on it, or, where there is none, itself: a template need not carry envd.
//!
//! ```text
//! initramfs:  /init (this program)   /modules/order (one file name a line)   /modules/*.ko
//! ```

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::unistd::{chroot, dup2_stderr, dup2_stdin, dup2_stdout, fexecve};

use super::{DEVICE_TIMEOUT, exec_self, mounts, uevent};
use crate::console::say;
use crate::filesystems::is_in_memory;

const MODULES: &str = "/modules";
const NEW_ROOT: &str = "/newroot";
const ENVD: &str = "/usr/bin/envd";

/// Whether the root is an initramfs.
pub(crate) fn is_initramfs() -> bool {
    is_in_memory(Path::new("/"))
}

/// Goes all the way to the next program. Returns only when it cannot.
pub(crate) fn run() -> anyhow::Result<std::convert::Infallible> {
    mounts::ensure_mounted("devtmpfs", Path::new("/dev"), MsFlags::MS_NOSUID, "mode=0755")?;
    // The kernel opens the console for us only where the initramfs has its node.
    open_console().context("cannot open /dev/console")?;
    mounts::ensure_mounted("proc", Path::new("/proc"), mounts::NO_EXEC, "")?;
    mounts::ensure_mounted("sysfs", Path::new("/sys"), mounts::NO_EXEC, "")?;
    let cmdline = fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    let root = RootArguments::parse(&cmdline)?;
    load_modules();
    uevent::wait_for(Path::new(root.device), DEVICE_TIMEOUT)?;
    mount_root(&root)?;
    let this: OwnedFd = File::open("/proc/self/exe")
        .context("cannot open /proc/self/exe")?
        .into();
    switch_root().context("cannot switch to the new root")?;
    let error = exec_self(Path::new(ENVD));
    if error.kind() != io::ErrorKind::NotFound {
        say!("cannot run {ENVD} of the template ({error}); running the one of the initramfs");
    }
    let name = CString::new(ENVD).expect("the path has no NUL");
    let Err(errno) = fexecve(this.as_fd(), &[name], &[] as &[CString]);
    bail!("cannot run envd on the new root: {errno}")
}

/// `root=`, `rootfstype=`, `rootflags=`, `ro` and `rw` of the kernel command line.
#[derive(Debug, PartialEq, Eq)]
struct RootArguments<'a> {
    device: &'a str,
    kind: &'a str,
    options: Option<&'a str>,
    read_only: bool,
}

impl<'a> RootArguments<'a> {
    fn parse(cmdline: &'a str) -> anyhow::Result<Self> {
        // The last one counts, as for the kernel.
        let value = |name: &str| {
            cmdline
                .split_whitespace()
                .rev()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let device = value("root").context("the boot argument root= is missing")?;
        if !device.starts_with("/dev/") {
            bail!("root={device} is not a device below /dev");
        }
        let mode = cmdline
            .split_whitespace()
            .rev()
            .find(|word| ["ro", "rw"].contains(word));
        Ok(Self {
            device,
            kind: value("rootfstype").unwrap_or("ext4"),
            options: value("rootflags"),
            read_only: mode == Some("ro"),
        })
    }
}

fn open_console() -> nix::Result<()> {
    let console = open("/dev/console", OFlag::O_RDWR | OFlag::O_NOCTTY, Mode::empty())?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)
}

/// A module that cannot be loaded is told about and passed over: if it was needed, the disk will be missing.
fn load_modules() {
    let order = Path::new(MODULES).join("order");
    let file = match File::open(&order) {
        Ok(file) => file,
        Err(error) => return say!("no modules: cannot open {}: {error}", order.display()),
    };
    for name in BufReader::new(file).lines().map_while(Result::ok) {
        let name = name.trim();
        if name.is_empty() || name.starts_with('#') {
            continue;
        }
        let loaded = File::open(Path::new(MODULES).join(name))
            .and_then(|module| Ok(finit_module(module, c"", ModuleInitFlags::empty())?));
        match loaded {
            Ok(()) => {}
            // Loaded already, or built in.
            Err(error) if error.raw_os_error() == Some(Errno::EEXIST as i32) => {}
            Err(error) => say!("cannot load module {name}: {error}"),
        }
    }
}

fn mount_root(root: &RootArguments<'_>) -> anyhow::Result<()> {
    fs::create_dir_all(NEW_ROOT).with_context(|| format!("cannot make {NEW_ROOT}"))?;
    // A read must not write: with atime every file of the template that is looked at would be copied on write.
    let mut flags = MsFlags::MS_NOATIME;
    flags.set(MsFlags::MS_RDONLY, root.read_only);
    // For ext4, see `grow`: inode tables that nobody has used need no zeroing.
    let lazy = if root.kind == "ext4" { "noinit_itable" } else { "" };
    let options = [lazy, root.options.unwrap_or_default()]
        .into_iter()
        .filter(|text| !text.is_empty());
    let options = options.collect::<Vec<_>>().join(",");
    mount(
        Some(root.device),
        NEW_ROOT,
        Some(root.kind),
        flags,
        Some(options.as_str()),
    )
    .with_context(|| format!("cannot mount {} ({}) as the root", root.device, root.kind))
}

/// Makes the new root `/`, with the mounts that we have, and frees the memory of the old one.
fn switch_root() -> anyhow::Result<()> {
    for mounted in ["dev", "proc", "sys"] {
        let to = Path::new(NEW_ROOT).join(mounted);
        // On a read-only root the directory is there or it is not.
        fs::create_dir_all(&to).ok();
        mount(
            Some(&Path::new("/").join(mounted)),
            &to,
            None::<&str>,
            MsFlags::MS_MOVE,
            None::<&str>,
        )
        .with_context(|| format!("cannot move /{mounted}"))?;
    }
    let old = fs::metadata("/")?.dev();
    remove_contents(Path::new("/"), old);
    std::env::set_current_dir(NEW_ROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("cannot move the new root")?;
    chroot(".")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// Removes what is on the filesystem `device` below `directory`, and nothing that is mounted there. What stays only
/// takes memory.
fn remove_contents(directory: &Path, device: u64) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(metadata) = path.symlink_metadata() else {
            continue;
        };
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            remove_contents(&path, device);
            // Not empty where something is mounted below.
            fs::remove_dir(&path).ok();
        } else {
            fs::remove_file(&path).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Dir;

    #[test]
    fn the_root_arguments_are_those_of_the_kernel() {
        let parsed = RootArguments::parse("console=ttyS0 root=/dev/vda rw quiet").unwrap();
        assert_eq!(
            parsed,
            RootArguments {
                device: "/dev/vda",
                kind: "ext4",
                options: None,
                read_only: false
            }
        );
        let parsed = RootArguments::parse("root=/dev/vda rw ro rootflags=a,b rootfstype=xfs root=/dev/vdb").unwrap();
        assert_eq!(
            parsed,
            RootArguments {
                device: "/dev/vdb",
                kind: "xfs",
                options: Some("a,b"),
                read_only: true
            }
        );
        assert!(RootArguments::parse("quiet").is_err());
        assert!(RootArguments::parse("root=UUID=1").is_err());
    }

    #[test]
    fn removing_the_initramfs_stays_on_its_filesystem() {
        let dir = Dir::new("initramfs");
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("a/link")).unwrap();
        let device = fs::metadata(dir.path()).unwrap().dev();
        remove_contents(dir.path(), device + 1);
        assert!(dir.path().join("a/b/file").exists());
        remove_contents(dir.path(), device);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Path::new("/etc/passwd").exists());
    }
}

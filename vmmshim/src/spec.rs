//! Judges what the agent asks to launch, and turns it into the VMM's command line.
//!
//! The agent is the more exposed process of the two: nothing it sends reaches a file or an argument unchecked. Paths are absolute,
//! of an alphabet in which nothing is special to the VMM's option parser, and name the sandbox they are for.

use std::ffi::CString;
use std::fs;
use std::num::NonZeroU64;
use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::sys::stat::{SFlag, fstat, major, minor};
use roost_common::ids::SandboxId;
use roost_common::names;
use roost_common::net::GUEST_MAC;
use roost_common::shim::{
    DISK_ID, KERNEL_COMMAND_LINE, MEMORY_RANGE, NET_ID, RATE_PERIOD, RateLimits, RestoreMode, SpecField, Start,
    VCPUS_RANGE, VmSpec,
};

use crate::confine::{self, sys};

/// Major and minor number of `/dev/net/tun`, fixed in the kernel's device list.
const TUN: (u64, u64) = (10, 200);

/// Checks bounds and paths of a spec.
pub(crate) fn check(spec: &VmSpec) -> Result<(), SpecField> {
    let id = spec.sandbox.as_str();
    let all = |ok: bool, field| if ok { Ok(()) } else { Err(field) };
    all(VCPUS_RANGE.contains(&spec.vcpus), SpecField::Vcpus)?;
    all(MEMORY_RANGE.contains(&spec.memory), SpecField::Memory)?;
    all(
        is_plain(&spec.run_dir)
            && spec.run_dir.ends_with(&format!("/vm/{id}"))
            && is_plain(&spec.vm_dir)
            && spec.vm_dir.ends_with(&format!("/sandboxes/{id}/vm")),
        SpecField::Directory,
    )?;
    let files: [Option<&String>; 2] = match &spec.start {
        Start::Boot { kernel, initramfs } => [Some(kernel), initramfs.as_ref()],
        Start::Restore { initramfs, .. } => [None, initramfs.as_ref()],
    };
    all(files.into_iter().flatten().all(|path| is_plain(path)), SpecField::Start)
}

/// An absolute path without empty, `.` or `..` components, of letters, digits and `._+~-`.
fn is_plain(path: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+~-".contains(&byte);
    path.len() < 4096
        && path.strip_prefix('/').is_some_and(|rest| {
            rest.split('/')
                .all(|name| !matches!(name, "" | "." | "..") && name.bytes().all(plain))
        })
}

/// What a descriptor or a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node {
    kind: SFlag,
    device: (u64, u64),
}

impl Node {
    fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        let stat = fstat(fd).ok()?;
        Some(Self {
            kind: SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT,
            device: (major(stat.st_rdev), minor(stat.st_rdev)),
        })
    }
}

/// Major and minor number of what a descriptor leads to, where that is a block device.
pub(crate) fn block_device(fd: BorrowedFd<'_>) -> Option<(u64, u64)> {
    let node = Node::of(fd)?;
    (node.kind == SFlag::S_IFBLK).then_some(node.device)
}

/// Checks that `disk` is the device-mapper snapshot of the spec's sandbox, and that `node`, which is `/dev/dm-N` and what the VMM
/// will open, is the same device.
pub(crate) fn check_disk(spec: &VmSpec, disk: BorrowedFd<'_>, node: BorrowedFd<'_>) -> Result<(), SpecField> {
    let (Some(disk), Some(node)) = (Node::of(disk), Node::of(node)) else {
        return Err(SpecField::Disk);
    };
    let (major, minor) = disk.device;
    // Only device-mapper's devices have a `dm` folder; privd named this one.
    let name = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/dm/name"));
    if is_disk_of(spec, disk, node, name.as_deref().unwrap_or_default()) {
        Ok(())
    } else {
        Err(SpecField::Disk)
    }
}

fn is_disk_of(spec: &VmSpec, disk: Node, node: Node, name: &str) -> bool {
    disk.kind == SFlag::S_IFBLK
        && disk == node
        && disk.device.1 == u64::from(spec.disk_minor)
        && is_disk_name(&spec.sandbox, name)
}

fn is_disk_name(sandbox: &SandboxId, name: &str) -> bool {
    name.strip_suffix('\n') == Some(names::disk(sandbox).as_str())
}

/// Checks that a descriptor is a tap.
pub(crate) fn check_tap(tap: BorrowedFd<'_>) -> Result<(), SpecField> {
    let is_tun = Node::of(tap).is_some_and(|node| node.kind == SFlag::S_IFCHR && node.device == TUN);
    // The ioctl means something else on other devices, hence only after that.
    if is_tun && sys::tun_flags(tap).is_ok_and(is_tap) {
        Ok(())
    } else {
        Err(SpecField::Tap)
    }
}

fn is_tap(flags: u16) -> bool {
    i32::from(flags) & libc::IFF_TAP != 0
}

/// The node of a disk.
pub(crate) fn disk_node(spec: &VmSpec) -> String {
    format!("/dev/dm-{}", spec.disk_minor)
}

/// The VMM's arguments for a checked spec, its name first.
pub(crate) fn arguments(vmm: &Path, spec: &VmSpec) -> Vec<CString> {
    let mut arguments: Vec<String> = vec![
        vmm.to_string_lossy().into_owned(),
        "--api-socket".into(),
        format!("fd={}", confine::API),
    ];
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    match &spec.start {
        Start::Boot { kernel, initramfs } => {
            option("--kernel", kernel.clone());
            if let Some(initramfs) = initramfs {
                option("--initramfs", initramfs.clone());
            }
            option("--cmdline", KERNEL_COMMAND_LINE.into());
            option("--cpus", format!("boot={},nested=off", spec.vcpus.0));
            option("--memory", format!("size={}M,shared=on,thp=off", spec.memory.0));
            let RateLimits {
                disk_bytes,
                disk_operations,
                network_bytes,
            } = spec.limits;
            let disk = disk_node(spec);
            let limits = limit("bw", disk_bytes) + &limit("ops", disk_operations);
            option("--disk", format!("path={disk},image_type=raw,id={DISK_ID}{limits}"));
            let mac = GUEST_MAC.map(|byte| format!("{byte:02X}")).join(":");
            let limits = limit("bw", network_bytes);
            option("--net", format!("fd={},id={NET_ID},mac={mac}{limits}", confine::TAP));
            option("--rng", "src=/dev/urandom".into());
            option("--balloon", "size=0,free_page_reporting=on".into());
            option("--serial", "tty".into());
            option("--console", "off".into());
        }
        Start::Restore { attempt, memory, .. } => {
            let mode = match memory {
                RestoreMode::Copy => "copy",
                RestoreMode::OnDemand => "ondemand",
            };
            let source = format!("source_url=file://{}/{attempt}", spec.vm_dir);
            let net = format!("net_fds=[{NET_ID}@[{}]]", confine::TAP);
            option(
                "--restore",
                format!("{source},{net},memory_restore_mode={mode},resume=false"),
            );
        }
    }
    option("--seccomp", "true".into());
    option("--event-monitor", format!("fd={}", confine::EVENTS));
    arguments
        .into_iter()
        .map(|argument| CString::new(argument).expect("checked paths and the VMM's own have no NUL"))
        .collect()
}

/// A device's bucket of bytes (`bw`) or requests (`ops`), as more of its options. A restored VM has its own from the `config.json` that the
/// agent writes.
fn limit(bucket: &str, size: Option<NonZeroU64>) -> String {
    size.map_or_else(String::new, |size| {
        format!(",{bucket}_size={size},{bucket}_refill_time={RATE_PERIOD}")
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use roost_common::units::{Mebibytes, Vcpus};

    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            sandbox: "cl-1".parse().expect("an id"),
            vcpus: Vcpus(2),
            memory: Mebibytes(512),
            disk_minor: 7,
            limits: RateLimits::default(),
            start: Start::Boot {
                kernel: "/var/lib/roost/kernels/vmlinux-6.1.0".into(),
                initramfs: Some("/var/lib/roost/kernels/initramfs-6.1.0".into()),
            },
            run_dir: "/run/roost/vm/cl-1".into(),
            vm_dir: "/var/lib/roost/sandboxes/cl-1/vm".into(),
        }
    }

    fn command_line(spec: &VmSpec) -> Vec<String> {
        arguments(Path::new("/usr/bin/cloud-hypervisor"), spec)
            .into_iter()
            .map(|argument| argument.into_string().expect("ASCII"))
            .collect()
    }

    #[test]
    fn a_boot_has_exactly_this_command_line() {
        #[rustfmt::skip]
        let golden = [
            "/usr/bin/cloud-hypervisor",
            "--api-socket", "fd=4",
            "--kernel", "/var/lib/roost/kernels/vmlinux-6.1.0",
            "--initramfs", "/var/lib/roost/kernels/initramfs-6.1.0",
            "--cmdline", "console=ttyS0 root=/dev/vda rw ip=169.254.0.21::169.254.0.22:255.255.255.252::eth0:off reboot=k panic=-1 quiet cryptomgr.notests 8250.nr_uarts=1 i8042.noaux",
            "--cpus", "boot=2,nested=off",
            "--memory", "size=512M,shared=on,thp=off",
            "--disk", "path=/dev/dm-7,image_type=raw,id=rootfs",
            "--net", "fd=3,id=net0,mac=02:FC:00:00:00:05",
            "--rng", "src=/dev/urandom",
            "--balloon", "size=0,free_page_reporting=on",
            "--serial", "tty",
            "--console", "off",
            "--seccomp", "true",
            "--event-monitor", "fd=5",
        ];
        assert_eq!(command_line(&spec()), golden);
    }

    #[test]
    fn a_restore_has_exactly_this_command_line() {
        for (memory, mode) in [(RestoreMode::OnDemand, "ondemand"), (RestoreMode::Copy, "copy")] {
            let start = Start::Restore {
                attempt: 3,
                memory,
                initramfs: None,
            };
            let source = "source_url=file:///var/lib/roost/sandboxes/cl-1/vm/3,net_fds=[net0@[3]]";
            let restore = format!("{source},memory_restore_mode={mode},resume=false");
            #[rustfmt::skip]
            let golden = [
                "/usr/bin/cloud-hypervisor",
                "--api-socket", "fd=4",
                "--restore", restore.as_str(),
                "--seccomp", "true",
                "--event-monitor", "fd=5",
            ];
            assert_eq!(command_line(&VmSpec { start, ..spec() }), golden);
        }
    }

    #[test]
    fn only_specs_within_bounds_pass() {
        assert_eq!(check(&spec()), Ok(()));
        let bad = |change: fn(&mut VmSpec)| {
            let mut spec = spec();
            change(&mut spec);
            check(&spec)
        };
        assert_eq!(bad(|s| s.vcpus = Vcpus(0)), Err(SpecField::Vcpus));
        assert_eq!(bad(|s| s.vcpus = Vcpus(65)), Err(SpecField::Vcpus));
        assert_eq!(bad(|s| s.memory = Mebibytes(63)), Err(SpecField::Memory));
        assert_eq!(bad(|s| s.memory = Mebibytes(u32::MAX)), Err(SpecField::Memory));
    }

    #[test]
    fn a_boot_has_the_limits_of_its_devices_behind_their_other_options() {
        let limits = RateLimits {
            disk_bytes: NonZeroU64::new(100 << 20),
            disk_operations: NonZeroU64::new(2000),
            network_bytes: NonZeroU64::new(12 << 20),
        };
        let line = command_line(&VmSpec { limits, ..spec() });
        let value = |option: &str| {
            let at = line.iter().position(|word| word == option).expect("an option");
            line[at + 1].clone()
        };
        assert_eq!(
            value("--disk"),
            "path=/dev/dm-7,image_type=raw,id=rootfs,bw_size=104857600,bw_refill_time=1000,ops_size=2000,ops_refill_time=1000"
        );
        assert!(
            value("--net").ends_with(",bw_size=12582912,bw_refill_time=1000"),
            "{line:?}"
        );
    }

    #[test]
    fn only_directories_of_the_sandbox_pass() {
        let run = |text: &str| {
            check(&VmSpec {
                run_dir: text.into(),
                ..spec()
            })
        };
        let vm = |text: &str| {
            check(&VmSpec {
                vm_dir: text.into(),
                ..spec()
            })
        };
        assert_eq!((run("/x/vm/cl-1"), vm("/y/sandboxes/cl-1/vm")), (Ok(()), Ok(())));
        for bad in [
            "",
            "/",
            "vm/cl-1",
            "x/vm/cl-1",
            "/run/roost/vm/cl-2",
            "/run/roost/vm/cl-1/",
            "/run/../roost/vm/cl-1",
            "/run//vm/cl-1",
            "/run/./vm/cl-1",
            "/run/a b/vm/cl-1",
            "/run/a,b/vm/cl-1",
            "/run/\0/vm/cl-1",
            "/run/xvm/cl-1",
        ] {
            assert_eq!(run(bad), Err(SpecField::Directory), "{bad:?}");
        }
        for bad in [
            "/var/lib/roost/sandboxes/cl-2/vm",
            "/var/lib/roost/sandboxes/cl-1",
            "/var/lib/roost/sandboxes/cl-1/vm/1",
            "/var/lib/roost/sandboxes/../sandboxes/cl-1/vm",
            "/x,resume=true/sandboxes/cl-1/vm",
        ] {
            assert_eq!(vm(bad), Err(SpecField::Directory), "{bad:?}");
        }
    }

    #[test]
    fn only_plain_absolute_files_are_started_from() {
        for bad in ["vmlinux", "", "/boot/../etc/shadow", "/boot/vmlinux\n", "/boot/"] {
            let boot = |kernel: &str, initramfs: Option<&str>| {
                check(&VmSpec {
                    start: Start::Boot {
                        kernel: kernel.into(),
                        initramfs: initramfs.map(Into::into),
                    },
                    ..spec()
                })
            };
            assert_eq!(boot(bad, None), Err(SpecField::Start), "{bad:?}");
            assert_eq!(boot("/boot/vmlinux", Some(bad)), Err(SpecField::Start), "{bad:?}");
        }
    }

    #[test]
    fn only_the_sandboxs_own_snapshot_is_its_disk() {
        let node = |kind, device| Node { kind, device };
        let disk = node(SFlag::S_IFBLK, (253, 7));
        let name = "roost-s-cl-1\n";
        assert!(is_disk_of(&spec(), disk, disk, name));
        let other_minor = node(SFlag::S_IFBLK, (253, 8));
        let other_major = node(SFlag::S_IFBLK, (254, 7));
        let character = node(SFlag::S_IFCHR, (253, 7));
        assert!(!is_disk_of(&spec(), other_minor, other_minor, name), "another minor");
        assert!(
            !is_disk_of(&spec(), disk, other_minor, name),
            "a node of another device"
        );
        assert!(!is_disk_of(&spec(), disk, other_major, name), "a node of another major");
        assert!(!is_disk_of(&spec(), character, character, name), "a character device");
        for bad in [
            "",
            "\n",
            "roost-s-cl-1",
            "roost-s-cl-10\n",
            "roost-s-cl-2\n",
            "roost-o-1-2-3\n",
        ] {
            assert!(!is_disk_of(&spec(), disk, disk, bad), "{bad:?}");
        }
    }

    #[test]
    fn files_and_other_devices_are_neither_disk_nor_tap() {
        for path in ["/dev/null", "/dev/zero", "/proc/self/exe", "/"] {
            let file = File::open(path).expect("opened");
            assert_eq!(check_tap(file.as_fd()), Err(SpecField::Tap), "{path}");
            assert_eq!(
                check_disk(&spec(), file.as_fd(), file.as_fd()),
                Err(SpecField::Disk),
                "{path}"
            );
        }
    }

    #[test]
    fn a_tun_is_no_tap() {
        assert!(is_tap(0x1002 | 0x4000) && !is_tap(0x1001));
    }
}

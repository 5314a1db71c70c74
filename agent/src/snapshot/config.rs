//! The `config.json` that a VMM is restored from: written anew for every restore, from what we know of the sandbox that is to
//! wake. The one that a VMM wrote is never read.
//!
//! The shape is cloud-hypervisor's `VmConfig` (`vmm/src/vm_config.rs`, v53), of which the fields that our command line sets are
//! written; those it leaves alone have the same defaults there as on the command line (`vmm/src/config.rs`). What ties it to the
//! state: devices find theirs by id, so `rootfs` and `net0` must be as booted, a device of an unknown id starts afresh without a
//! word; `__rng`, `__balloon`, `__serial` are given out by the VMM alike each time and are refused or ignored from outside; PCI
//! addresses are taken from the state. Not validated by a restore as by a boot: whatever stands here is done.

use std::num::NonZeroU64;
use std::path::Path;

use roost_common::net::GUEST_MAC;
use roost_common::shim::{DISK_ID, KERNEL_COMMAND_LINE, NET_ID, RATE_PERIOD, RateLimits};
use serde_json::{Value, json};

use super::manifest::{Devices, Size};
use super::{CONFIG, SHARED, SnapshotDir};
use crate::errors::FileError;

/// What a VM is restored as.
#[derive(Debug, Clone, Copy)]
pub struct RestoreConfig<'a> {
    /// Its size.
    pub size: Size,
    /// Its devices.
    pub devices: Devices,
    /// Minor number of the disk's node, `/dev/dm-N`.
    pub disk_minor: u32,
    /// How fast its devices may be.
    pub limits: RateLimits,
    /// The kernel that it was booted with.
    pub kernel: &'a Path,
    /// The initramfs, if it was booted with one.
    pub initramfs: Option<&'a Path>,
}

/// Writes `config.json` into a generation, in the place of any that is there. Not durable: the next restore writes its own.
///
/// # Errors
/// [`FileError`]; what is there then is no whole `config.json`, or none.
pub fn write_config(generation: &Path, config: &RestoreConfig<'_>) -> Result<(), FileError> {
    let dir = SnapshotDir::open(generation)?;
    match nix::unistd::unlinkat(&dir.fd, CONFIG, nix::unistd::UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(nix::errno::Errno::ENOENT) => {}
        Err(errno) => return Err(dir.error("removing", CONFIG, errno)),
    }
    let content = serde_json::to_vec(&config.to_json()).expect("strings and numbers serialise");
    dir.make(CONFIG, SHARED, &content).map(drop)
}

impl RestoreConfig<'_> {
    fn to_json(self) -> Value {
        let Devices::RootfsNet0BalloonSerial = self.devices;
        let vcpus = self.size.vcpus.0;
        let [a, b, c, d, e, f] = GUEST_MAC;
        let mut payload = json!({ "kernel": self.kernel, "cmdline": KERNEL_COMMAND_LINE });
        if let Some(initramfs) = self.initramfs {
            payload["initramfs"] = json!(initramfs);
        }
        let mut disk = json!({ "id": DISK_ID, "path": format!("/dev/dm-{}", self.disk_minor), "image_type": "Raw" });
        // One descriptor, whatever its number: that it is there makes the VMM ask for one in `net_fds`.
        let mut net =
            json!({ "id": NET_ID, "mac": format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"), "fds": [-1] });
        let RateLimits {
            disk_bytes,
            disk_operations,
            network_bytes,
        } = self.limits;
        let limit = |device: &mut Value, bucket: &str, size: Option<NonZeroU64>| {
            if let Some(size) = size {
                device["rate_limiter_config"][bucket] = json!({ "size": size, "refill_time": RATE_PERIOD });
            }
        };
        limit(&mut disk, "bandwidth", disk_bytes);
        limit(&mut disk, "ops", disk_operations);
        limit(&mut net, "bandwidth", network_bytes);
        json!({
            "cpus": { "boot_vcpus": vcpus, "max_vcpus": vcpus, "nested": false },
            "memory": { "size": self.size.memory.bytes().0, "shared": true, "thp": false },
            "payload": payload,
            "disks": [disk],
            "net": [net],
            "rng": { "src": "/dev/urandom" },
            "balloon": { "size": 0, "free_page_reporting": true },
            "serial": { "mode": "Tty" },
            "console": { "mode": "Off" },
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use roost_common::units::{Mebibytes, Vcpus};

    use super::*;

    fn written(dir: &Path, initramfs: Option<&Path>) -> String {
        written_with(dir, initramfs, RateLimits::default())
    }

    fn written_with(dir: &Path, initramfs: Option<&Path>, limits: RateLimits) -> String {
        let config = RestoreConfig {
            size: Size {
                vcpus: Vcpus(2),
                memory: Mebibytes(512),
                disk: Mebibytes(1024).sectors(),
            },
            devices: Devices::RootfsNet0BalloonSerial,
            disk_minor: 7,
            limits,
            kernel: Path::new("/var/lib/roost/kernels/vmlinux-6.1.0"),
            initramfs,
        };
        write_config(dir, &config).expect("written");
        fs::read_to_string(dir.join(CONFIG)).expect("read")
    }

    #[test]
    fn a_restore_has_exactly_this_configuration() {
        let dir = tempfile::tempdir().expect("a directory");
        let golden = concat!(
            r#"{"balloon":{"free_page_reporting":true,"size":0},"#,
            r#""console":{"mode":"Off"},"#,
            r#""cpus":{"boot_vcpus":2,"max_vcpus":2,"nested":false},"#,
            r#""disks":[{"id":"rootfs","image_type":"Raw","path":"/dev/dm-7"}],"#,
            r#""memory":{"shared":true,"size":536870912,"thp":false},"#,
            r#""net":[{"fds":[-1],"id":"net0","mac":"02:fc:00:00:00:05"}],"#,
            r#""payload":{"cmdline":"console=ttyS0 root=/dev/vda rw "#,
            r#"ip=169.254.0.21::169.254.0.22:255.255.255.252::eth0:off reboot=k panic=-1 quiet "#,
            r#"cryptomgr.notests 8250.nr_uarts=1 i8042.noaux","#,
            r#""initramfs":"/var/lib/roost/kernels/initramfs-6.1.0","kernel":"/var/lib/roost/kernels/vmlinux-6.1.0"},"#,
            r#""rng":{"src":"/dev/urandom"},"#,
            r#""serial":{"mode":"Tty"}}"#,
        );
        let initramfs = Path::new("/var/lib/roost/kernels/initramfs-6.1.0");
        assert_eq!(written(dir.path(), Some(initramfs)), golden);
    }

    #[test]
    fn a_restore_has_the_limits_of_its_devices() {
        let dir = tempfile::tempdir().expect("a directory");
        let limits = RateLimits {
            disk_bytes: NonZeroU64::new(100 << 20),
            disk_operations: NonZeroU64::new(2000),
            network_bytes: NonZeroU64::new(12 << 20),
        };
        let config: Value = serde_json::from_str(&written_with(dir.path(), None, limits)).expect("JSON");
        let bucket = |size: u64| json!({ "size": size, "refill_time": 1000 });
        let disk = json!({ "bandwidth": bucket(100 << 20), "ops": bucket(2000) });
        assert_eq!(config["disks"][0]["rate_limiter_config"], disk);
        let net = json!({ "bandwidth": bucket(12 << 20) });
        assert_eq!(config["net"][0]["rate_limiter_config"], net);
    }

    #[test]
    fn whatever_was_there_before_is_replaced_and_not_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let elsewhere = dir.path().join("elsewhere");
        fs::write(&elsewhere, "untouched").expect("written");
        std::os::unix::fs::symlink(&elsewhere, dir.path().join(CONFIG)).expect("linked");
        for _ in 0..2 {
            assert!(!written(dir.path(), None).contains("initramfs"));
        }
        assert_eq!(fs::read_to_string(&elsewhere).expect("read"), "untouched");
        let metadata = fs::symlink_metadata(dir.path().join(CONFIG)).expect("there");
        assert!(metadata.is_file());
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o640);
    }
}

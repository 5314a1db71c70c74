//! privd on a real kernel: disks, networks, and what it refuses. Each test starts a privd of its own for the uid it runs as, so
//! that it can kill it; the installed one, where there is one, is left alone.

mod disks;
mod hostile;
mod lifetimes;
mod networks;
mod random;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Once;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv, send};
use roost_common::ids::Slot;
use roost_common::ipc::PassedFd;
use roost_common::names;
use roost_common::net::{Cidr, GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, MAX_CONNECTIONS, SlotAddresses};
use roost_common::privd::{
    DescriptorRole, Disk, EgressPolicy, Internet, InventoryCursor, InventoryRow, Network, OpenDisk, OpenNetwork,
    PrivdError, ReadCounters, ResourceKind, Rule, SetPolicy, SizeRefusal, Wanted,
};
use roost_common::units::{Mebibytes, Sectors};
use roost_tests::census::Census;
use roost_tests::eventually;
use roost_tests::internet::{self, run};
use roost_tests::privd::{Rig, opened, patient, try_connect};

/// [`roost_tests::in_rig`], on a host on which a privd has started before: its table stays.
fn in_rig(test: impl FnOnce()) {
    static TABLE: Once = Once::new();
    TABLE.call_once(|| drop(Rig::start()));
    roost_tests::in_rig(test);
}

fn device(disk: &Disk) -> File {
    disk.device.as_fd().try_clone_to_owned().expect("a copy").into()
}

fn read_at(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; length];
    file.read_exact_at(&mut bytes, offset).expect("read");
    bytes
}

fn open_policy() -> EgressPolicy {
    EgressPolicy::of(Internet::Open)
}

fn closed_policy() -> EgressPolicy {
    EgressPolicy::of(Internet::Closed)
}

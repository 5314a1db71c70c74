//! Names of kernel objects, each built in one function that shows it fits its length limit.
//!
//! Every name starts with `roost-`: that prefix, and for device-mapper the same in the uuid, is how an inventory and the udev
//! rule know what is ours. privd derives names from ids it has checked; no name crosses its boundary.

use crate::ids::{SandboxId, Slot};
use crate::units::Sectors;

/// What every name of ours starts with.
pub const PREFIX: &str = "roost-";

/// What the names of all sandboxes' disks start with.
pub const DISK_PREFIX: &str = "roost-s-";

/// The device-mapper snapshot that is a sandbox's disk. At most 8 + 63 = 71 bytes of the 127 that `DM_NAME_LEN` allows.
pub fn disk(id: &SandboxId) -> String {
    format!("{DISK_PREFIX}{id}")
}

/// The device-mapper origin of an image, by the identity of its file, so that all sandboxes of an image find the same one. At
/// most 8 + 3 × 20 + 2 = 70 bytes of the 127 that `DM_NAME_LEN` allows.
pub fn origin(device: u64, inode: u64, size: Sectors) -> String {
    format!("roost-o-{device}-{inode}-{}", size.0)
}

/// The host end of a slot's veth pair. At most 7 + 5 = 12 bytes of the 15 that `IFNAMSIZ` allows.
pub fn veth(slot: Slot) -> String {
    format!("roost-v{slot}")
}

/// The slot behind a name that [`veth`] built, `None` for any other name.
pub fn veth_slot(name: &str) -> Option<Slot> {
    let digits = name.strip_prefix("roost-v")?;
    let slot = Slot::try_from(digits.parse::<u32>().ok()?).ok()?;
    (veth(slot) == name).then_some(slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_names_fit_the_kernels_limits() {
        let id: SandboxId = "x".repeat(63).parse().expect("63 letters are an id");
        assert!(disk(&id).len() <= 127);
        assert!(origin(u64::MAX, u64::MAX, Sectors(u64::MAX)).len() <= 127);
        assert!(veth(Slot::MAX).len() <= 15);
    }

    #[test]
    fn only_names_that_veth_built_have_a_slot() {
        assert_eq!(veth_slot("roost-v7").map(Slot::get), Some(7));
        for other in ["roost-v0", "roost-v07", "roost-v", "roost-v99999", "roost-v+7", "veth7"] {
            assert_eq!(veth_slot(other), None, "{other}");
        }
    }
}

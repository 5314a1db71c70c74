//! What a host without roost runs for one sandbox: the steps that privd does, by the command-line tools of device-mapper, loops, links and
//! nftables, in the order of a usual script. A program for each step, as such scripts have it.

use std::fs;
use std::path::{Path, PathBuf};

use roost_common::ids::Slot;
use roost_common::net::{CLOSED, GATEWAY, GUEST, MAX_CONNECTIONS, SlotAddresses};
use roost_common::units::Sectors;
use roost_tests::internet::run;

use crate::output;

/// A network's and a disk's names.
pub(crate) struct Tools {
    namespace: String,
    veth: String,
    disk: String,
    cow_loop: String,
    filter: PathBuf,
    addresses: SlotAddresses,
}

impl Tools {
    /// Names for the n-th sandbox, and a file with its packet filter; nothing is made in the kernel.
    pub(crate) fn prepare(n: u32, slot: Slot, place: &Path) -> Self {
        let addresses = SlotAddresses::of(slot);
        let filter = place.join(format!("filter-{n}.nft"));
        fs::write(&filter, rules(&addresses)).expect("written");
        Self {
            namespace: format!("bench{n}"),
            veth: format!("bench-v{n}"),
            disk: format!("bench-t{n}"),
            cow_loop: String::new(),
            filter,
            addresses,
        }
    }

    /// Makes the disk: a loop, and a dm-snapshot over the origin of this device number.
    pub(crate) fn make_disk(&mut self, origin: &str, cow: &Path, size: Sectors) {
        let cow = cow.to_str().expect("a path of ours");
        self.cow_loop = output("losetup", &["--find", "--show", "--direct-io=on", cow]);
        let table = format!("0 {} snapshot {origin} {} P 8", size.0, self.cow_loop);
        output("dmsetup", &["create", &self.disk, "--table", &table]);
        run(&format!("chown 61184 /dev/mapper/{}", self.disk));
        run(&format!("chmod 0600 /dev/mapper/{}", self.disk));
    }

    /// Makes the network.
    pub(crate) fn make_network(&self) {
        let (ns, veth, filter) = (&self.namespace, &self.veth, self.filter.display());
        let SlotAddresses {
            host,
            veth_host,
            veth_namespace,
        } = self.addresses;
        for command in [
            format!("ip netns add {ns}"),
            format!("ip netns exec {ns} sysctl -q -w net.ipv4.ip_forward=1"),
            format!("ip netns exec {ns} sysctl -q -w net.ipv6.conf.all.disable_ipv6=1"),
            format!("ip link add {veth} type veth peer name eth0 netns {ns}"),
            format!("ip -n {ns} tuntap add dev tap0 mode tap"),
            format!("ip -n {ns} link set dev tap0 address 02:fc:00:00:00:06"),
            format!("ip netns exec {ns} nft -f {filter}"),
            format!("sysctl -q -w net.ipv6.conf.{veth}.disable_ipv6=1"),
            format!("ip addr add {veth_host}/31 dev {veth}"),
            format!("ip link set {veth} up"),
            format!("ip -n {ns} addr add {veth_namespace}/31 dev eth0"),
            format!("ip -n {ns} link set eth0 up"),
            format!("ip -n {ns} addr add {GATEWAY}/30 dev tap0"),
            format!("ip -n {ns} link set tap0 up"),
            format!("ip route add {host}/32 via {veth_namespace} dev {veth}"),
            format!("ip -n {ns} route add default via {veth_host} dev eth0"),
            format!("ip -n {ns} neigh add {GUEST} lladdr 02:fc:00:00:00:05 nud permanent dev tap0"),
        ] {
            run(&command);
        }
    }

    /// Removes both, as such scripts must.
    pub(crate) fn remove(&self) {
        for command in [
            format!("dmsetup remove --retry {}", self.disk),
            format!("losetup --detach {}", self.cow_loop),
            format!("ip link del {}", self.veth),
            format!("ip netns del {}", self.namespace),
        ] {
            run(&command);
        }
    }
}

/// A packet filter of the shape that privd loads: `privd/src/kernel/nft/mod.rs` has it as a diagram.
fn rules(addresses: &SlotAddresses) -> String {
    let SlotAddresses { host, veth_host, .. } = addresses;
    let closed: String = CLOSED
        .iter()
        .map(|range| format!("ip daddr {range} counter drop comment \"closed\"\n"))
        .collect();
    format!(
        "table inet bench {{
        chain closed {{ }}
        chain outside {{
            {closed}counter accept
        }}
        chain guard {{ type filter hook prerouting priority raw; policy accept;
            meta nfproto ipv6 counter drop
            iifname tap0 ether saddr != 02:fc:00:00:00:05 counter drop
            iifname tap0 ip saddr != {GUEST} counter drop
        }}
        chain to_guest {{ type nat hook prerouting priority dstnat; policy accept;
            iifname eth0 ip daddr {host} counter dnat ip to {GUEST}
        }}
        chain to_host {{ type filter hook input priority filter; policy drop;
            ct state established accept
            iifname tap0 ip daddr {GATEWAY} icmp type echo-request counter accept
            counter drop
        }}
        chain through {{ type filter hook forward priority filter; policy drop;
            ct state invalid counter drop
            iifname tap0 jump closed
            ct state established,related counter accept
            iifname tap0 ct count over {MAX_CONNECTIONS} counter drop
            iifname tap0 oifname eth0 jump outside
            iifname eth0 oifname tap0 ip saddr {veth_host} counter accept
            counter drop
        }}
        chain from_guest {{ type nat hook postrouting priority srcnat; policy accept;
            iifname tap0 ip saddr {GUEST} counter snat ip to {host}
        }}
        }}\n"
    )
}

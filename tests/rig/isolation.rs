//! What a guest cannot reach.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use roost_tests::disk;
use roost_tests::internet::{HOST, HostAddresses, Internet, SERVER, Server, UPLINK, UnguardedLink, Watch, ask, run};
use roost_tests::roost::{self, Sandbox};
use roost_tests::{eventually, in_rig};

/// Which addresses a guest reaches by a command, with `$a` for the address; all are tried at once.
fn reached(sandbox: &Sandbox, addresses: &[String], command: &str) -> Vec<String> {
    let all = addresses.join(" ");
    let out = sandbox.sh(&format!(
        "for a in {all}; do ({command} >/dev/null 2>&1 && echo $a) & done; wait"
    ));
    out.lines().map(str::to_owned).collect()
}

/// Packets that a guest has sent, and how many of those were IPv6.
fn sent(sandbox: &Sandbox) -> (u64, u64) {
    let number = |text: String| text.parse().expect("a number");
    (
        number(sandbox.sh("cat /sys/class/net/eth0/statistics/tx_packets")),
        number(sandbox.sh("awk '$1 == \"Ip6OutRequests\" {print $2}' /proc/net/snmp6")),
    )
}

#[test]
fn two_sandboxes_share_an_address_and_nothing_else() {
    in_rig(|| {
        let mut internet = Internet::connect();
        internet.serve(&format!("{SERVER}:80"));
        let (a, b) = (
            Sandbox::create(&["--memory", "256"]),
            Sandbox::create(&["--memory", "256"]),
        );
        for sandbox in [&a, &b] {
            assert!(sandbox.sh("ip -4 -o addr show dev eth0").contains("169.254.0.21/30"));
        }
        let (ip_a, ip_b) = (a.host_ip(), b.host_ip());
        assert_ne!(ip_a, ip_b);

        // A control: the internet is reached, and sees the host's address.
        assert_eq!(a.reach(SERVER, 80), HOST);
        assert_eq!(b.reach(SERVER, 80), HOST);
        a.sh("echo secret > /root/x");
        assert_eq!(b.sh("test -e /root/x && echo there || echo none"), "none");

        // Another guest, by every address it has; the host reaches both at the same ones.
        for ip in [&ip_a, &ip_b] {
            TcpStream::connect((ip.as_str(), 49983)).expect("the host reaches the guest");
        }
        assert_eq!(a.reach(&ip_b, 49983), "closed");
        assert_eq!(b.reach(&ip_a, 49983), "closed");
        let neighbours: Vec<String> = (0..16)
            .map(|n| format!("10.12.0.{n}"))
            .chain(b.slot_addresses())
            .chain([SERVER.to_owned()])
            .collect();
        // The server is the control.
        assert_eq!(reached(&a, &neighbours, "ping -c1 -W5 $a"), [SERVER]);

        // Whoever has taken over one's VMM, and its cage with it, is still only the uid of that VM.
        let node = |sandbox: &Sandbox| format!("/dev/{}", roost::disk_of(&sandbox.id).expect("it has a disk"));
        let uid = |sandbox: &Sandbox| std::fs::metadata(node(sandbox)).expect("the node").uid();
        let in_run = |sandbox: &Sandbox, name| format!("/run/roost/vm/{}/{name}", sandbox.id);
        let theirs = [
            node(&b),
            format!("/var/lib/roost/sandboxes/{}/rootfs.cow", b.id),
            in_run(&b, "api.sock"),
            in_run(&b, "shim.sock"),
            in_run(&b, "console.log"),
        ];
        for path in &theirs {
            assert!(Path::new(path).exists(), "{path}");
            let said = read_as(uid(&a), path).expect_err("another VM's uid read it");
            assert!(said.contains("Permission denied"), "{path}: {said}");
        }
        // The controls: its own disk, and its own socket, which is there and no file.
        read_as(uid(&b), &node(&b)).expect("its own disk");
        let said = read_as(uid(&b), &in_run(&b, "api.sock")).expect_err("a socket was read");
        assert!(said.contains("No such device or address"), "{said}");
    });
}

/// Reads the beginning of a file as a VM's uid, with the groups that its unit has; why that failed.
fn read_as(uid: u32, path: &str) -> Result<(), String> {
    let uid = uid.to_string();
    let output = Command::new("setpriv")
        .args(["--reuid", &uid, "--regid", &uid, "--groups", "kvm,roost-vm"])
        .args(["dd", "of=/dev/null", "count=1", "status=none", &format!("if={path}")])
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    output.status.success().then_some(()).ok_or(said)
}

#[test]
fn a_guest_reaches_no_address_of_its_host_and_no_private_one() {
    in_rig(|| {
        let mut internet = Internet::connect();
        // Servers that would answer, were they reached: on every address of the host, the metadata address among them, and in
        // private ranges behind the default route.
        let on_host = ["169.254.169.254", "100.64.0.1", "192.168.7.1"];
        let _addresses = HostAddresses::add(&on_host);
        let _server = Server::on_host("0.0.0.0:8088");
        let private = ["10.99.0.1", "172.16.5.5", "192.168.99.1"];
        for address in private {
            internet.add_address(address);
            internet.serve(&format!("{address}:8088"));
        }
        internet.serve(&format!("{SERVER}:8088"));
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let everywhere: Vec<&str> = on_host.iter().chain(&private).chain(&[HOST, SERVER]).copied().collect();
        for address in &everywhere {
            ask(&format!("{address}:8088"))
                .unwrap_or_else(|error| panic!("{address} does not even answer us: {error}"));
        }
        TcpStream::connect((HOST, 50051)).expect("the agent listens there");

        let slots = ["10.12.0.", "10.11.0."];
        let slots = slots.iter().flat_map(|net| (0..8).map(move |n| format!("{net}{n}")));
        let all: Vec<String> = everywhere
            .iter()
            .map(|address| (*address).to_owned())
            .chain(["169.254.0.22".to_owned()])
            .chain(slots)
            .chain(sandbox.slot_addresses())
            .collect();
        let connect = "timeout 15 /bin/bash -c \"exec 3<>/dev/tcp/$a/8088 && cat <&3\"";
        assert_eq!(reached(&sandbox, &all, connect), [SERVER], "the server is the control");
        assert_eq!(sandbox.reach(HOST, 50051), "closed");
    });
}

#[test]
fn only_the_host_may_open_connections_to_a_guest() {
    in_rig(|| {
        let internet = Internet::connect();
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let ip = sandbox.host_ip();
        TcpStream::connect((ip.as_str(), 49983)).expect("the host itself");
        assert!(
            internet.runs(&format!("ping -c1 -W5 {HOST}")),
            "the internet does not reach the host"
        );
        // From the internet, with a route as a neighbour would set it.
        let watch = Watch::start(&[("asked", &format!("iifname {UPLINK} ip daddr {ip} tcp dport 49983"))]);
        run(&format!("ip -n internet route add {ip}/32 via {HOST}"));
        let reached = internet.runs(&format!("curl --silent --max-time 5 http://{ip}:49983/health"));
        assert!(!reached, "the internet reached envd");
        assert!(watch.count("asked") > 0, "the question did not even reach the host");
    });
}

#[test]
fn a_guest_that_lies_about_its_address_is_not_heard() {
    in_rig(|| {
        let internet = Internet::connect();
        let watch = Watch::start(&[
            ("forged", "iifname roost-v* ip saddr 203.0.113.77"),
            (
                "honest",
                "iifname roost-v* ip saddr 10.12.0.0/16 icmp type echo-request",
            ),
        ]);
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.sh(&format!("ping -c1 -W5 {SERVER}"));
        assert!(watch.count("honest") > 0, "what the guest says truly is not counted");

        sandbox.sh("ip addr add 203.0.113.77/32 dev eth0");
        let (before, _) = sent(&sandbox);
        let forge = "ping -c20 -i0.1 -W1 -I 203.0.113.77";
        sandbox.sh(&format!("! {forge} {SERVER} >/dev/null 2>&1"));
        let (after, _) = sent(&sandbox);
        // Asking how much was sent is a packet or so itself, and answers are not: so twenty is proof.
        assert!(after - before >= 20, "the guest sent {} packets", after - before);
        assert_eq!(watch.count("forged"), 0, "forged packets left the sandbox");

        // That they would have been counted.
        let _link = UnguardedLink::add(&internet);
        eventually("a forged packet to be seen", || {
            internet.runs("ping -c1 -W1 -I 203.0.113.77 10.12.255.254");
            (watch.count("forged") > 0).then_some(())
        });
    });
}

#[test]
fn ipv6_is_closed() {
    in_rig(|| {
        let internet = Internet::connect();
        let watch = Watch::start(&[("six", "iifname roost-v* meta nfproto ipv6")]);
        let sandbox = Sandbox::create(&["--memory", "256"]);
        sandbox.sh("while ip -6 addr show dev eth0 | grep -q tentative; do sleep 0.1; done");
        let (_, before) = sent(&sandbox);
        // To everyone on the link and to its routers: the guest hears itself, and nobody else.
        let heard = sandbox.sh(
            "own=$(ip -6 -o addr show dev eth0 scope link | awk '{print $4}' | cut -d/ -f1); \
             for group in ff02::1 ff02::2; do ping -6 -c3 -i0.2 -W1 $group%eth0 2>&1; done \
             | grep 'bytes from' | grep -v \"from $own\" || true",
        );
        assert_eq!(heard, "", "somebody else speaks IPv6");
        // And past the link, with the namespace as its router.
        sandbox.sh(
            "ip -6 addr add 2001:db8::2/64 dev eth0 nodad && ip -6 route add default via fe80::1 dev eth0 \
             && ip -6 neigh add fe80::1 lladdr $(ip neigh show 169.254.0.22 | grep -o '..:..:..:..:..:..') dev eth0 \
             && ! ping -6 -c3 -i0.2 -W1 2001:db8:1::1 >/dev/null 2>&1",
        );
        let (_, after) = sent(&sandbox);
        assert!(after - before >= 9, "the guest sent {} IPv6 packets", after - before);
        assert_eq!(watch.count("six"), 0, "IPv6 left the sandbox");

        // That it would have been counted.
        let _link = UnguardedLink::add(&internet);
        eventually("IPv6 to be seen", || {
            internet.runs(&format!("ping -6 -c1 -W1 ff02::1%{}", UnguardedLink::FAR_END));
            (watch.count("six") > 0).then_some(())
        });
    });
}

/// What the host has learnt of what is on a block device: partitions, a file system, a partition table.
fn learnt(device: &str) -> Vec<String> {
    let block = Path::new("/sys/block").join(device);
    let numbers = std::fs::read_to_string(block.join("dev")).expect("it is there");
    // What udev remembers; nothing of a device that it has not come to.
    let known = std::fs::read_to_string(format!("/run/udev/data/b{}", numbers.trim())).unwrap_or_default();
    let known = known
        .lines()
        .filter(|line| line.starts_with("E:ID_FS_") || line.starts_with("E:ID_PART_"));
    let partitions = std::fs::read_dir(&block).expect("listed").flatten();
    let partitions = partitions.filter(|entry| entry.path().join("partition").exists());
    let partitions = partitions.map(|entry| entry.file_name().to_string_lossy().into_owned());
    known.map(str::to_owned).chain(partitions).collect()
}

/// A device and what it is made of.
fn with_all_below(device: &str, all: &mut BTreeSet<String>) {
    all.insert(device.to_owned());
    let below = std::fs::read_dir(format!("/sys/block/{device}/slaves")).expect("listed");
    for entry in below.flatten() {
        with_all_below(&entry.file_name().to_string_lossy(), all);
    }
}

/// Has udev look at a device once more, as after somebody has written to it.
fn look_again(device: &str) {
    run(&format!("udevadm trigger --action=change --settle /dev/{device}"));
}

#[test]
fn the_host_reads_no_partition_table_and_no_file_system_off_a_guests_disk() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        // A partition ahead of the file system that is there.
        let entry = r"\x80\0\0\0\x83\0\0\0\0\x08\0\0\0\x10\0\0";
        sandbox.sh(&format!(
            "printf '{entry}' | dd of=/dev/vda bs=1 seek=446 conv=notrunc status=none && \
             printf '\\x55\\xaa' | dd of=/dev/vda bs=1 seek=510 conv=notrunc,fsync status=none"
        ));
        let said_before = disk::run("dmesg", &[]).lines().count();
        let mut copy = None;
        for _ in 0..2 {
            let device = roost::disk_of(&sandbox.id).expect("it has a disk");
            copy.get_or_insert_with(|| {
                let copy = "/var/tmp/of-a-guest";
                run(&format!("dd if=/dev/{device} of={copy} bs=1M count=16 status=none"));
                copy
            });
            let mut all = BTreeSet::new();
            with_all_below(&device, &mut all);
            assert!(all.iter().any(|device| device.starts_with("loop")), "{all:?}");
            for device in &all {
                look_again(device);
                assert_eq!(learnt(device), Vec::<String>::new(), "{device}");
            }
            sandbox.pause();
            sandbox.resume();
        }
        let said = disk::run("dmesg", &[]);
        let said: Vec<&str> = said.lines().skip(said_before).collect();
        let of_a_disk = |line: &&&str| line.contains("EXT4-fs") || line.contains(": p1");
        assert_eq!(said.iter().filter(of_a_disk).count(), 0, "{said:#?}");

        // A control: a loop of somebody else's with the same on it.
        let copy = copy.expect("made above");
        let foreign = disk::run("losetup", &["--find", "--show", "--partscan", copy]);
        let foreign = foreign.trim().trim_start_matches("/dev/");
        look_again(foreign);
        let known = learnt(foreign);
        run(&format!("losetup --detach /dev/{foreign}"));
        std::fs::remove_file(copy).expect("removed");
        assert!(known.iter().any(|what| what.starts_with("E:ID_")), "{known:?}");
        assert!(known.contains(&format!("{foreign}p1")), "{known:?}");
    });
}

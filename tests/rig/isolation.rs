//! What a guest cannot reach.

use roost_tests::in_rig;
use roost_tests::internet::{HOST, Internet, SERVER, run, serve_on_host};
use roost_tests::roost::Sandbox;

/// What a guest gets from a TCP server, or `closed`.
fn reach(sandbox: &Sandbox, address: &str, port: u16) -> String {
    sandbox.sh(&format!(
        "timeout 4 /bin/bash -c 'exec 3<>/dev/tcp/{address}/{port} && cat <&3' 2>/dev/null || echo closed"
    ))
}

#[test]
fn two_sandboxes_share_an_address_and_nothing_else() {
    in_rig(|| {
        let internet = Internet::connect();
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
        assert_eq!(reach(&a, SERVER, 80), HOST);
        assert_eq!(reach(&b, SERVER, 80), HOST);
        a.sh("echo secret > /root/x");
        assert_eq!(b.sh("test -e /root/x && echo there || echo none"), "none");

        // Another guest, by every address it has.
        assert_eq!(reach(&a, &ip_b, 49983), "closed");
        assert_eq!(reach(&b, &ip_a, 49983), "closed");
        for neighbour in (1..16).map(|n| format!("10.12.0.{n}")) {
            assert_eq!(
                a.sh(&format!(
                    "ping -c1 -W1 {neighbour} >/dev/null 2>&1 && echo there || echo none"
                )),
                "none"
            );
        }
    });
}

#[test]
fn a_guest_reaches_no_address_of_its_host_and_no_private_one() {
    in_rig(|| {
        let internet = Internet::connect();
        internet.serve(&format!("{SERVER}:80"));
        // Servers that would answer, were they reached: on every address of the host, the metadata address among them, and in
        // private ranges behind the default route.
        let on_host = [HOST, "169.254.169.254", "100.64.0.1", "192.168.7.1"];
        for address in &on_host[1..] {
            run(&format!("ip addr add {address}/32 dev lo"));
        }
        serve_on_host("0.0.0.0:8088");
        for address in ["10.99.0.1", "172.16.5.5", "192.168.99.1"] {
            run(&format!("ip -n internet addr add {address}/32 dev lo"));
            internet.serve(&format!("{address}:8088"));
        }
        let sandbox = Sandbox::create(&["--memory", "256"]);
        assert_eq!(reach(&sandbox, SERVER, 80), HOST, "the control");
        let veth: Vec<String> = ["10.12.0.0", "10.11.0.0"]
            .iter()
            .flat_map(|net| hosts_near(net))
            .collect();
        let private = ["10.99.0.1", "172.16.5.5", "192.168.99.1", "169.254.0.22", "127.0.0.1"];
        let all = on_host
            .iter()
            .chain(&private)
            .map(|address| (*address).to_owned())
            .chain(veth);
        for address in all {
            assert_eq!(
                reach_quickly(&sandbox, &address, 8088),
                "closed",
                "{address}:8088 answered"
            );
        }
        for port in [22, 50051, 50052] {
            assert_eq!(
                reach_quickly(&sandbox, HOST, port),
                "closed",
                "port {port} of the host answered"
            );
        }
        for address in &on_host[1..] {
            run(&format!("ip addr del {address}/32 dev lo"));
        }
    });
}

/// The first addresses of a slot range: this host has few sandboxes, so its own are among them.
fn hosts_near(net: &str) -> Vec<String> {
    let prefix = net.trim_end_matches('0');
    (2..8).map(|n| format!("{prefix}{n}")).collect()
}

fn reach_quickly(sandbox: &Sandbox, address: &str, port: u16) -> String {
    sandbox.sh(&format!(
        "timeout 1 /bin/bash -c 'exec 3<>/dev/tcp/{address}/{port} && cat <&3' 2>/dev/null || echo closed"
    ))
}

#[test]
fn only_the_host_may_open_connections_to_a_guest() {
    in_rig(|| {
        let internet = Internet::connect();
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let ip = sandbox.host_ip();
        let from_host = std::net::TcpStream::connect((ip.as_str(), 49983));
        assert!(from_host.is_ok(), "the host itself: {from_host:?}");
        // From the internet, with a route as a neighbour would set it.
        run(&format!("ip -n internet route add {ip}/32 via {HOST}"));
        let outside = std::process::Command::new("ip")
            .args([
                "netns",
                "exec",
                "internet",
                "curl",
                "--max-time",
                "3",
                &format!("http://{ip}:49983/health"),
            ])
            .output()
            .expect("it runs");
        assert!(!outside.status.success(), "the internet reached envd");
        drop(internet);
    });
}

#[test]
fn a_guest_that_lies_about_its_address_is_not_heard() {
    in_rig(|| {
        let internet = Internet::connect();
        internet.serve(&format!("{SERVER}:80"));
        let sandbox = Sandbox::create(&["--memory", "256"]);
        assert_eq!(reach(&sandbox, SERVER, 80), HOST, "the control");
        sandbox.sh("ip addr add 203.0.113.77/32 dev eth0");
        let spoofed = sandbox.sh(&format!(
            "ping -c2 -W1 -I 203.0.113.77 {SERVER} >/dev/null 2>&1 && echo heard || echo dropped"
        ));
        assert_eq!(spoofed, "dropped");
    });
}

#[test]
fn ipv6_is_closed() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        let heard = sandbox.sh("ping -6 -c1 -W1 ff02::1%eth0 >/dev/null 2>&1 && echo heard || echo dropped");
        assert_eq!(heard, "dropped");
    });
}

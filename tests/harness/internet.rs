//! An internet of our own: a network namespace with public addresses behind the host's default route, and servers in it that say
//! who called.

use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;

use nix::sched::{CloneFlags, setns};

/// The host's address on its uplink.
pub const HOST: &str = "203.0.113.1";
/// A server on the internet.
pub const SERVER: &str = "203.0.113.2";
const NAME: &str = "internet";

/// The internet, for as long as this value lives.
#[derive(Debug)]
pub struct Internet(());

impl Internet {
    /// Connects the host to an internet.
    ///
    /// # Panics
    /// When `ip` fails.
    pub fn connect() -> Self {
        let internet = Self(());
        for command in [
            format!("ip netns add {NAME}"),
            format!("ip link add uplink type veth peer name eth0 netns {NAME}"),
            format!("ip addr add {HOST}/24 dev uplink"),
            "ip link set uplink up".into(),
            format!("ip -n {NAME} addr add {SERVER}/24 dev eth0"),
            format!("ip -n {NAME} link set eth0 up"),
            format!("ip -n {NAME} link set lo up"),
            format!("ip route add default via {SERVER} dev uplink"),
        ] {
            run(&command);
        }
        internet
    }

    /// Serves at an address of the internet: whoever connects is told the address it seems to come from.
    ///
    /// # Panics
    /// When the address is none of the internet's.
    pub fn serve(&self, address: &str) {
        let address: SocketAddr = address.parse().expect("an address");
        let (bound, is_bound) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let namespace = File::open(format!("/run/netns/{NAME}")).expect("the namespace");
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("entered");
            let listener = TcpListener::bind(address).expect("bound");
            bound.send(()).expect("somebody waits");
            serve(&listener);
        });
        is_bound.recv().expect("the server is up");
    }
}

/// Serves on the host itself, likewise.
///
/// # Panics
/// When the address is none of the host's.
pub fn serve_on_host(address: &str) {
    let listener = TcpListener::bind(address).expect("bound");
    std::thread::spawn(move || serve(&listener));
}

fn serve(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        let mut stream = stream;
        let peer = stream.peer_addr().map(|peer| peer.ip().to_string()).unwrap_or_default();
        // A caller that has gone needs no answer.
        drop(stream.write_all(peer.as_bytes()));
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        for command in ["ip link del uplink", "ip netns del internet"] {
            let mut words = command.split(' ');
            // What was never made cannot be removed.
            drop(Command::new(words.next().expect("a program")).args(words).output());
        }
    }
}

/// Runs a command that must succeed.
///
/// # Panics
/// When it fails.
pub fn run(command: &str) {
    let mut words = command.split(' ');
    let output = Command::new(words.next().expect("a program"))
        .args(words)
        .output()
        .expect("it runs");
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

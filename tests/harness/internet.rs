//! An internet of our own: a network namespace with public addresses behind the host's default route, and servers in it that say
//! who called.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

/// The host's address on its uplink.
pub const HOST: &str = "203.0.113.1";
/// A server on the internet.
pub const SERVER: &str = "203.0.113.2";
/// Name of the host's link to the internet.
pub const UPLINK: &str = "uplink";
const NAME: &str = "internet";

/// The internet, for as long as this value lives.
#[derive(Debug)]
pub struct Internet {
    servers: Vec<Server>,
}

impl Internet {
    /// Connects the host to an internet.
    ///
    /// # Panics
    /// When `ip` fails.
    pub fn connect() -> Self {
        let internet = Self { servers: Vec::new() };
        for command in [
            format!("ip netns add {NAME}"),
            format!("ip link add {UPLINK} type veth peer name eth0 netns {NAME}"),
            format!("ip addr add {HOST}/24 dev {UPLINK}"),
            format!("ip link set {UPLINK} up"),
            format!("ip -n {NAME} addr add {SERVER}/24 dev eth0"),
            format!("ip -n {NAME} link set eth0 up"),
            format!("ip -n {NAME} link set lo up"),
            format!("ip route add default via {SERVER} dev {UPLINK}"),
        ] {
            run(&command);
        }
        internet
    }

    /// Serves at an address of the internet: whoever connects is told the address it seems to come from.
    ///
    /// # Panics
    /// When the address is none of the internet's.
    pub fn serve(&mut self, address: &str) {
        self.servers.push(Server::start(bound(address), tell_caller));
    }

    /// Serves HTTP at an address of the internet: each request is told the server's address, and its own method, path and host.
    ///
    /// # Panics
    /// When the address is none of the internet's.
    pub fn serve_http(&mut self, address: &str) {
        self.servers.push(Server::start(bound(address), tell_request));
    }

    /// Serves HTTPS at an address of the internet, with OpenSSL's own server, which tells of itself.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn serve_tls(&self, address: &str, certificate: &Path, key: &Path) -> TlsServer {
        let mut command = Command::new("ip");
        command.args([
            "netns", "exec", NAME, "openssl", "s_server", "-www", "-quiet", "-accept", address,
        ]);
        command.arg("-cert").arg(certificate).arg("-key").arg(key);
        let server = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let server = TlsServer(server.expect("ip runs"));
        // Through the uplink, as everybody does.
        crate::eventually("the server listens", || TcpStream::connect(address).ok());
        server
    }

    /// Gives the internet a further address.
    ///
    /// # Panics
    /// When `ip` fails.
    pub fn add_address(&self, address: &str) {
        run(&format!("ip -n {NAME} addr add {address}/32 dev lo"));
    }

    /// Runs a command on the internet; whether it succeeded.
    ///
    /// # Panics
    /// When it cannot be run at all.
    pub fn runs(&self, command: &str) -> bool {
        let output = Command::new("ip")
            .args(["netns", "exec", NAME])
            .args(command.split(' '))
            .output();
        output.expect("ip runs").status.success()
    }
}

/// A server that tells callers where they seem to come from, for as long as this value lives: its socket would keep its
/// namespace, and with it what a census counts.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves on the host itself.
    ///
    /// # Panics
    /// When the address is none of the host's.
    pub fn on_host(address: &str) -> Self {
        Self::start(TcpListener::bind(address).expect("bound"), tell_caller)
    }

    fn start(listener: TcpListener, answer: fn(TcpStream, SocketAddr)) -> Self {
        let accepting = listener.try_clone().expect("another descriptor");
        let thread = std::thread::spawn(move || {
            // Until the listener is shut down.
            while let Ok((stream, peer)) = accepting.accept() {
                answer(stream, peer);
            }
        });
        Self {
            listener,
            thread: Some(thread),
        }
    }
}

/// A listener on the internet.
fn bound(address: &str) -> TcpListener {
    let address: SocketAddr = address.parse().expect("an address");
    // A socket stays in the namespace that it was made in; the thread that made it ends.
    let bound = std::thread::spawn(move || {
        let namespace = File::open(format!("/run/netns/{NAME}")).expect("the namespace");
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("entered");
        TcpListener::bind(address).expect("bound")
    });
    bound.join().expect("a listener")
}

fn tell_caller(mut stream: TcpStream, peer: SocketAddr) {
    // A caller that has gone needs no answer.
    drop(stream.write_all(peer.ip().to_string().as_bytes()));
    drop(stream.shutdown(Shutdown::Write));
}

fn tell_request(stream: TcpStream, _: SocketAddr) {
    // One that breaks off needs no answer.
    drop(try_tell_request(stream));
}

fn try_tell_request(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut host = String::new();
    for line in lines {
        match line?.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("host") => value.clone_into(&mut host),
            Some(_) => {}
            None => break,
        }
    }
    let asked = first.trim_end_matches(" HTTP/1.1");
    let answer = format!("{} {asked} {host}", stream.local_addr()?.ip());
    let length = answer.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{answer}"
    )?;
    stream.shutdown(Shutdown::Write)
}

/// OpenSSL's server, for as long as this value lives.
#[derive(Debug)]
pub struct TlsServer(Child);

impl Drop for TlsServer {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has noticed.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let stopped = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let (Ok(()), Some(thread)) = (stopped, self.thread.take()) {
            drop(thread.join());
        }
    }
}

/// What the host itself gets from a server of ours, or why nothing.
///
/// # Errors
/// The connection's.
pub fn ask(address: &str) -> std::io::Result<String> {
    let address: SocketAddr = address.parse().expect("an address");
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Further addresses of the host, for as long as this value lives.
#[derive(Debug)]
pub struct HostAddresses(Vec<String>);

impl HostAddresses {
    /// Adds them.
    ///
    /// # Panics
    /// When `ip` fails.
    pub fn add(addresses: &[&str]) -> Self {
        let mut added = Self(Vec::new());
        for address in addresses {
            run(&format!("ip addr add {address}/32 dev lo"));
            added.0.push((*address).to_owned());
        }
        added
    }
}

impl Drop for HostAddresses {
    fn drop(&mut self) {
        for address in &self.0 {
            // A test that fails anyway says why itself.
            drop(
                Command::new("ip")
                    .args(["addr", "del", &format!("{address}/32"), "dev", "lo"])
                    .output(),
            );
        }
    }
}

/// Packets that arrive at the host, counted ahead of every other rule, of routing and of the reverse path check.
#[derive(Debug)]
pub struct Watch(());

impl Watch {
    /// Counts packets by named conditions in nft's language.
    ///
    /// # Panics
    /// When `nft` fails.
    pub fn start(conditions: &[(&str, &str)]) -> Self {
        let counters: String = conditions
            .iter()
            .map(|(name, _)| format!("  counter {name} {{ }}\n"))
            .collect();
        let lines: String = conditions
            .iter()
            .map(|(name, condition)| format!("    {condition} counter name {name}\n"))
            .collect();
        let script = format!(
            "table inet watch {{\n{counters}  chain prerouting {{\n    type filter hook prerouting priority -400;\n{lines}  }}\n}}\n"
        );
        let watch = Self(());
        let mut nft = Command::new("nft")
            .args(["-f", "-"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("nft runs");
        nft.stdin
            .take()
            .expect("piped")
            .write_all(script.as_bytes())
            .expect("nft reads");
        assert!(nft.wait().expect("nft ends").success(), "nft refused:\n{script}");
        watch
    }

    /// How many packets met a condition so far.
    ///
    /// # Panics
    /// When there is no condition of this name.
    pub fn count(&self, name: &str) -> u64 {
        let output = Command::new("nft")
            .args(["--json", "list", "counter", "inet", "watch", name])
            .output()
            .expect("nft runs");
        let listed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let counters = listed["nftables"].as_array().into_iter().flatten();
        let mut counts = counters.filter_map(|object| object["counter"]["packets"].as_u64());
        counts.next().unwrap_or_else(|| {
            panic!("no counter {name}: {}", String::from_utf8_lossy(&output.stderr));
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(Command::new("nft").args(["delete", "table", "inet", "watch"]).output());
    }
}

/// A link named as a sandbox's, with no sandbox and no rules of ours behind it but a program on the internet: what a sandbox's
/// link would be if nothing held its guest. It shows that a [`Watch`] sees what it says it watches for.
#[derive(Debug)]
pub struct UnguardedLink(());

impl UnguardedLink {
    /// Its name on the host, which rules for sandboxes' links match.
    const HOST_END: &str = "roost-vtest";
    /// Its name on the internet.
    pub const FAR_END: &str = "unguarded";

    /// Adds it.
    ///
    /// # Panics
    /// When `ip` fails.
    pub fn add(_: &Internet) -> Self {
        let (near, far) = (Self::HOST_END, Self::FAR_END);
        let link = Self(());
        for command in [
            format!("ip link add {near} address 02:00:00:00:00:01 type veth peer name {far} netns {NAME}"),
            format!("ip link set {near} up"),
            format!("ip -n {NAME} link set {far} up"),
            format!("ip -n {NAME} addr add 203.0.113.77/32 dev {far}"),
            format!("ip -n {NAME} route add 10.12.255.254/32 dev {far} src 203.0.113.77"),
            format!("ip -n {NAME} neigh add 10.12.255.254 lladdr 02:00:00:00:00:01 dev {far}"),
        ] {
            run(&command);
        }
        link
    }
}

impl Drop for UnguardedLink {
    fn drop(&mut self) {
        drop(Command::new("ip").args(["link", "del", Self::HOST_END]).output());
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        self.servers.clear();
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

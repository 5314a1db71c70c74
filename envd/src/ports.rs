//! Ports that programs open to their own machine alone are forwarded from the address that the host reaches.
//!
//! ```text
//! host --> 169.254.0.21:3000 --copy--> 127.0.0.1:3000 or [::1]:3000
//! ```
//!
//! Holds: what is forwarded is bounded. While a snapshot is prepared and taken nothing is looked for and no forwarding
//! listener is open; afterwards what programs still listen on is found again. A port that a program has opened on all
//! addresses is its own: there the address is taken, and nothing is forwarded.
//!
//! Once a second is what it costs: as long as a port is forwarded no program can open it on all addresses, so one that
//! restarts with another address may fail for that long.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, spawn_blocking};

/// How often it is looked for ports.
const INTERVAL: Duration = Duration::from_secs(1);

/// Ports that are forwarded at a time; of more, the lowest.
const MAX_PORTS: usize = 256;

/// Connections that are forwarded at a time; more wait in the kernel's queues.
const MAX_CONNECTIONS: usize = 512;

/// How long after the preparation of a snapshot forwarding goes on if nobody says that the guest has woken, or that there
/// was no snapshot after all. Time in which the machine stands still does not count.
const PAUSE: Duration = Duration::from_secs(60);

/// Whether ports are forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Forwarding {
    #[default]
    Active,
    Stopped,
}

/// Switches forwarding on and off.
#[derive(Default)]
pub(crate) struct Switch(watch::Sender<Forwarding>);

impl Switch {
    /// For a snapshot.
    pub(crate) fn stop(&self) {
        self.0.send_replace(Forwarding::Stopped);
    }

    /// The guest goes on.
    pub(crate) fn go_on(&self) {
        self.0
            .send_if_modified(|state| std::mem::replace(state, Forwarding::Active) == Forwarding::Stopped);
    }

    /// Forwards ports from `address`, for as long as the switch is there.
    pub(crate) async fn forward(&self, address: Ipv4Addr) {
        let mut state = self.0.subscribe();
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let mut forwarded = Forwarded::default();
            while *state.borrow_and_update() == Forwarding::Active {
                // Not on this thread: the files may be long.
                if let Ok(targets) = spawn_blocking(listening).await {
                    forwarded.update(address, targets, &room).await;
                }
                tokio::select! {
                    changed = state.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(INTERVAL) => {}
                }
            }
            drop(forwarded);
            let active = state.wait_for(|state| *state == Forwarding::Active);
            if tokio::time::timeout(PAUSE, active).await.is_err() {
                self.go_on();
            }
        }
    }
}

/// The ports that are forwarded, each by a task.
#[derive(Default)]
struct Forwarded(BTreeMap<u16, (SocketAddr, Accepting)>);

/// Closes its listener when it is dropped. Connections that it has accepted go on for as long as their ends do.
struct Accepting(JoinHandle<()>);

impl Drop for Accepting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Forwarded {
    /// Forwards what is in `targets`, and nothing else.
    async fn update(&mut self, address: Ipv4Addr, targets: BTreeMap<u16, SocketAddr>, room: &Arc<Semaphore>) {
        self.0.retain(|port, (target, _)| targets.get(port) == Some(target));
        for (port, target) in targets {
            if self.0.contains_key(&port) || self.0.len() >= MAX_PORTS {
                continue;
            }
            // Taken by the program itself, or by another; it is looked at again next time.
            if let Ok(listener) = TcpListener::bind((address, port)).await {
                let task = tokio::spawn(accept(listener, target, Arc::clone(room)));
                self.0.insert(port, (target, Accepting(task)));
            }
        }
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, room: Arc<Semaphore>) {
    loop {
        let permit = Arc::clone(&room)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let Ok((mut outside, _)) = listener.accept().await else {
            // Without descriptors or memory; the connections that end give some back.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        tokio::spawn(async move {
            if let Ok(mut inside) = TcpStream::connect(target).await {
                for end in [&outside, &inside] {
                    // Where it fails the connection is gone.
                    end.set_nodelay(true).ok();
                }
                // An error of one end is the other's to notice.
                tokio::io::copy_bidirectional(&mut outside, &mut inside).await.ok();
            }
            drop(permit);
        });
    }
}

/// The ports on which programs listen at the loopback addresses, and where; IPv4 where both do.
fn listening() -> BTreeMap<u16, SocketAddr> {
    let mut found = BTreeMap::new();
    for (file, address) in [
        ("/proc/net/tcp6", Ipv6Addr::LOCALHOST.into()),
        ("/proc/net/tcp", Ipv4Addr::LOCALHOST.into()),
    ] {
        // A kernel without IPv6 has no such file.
        let ports = File::open(Path::new(file)).and_then(|file| ports(BufReader::new(file)));
        let targets = ports.unwrap_or_default().into_iter();
        found.extend(targets.map(|port| (port, SocketAddr::new(address, port))));
    }
    found
}

/// The ports that `/proc/net/tcp` or `tcp6` lists as listening on the loopback address. Those that listen come first
/// (`tcp_get_idx`, net/ipv4/tcp_ipv4.c), so the rest, which may be long, is not read.
fn ports(table: impl io::BufRead) -> io::Result<Vec<u16>> {
    /// As the kernel prints them: each 32 bits in the machine's byte order.
    const LOOPBACK: [&str; 2] = ["0100007F", "00000000000000000000000001000000"];
    /// TCP_LISTEN of include/net/tcp_states.h.
    const LISTEN: &str = "0A";
    let mut ports = Vec::new();
    for line in table.lines().skip(1) {
        let line = line?;
        let mut fields = line.split_whitespace().skip(1);
        let (Some(local), Some(_remote), Some(state)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if state != LISTEN {
            break;
        }
        if let Some((address, port)) = local.split_once(':')
            && LOOPBACK.contains(&address)
            && let Ok(port) = u16::from_str_radix(port, 16)
        {
            ports.push(port);
        }
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Of the loopback network, and not where programs listen: it stands in for that of eth0.
    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 21);

    #[test]
    fn what_listens_at_the_loopback_address_is_found_and_the_rest_not_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0\n\
            1: 00000000:C33F 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0\n\
            nonsense\n\
            2: 0100007F:FFFF 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3 1 0\n\
            3: 0100007F:0BB9 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 4 1 0\n\
            4: 0100007F:0BBA 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 5 1 0\n";
        assert_eq!(ports(table.as_bytes()).unwrap(), [3000, 65535]);
        let table = "head\n\
            0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 0 0\n\
            1: 00000000000000000000000000000000:1F91 00000000000000000000000000000000:0000 0A 0 0\n";
        assert_eq!(ports(table.as_bytes()).unwrap(), [8080]);
    }

    async fn echo(listener: TcpListener) {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                tokio::io::copy(&mut reader, &mut writer).await.ok();
            });
        }
    }

    async fn reach(port: u16) -> TcpStream {
        loop {
            if let Ok(stream) = TcpStream::connect((OUTSIDE, port)).await {
                return stream;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_refused(port: u16) {
        while TcpStream::connect((OUTSIDE, port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn a_port_is_forwarded_while_somebody_listens_and_no_snapshot_is_taken() {
        let switch = Arc::new(Switch::default());
        let forwarding = tokio::spawn({
            let switch = Arc::clone(&switch);
            async move { switch.forward(OUTSIDE).await }
        });
        let test = async {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let program = tokio::spawn(echo(listener));
            let mut stream = reach(port).await;
            let (mut reader, mut writer) = stream.split();
            let sent = vec![7; 1 << 20];
            let mut received = Vec::new();
            let (written, read) = tokio::join!(
                async {
                    writer.write_all(&sent).await?;
                    writer.shutdown().await
                },
                reader.read_to_end(&mut received)
            );
            written.unwrap();
            read.unwrap();
            assert!(received == sent, "what comes back is not what was sent");
            switch.stop();
            until_refused(port).await;
            switch.go_on();
            drop(reach(port).await);
            program.abort();
            until_refused(port).await;
        };
        tokio::time::timeout(Duration::from_secs(30), test)
            .await
            .expect("in time");
        forwarding.abort();
    }
}

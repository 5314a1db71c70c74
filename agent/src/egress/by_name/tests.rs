use std::time::Instant;

use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::egress::Wish;

const LOCAL: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Listeners of a sandbox on the loopback, and one server that every permitted name leads to.
struct Host {
    policy: watch::Sender<Arc<Egress>>,
    tally: Arc<Tally>,
    tls: SocketAddr,
    http: SocketAddr,
    server: TcpListener,
    /// Whom it was led to.
    asked: Arc<Mutex<Vec<(String, u16)>>>,
    _listeners: ByName,
}

fn names(all: &[&str]) -> Arc<Egress> {
    let egress = Egress::check(Wish {
        allow_names: all.iter().map(|name| (*name).to_owned()).collect(),
        ..Wish::default()
    });
    Arc::new(egress.expect("checked"))
}

async fn any_port() -> TcpListener {
    TcpListener::bind((LOCAL, 0)).await.expect("bound")
}

fn address(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("bound")
}

impl Host {
    async fn permitting(all: &[&str]) -> Self {
        Self::for_guest(LOCAL, all).await
    }

    async fn for_guest(guest: Ipv4Addr, all: &[&str]) -> Self {
        let (server, tls, http) = (any_port().await, any_port().await, any_port().await);
        let (to, tls_at, http_at) = (address(&server), address(&tls), address(&http));
        let (policy, seen) = watch::channel(names(all));
        let (tally, asked) = (Arc::<Tally>::default(), Arc::<Mutex<Vec<_>>>::default());
        let (alive, serving) = watch::channel(());
        let way = Way {
            sandbox: "a".parse().expect("an id"),
            policy: seen,
            tally: tally.clone(),
            serving,
            places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            lead: Arc::new({
                let asked = asked.clone();
                move |name, port, _| {
                    asked.lock().expect("unharmed").push((name, port));
                    Box::pin(async move { TcpStream::connect(to).await.map_err(Refusal::Unreached) })
                }
            }),
        };
        Self {
            policy,
            tally,
            tls: tls_at,
            http: http_at,
            server,
            asked,
            _listeners: ByName::on([(tls, Protocol::Tls), (http, Protocol::Http)], guest, &way, alive),
        }
    }

    fn asked(&self) -> Vec<(String, u16)> {
        self.asked.lock().expect("unharmed").clone()
    }

    /// What was refused last, as name and reason.
    fn last_refused(&self) -> (String, String) {
        let last = self.tally.counts().last;
        let first = last.front().expect("something was refused");
        (first.name.clone(), first.why.clone())
    }

    /// Says something on one of the ports; all that comes back.
    async fn says(&self, to: SocketAddr, said: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(to).await.expect("connected");
        stream.write_all(said).await.expect("written");
        let mut answer = Vec::new();
        // A connection that is reset has said all it will.
        drop(stream.read_to_end(&mut answer).await);
        answer
    }

    /// Says something on the port of HTTP; the answer's first line, and the rest.
    async fn asks(&self, request: &str) -> (String, String) {
        let answer = String::from_utf8(self.says(self.http, request.as_bytes()).await).expect("text");
        let (line, rest) = answer.split_once("\r\n").unwrap_or((&answer, ""));
        (line.to_owned(), rest.to_owned())
    }
}

/// The first message of a TLS client that asks for a server.
fn hello(server: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = server.to_owned().try_into().expect("a server's name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut message = Vec::new();
    client.write_tls(&mut message).expect("written");
    message
}

#[tokio::test]
async fn tls_is_passed_on_byte_for_byte_to_the_name_it_asks_for() {
    let host = Host::permitting(&["*.example.com"]).await;
    let hello = hello("www.Example.com");
    let mut guest = TcpStream::connect(host.tls).await.expect("connected");
    // A byte at a time, and more behind it.
    for byte in &hello {
        guest.write_all(&[*byte]).await.expect("written");
    }
    let (mut server, _) = host.server.accept().await.expect("led there");
    guest.write_all(b"and more").await.expect("written");
    let mut seen = vec![0; hello.len() + 8];
    server.read_exact(&mut seen).await.expect("read");
    assert_eq!(seen, [&hello[..], b"and more"].concat());
    server.write_all(b"answer").await.expect("written");
    drop(server);
    let mut answer = Vec::new();
    guest.read_to_end(&mut answer).await.expect("read");
    assert_eq!(answer, b"answer");
    assert_eq!(host.asked(), [("www.example.com".to_owned(), 443)]);
    let counts = host.tally.counts();
    assert_eq!((counts.passed, counts.refused), (1, 0));
}

#[tokio::test]
async fn tls_that_asks_for_anything_else_is_told_and_leads_nowhere() {
    let host = Host::permitting(&["example.com"]).await;
    for name in ["example.org", "www.example.com", "example.com.evil.example"] {
        assert_eq!(
            host.says(host.tls, &hello(name)).await,
            [21, 3, 3, 0, 2, 2, 112],
            "{name}"
        );
        let (refused, why) = host.last_refused();
        assert_eq!((refused.as_str(), why.contains("does not list")), (name, true), "{why}");
    }
    // An address is no name, so none is said.
    assert!(host.says(host.tls, &hello("192.0.2.1")).await.is_empty());
    assert!(host.last_refused().1.contains("names no server"));
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0; 64],
        &[22, 3, 1, 0xFF, 0xFF],
        b"SSH-2.0-x\r\n",
    ] {
        let mut stream = TcpStream::connect(host.tls).await.expect("connected");
        stream.write_all(garbage).await.expect("written");
        stream.shutdown().await.expect("shut down");
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer).await);
        assert!(answer.is_empty(), "{garbage:?}");
    }
    assert_eq!((host.asked(), host.tally.counts().refused), (vec![], 8));
}

#[tokio::test]
async fn a_first_message_without_end_is_given_up() {
    let host = Host::permitting(&["example.com"]).await;
    // Records of a handshake message that says it has 16 MiB.
    let mut first = vec![22, 3, 1, 0x20, 0, 1, 0xFF, 0xFF, 0xFF];
    first.resize(5 + 0x2000, 0);
    let mut next = vec![22, 3, 1, 0x20, 0];
    next.resize(5 + 0x2000, 0);
    let endless = [&first[..], &next, &next, &next, &next, &next].concat();
    host.says(host.tls, &endless).await;
    let (_, why) = host.last_refused();
    assert!(why.contains("too long") || why.contains("no TLS"), "{why}");
    assert_eq!(host.asked(), []);
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_is_given_up() {
    let host = Host::permitting(&["example.com"]).await;
    for silent in [host.tls, host.http] {
        let mut stream = TcpStream::connect(silent).await.expect("connected");
        assert_eq!(stream.read(&mut [0; 1]).await.expect("closed"), 0);
    }
}

#[tokio::test]
async fn each_request_of_http_is_judged_by_its_host() {
    let host = Host::permitting(&["example.com"]).await;
    let mut guest = TcpStream::connect(host.http).await.expect("connected");
    guest
        .write_all(b"POST /a?b HTTP/1.1\r\nHost: Example.com:80\r\nContent-Length: 4\r\nX-Own: 1\r\nConnection: x-hop\r\nX-Hop: 1\r\n\r\nbody")
        .await
        .expect("written");
    let (mut server, _) = host.server.accept().await.expect("led there");
    let mut seen = vec![0; 4096];
    let mut length = 0;
    while !seen[..length].ends_with(b"body") {
        length += server.read(&mut seen[length..]).await.expect("read");
    }
    let seen = String::from_utf8_lossy(&seen[..length]).to_lowercase();
    assert!(seen.starts_with("post /a?b http/1.1\r\n"), "{seen}");
    assert!(
        seen.contains("host: example.com:80\r\n") && seen.contains("x-own: 1"),
        "{seen}"
    );
    assert!(!seen.contains("x-hop"), "{seen}");
    server
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        .await
        .expect("written");
    let mut answer = vec![0; 4096];
    let mut length = 0;
    while !answer[..length].ends_with(b"ok") {
        length += guest.read(&mut answer[length..]).await.expect("read");
    }
    // The same connection, another host: of the first server or not, it is not on the list.
    guest
        .write_all(b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n")
        .await
        .expect("written");
    let mut rest = String::new();
    guest.read_to_string(&mut rest).await.expect("read");
    assert!(
        rest.starts_with("HTTP/1.1 403 ") && rest.contains("does not reach other.example"),
        "{rest}"
    );
    assert_eq!(host.asked(), [("example.com".to_owned(), 80)]);
    assert_eq!(host.last_refused().0, "other.example");
}

#[tokio::test]
async fn a_request_that_says_no_host_clearly_leads_nowhere() {
    let host = Host::permitting(&["example.com"]).await;
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.0\r\n\r\n", "400"),
        (
            "GET / HTTP/1.1\r\nHost: example.com\r\nHost: evil.example\r\n\r\n",
            "400",
        ),
        ("GET http://evil.example/ HTTP/1.1\r\nHost: example.com\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: example.com:22\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: example.com@evil.example\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: 192.0.2.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", "400"),
        ("CONNECT example.com:80 HTTP/1.1\r\nHost: example.com:80\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", "403"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let request = request.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        let (line, _) = host.asks(&request).await;
        assert!(line.contains(status), "{request:?}: {line}");
    }
    assert_eq!(host.asked(), []);
}

#[tokio::test]
async fn a_policy_that_changes_ends_what_it_forbids_and_nothing_else() {
    let host = Host::permitting(&["a.example", "b.example"]).await;
    let mut guests = Vec::new();
    for name in ["a.example", "b.example"] {
        let mut guest = TcpStream::connect(host.tls).await.expect("connected");
        guest.write_all(&hello(name)).await.expect("written");
        let (server, _) = host.server.accept().await.expect("led there");
        guests.push((guest, server));
    }
    host.policy.send_replace(names(&["b.example"]));
    let (mut forbidden, _server) = guests.remove(0);
    assert_eq!(forbidden.read(&mut [0; 1]).await.unwrap_or(0), 0, "it goes on");
    let (mut permitted, mut server) = guests.remove(0);
    server.write_all(b"!").await.expect("written");
    assert_eq!(permitted.read(&mut [0; 1]).await.expect("it goes on"), 1);
    assert!(
        host.says(host.tls, &hello("a.example")).await.len() == 7,
        "no longer permitted"
    );
    // Its name is still listed, and the address behind it denied.
    host.policy.send_replace(Arc::new(Egress {
        denied: vec!["127.0.0.0/8".parse().expect("a range")],
        ..(*names(&["b.example"])).clone()
    }));
    assert_eq!(permitted.read(&mut [0; 1]).await.unwrap_or(0), 0, "it goes on");
}

#[tokio::test]
async fn the_end_of_the_listeners_ends_their_connections() {
    let host = Host::permitting(&["a.example"]).await;
    let mut guest = TcpStream::connect(host.tls).await.expect("connected");
    guest.write_all(&hello("a.example")).await.expect("written");
    let (_server, _) = host.server.accept().await.expect("led there");

    // What has become a tunnel too.
    let mut upgraded = TcpStream::connect(host.http).await.expect("connected");
    upgraded
        .write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
        .await
        .expect("written");
    let (mut server, _) = host.server.accept().await.expect("led there");
    let mut head = vec![0; 4096];
    let mut length = 0;
    while !head[..length].ends_with(b"\r\n\r\n") {
        length += server.read(&mut head[length..]).await.expect("read");
    }
    server
        .write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nhello")
        .await
        .expect("written");
    let mut length = 0;
    while !head[..length].ends_with(b"hello") {
        length += upgraded.read(&mut head[length..]).await.expect("read");
    }
    upgraded.write_all(b"!").await.expect("written");
    assert_eq!(server.read(&mut [0; 1]).await.expect("read"), 1);

    drop(host);
    assert_eq!(guest.read(&mut [0; 1]).await.unwrap_or(0), 0);
    assert_eq!(server.read(&mut [0; 1]).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn nobody_but_the_guest_is_served() {
    let host = Host::for_guest(Ipv4Addr::new(127, 0, 0, 9), &["a.example"]).await;
    assert!(host.says(host.tls, &hello("a.example")).await.is_empty());
    assert!(
        host.asks("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            .await
            .0
            .is_empty()
    );
    assert_eq!((host.asked(), host.tally.counts().refused), (vec![], 0));
}

#[tokio::test]
async fn a_guest_has_so_many_connections_and_no_more() {
    let host = Host::permitting(&["a.example"]).await;
    let mut open = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        open.push(TcpStream::connect(host.tls).await.expect("connected"));
    }
    let mut one_more = TcpStream::connect(host.tls).await.expect("connected");
    assert_eq!(one_more.read(&mut [0; 1]).await.unwrap_or(0), 0);
    assert!(host.last_refused().1.contains("too many"));
    drop(open);
    let deadline = Instant::now() + Duration::from_secs(10);
    while host.says(host.tls, &hello("b.example")).await.len() != 7 {
        assert!(Instant::now() < deadline, "there is never room again");
    }
}

#[test]
fn the_last_refused_are_remembered_and_no_more() {
    let tally = Tally::default();
    for n in 0..100 {
        tally.refused(&format!("{n}.example"), &Refusal::NotListed);
        tally.refused("again.example", &Refusal::NotListed);
    }
    let counts = tally.counts();
    assert_eq!((counts.refused, counts.last.len()), (200, MAX_REMEMBERED));
    assert_eq!(
        (counts.last[0].name.as_str(), counts.last[0].times),
        ("again.example", 100)
    );
    assert_eq!(counts.last[1].name, "99.example");
}

#[tokio::test]
async fn a_name_leads_to_no_address_that_is_closed_denied_or_this_hosts() {
    let policy = names(&["a.example"]);
    for closed in ["127.0.0.1", "10.12.0.2", "169.254.169.254", "192.168.1.1", "0.0.0.0"] {
        assert!(!is_permitted(closed.parse().expect("an address"), &policy), "{closed}");
    }
    let public = Ipv4Addr::new(203, 0, 113, 7);
    assert!(is_permitted(public, &policy));
    let denied = Egress {
        denied: vec!["203.0.113.0/29".parse().expect("a range")],
        ..(*policy).clone()
    };
    assert!(!is_permitted(public, &denied));
    // What every host has.
    assert!(is_this_host(SocketAddrV4::new(LOCAL, 80)).await);
    let refused = lead("localhost".to_owned(), 80, policy).await.expect_err("led there");
    assert!(matches!(refused, Refusal::Closed), "{refused:?}");
}

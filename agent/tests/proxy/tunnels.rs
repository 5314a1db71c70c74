//! Upgrades: raw bytes both ways.

use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::guests::{Agent, soon};
use crate::upstream::{Upstream, read_head};

/// How a tunnel is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    WebSocket,
    Forward,
}

impl Kind {
    pub(crate) const ALL: [Self; 2] = [Self::WebSocket, Self::Forward];
}

/// Opens a tunnel.
pub(crate) async fn open(agent: &Agent, kind: Kind, sandbox: &str, port: u16) -> TlsStream<TcpStream> {
    let mut stream = agent.connect("http/1.1").await;
    let request = match kind {
        Kind::WebSocket => format!(
            "GET /proxy/{sandbox}/{port}/socket HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n"
        ),
        Kind::Forward => {
            format!("GET /forward/{sandbox}/{port} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: TCP\r\n\r\n")
        }
    };
    stream.write_all(request.as_bytes()).await.expect("sent");
    let head = soon(read_head(&mut stream)).await.to_lowercase();
    assert!(head.starts_with("http/1.1 101"), "{head}");
    assert!(head.contains("connection: upgrade\r\n"), "{head}");
    match kind {
        Kind::WebSocket => assert!(head.contains("upgrade: websocket") && head.contains("sec-websocket-accept: a")),
        Kind::Forward => assert!(head.contains("upgrade: tcp")),
    }
    stream
}

/// The guest's side of it: what it answers, together with what it says first.
pub(crate) async fn accept(stream: &mut TcpStream, kind: Kind, first: &str) {
    let head = match kind {
        Kind::WebSocket => {
            let head = read_head(stream).await.to_lowercase();
            assert!(head.contains("connection: upgrade\r\n") && head.contains("upgrade: websocket\r\n"));
            assert!(head.contains("sec-websocket-key: k\r\n"));
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: a\r\n\r\n"
        }
        Kind::Forward => "",
    };
    stream
        .write_all(format!("{head}{first}").as_bytes())
        .await
        .expect("written");
}

async fn read(stream: &mut (impl AsyncReadExt + Unpin), length: usize) -> String {
    let mut bytes = vec![0; length];
    soon(stream.read_exact(&mut bytes)).await.expect("read");
    String::from_utf8(bytes).expect("ASCII")
}

async fn read_rest(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut rest = String::new();
    soon(stream.read_to_string(&mut rest)).await.expect("an orderly end");
    rest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_one_direction_leaves_the_other_as_it_is() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    for kind in Kind::ALL {
        // The caller has said its last first.
        let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| async move {
            accept(&mut stream, kind, "hello").await;
            let (mut reader, mut writer) = stream.split();
            tokio::io::copy(&mut reader, &mut writer).await.expect("echoed");
            writer.write_all(b"and bye").await.expect("written");
            writer.shutdown().await.expect("shut down");
        })
        .await;
        let mut stream = open(&agent, kind, "x", upstream.port).await;
        assert_eq!(read(&mut stream, 5).await, "hello");
        for word in ["one", "two"] {
            stream.write_all(word.as_bytes()).await.expect("sent");
            assert_eq!(read(&mut stream, 3).await, word, "{kind:?}");
        }
        stream.shutdown().await.expect("shut down");
        assert_eq!(read_rest(&mut stream).await, "and bye", "{kind:?}");

        // The guest has.
        let (heard, hears) = tokio::sync::mpsc::unbounded_channel();
        let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| {
            let heard = heard.clone();
            async move {
                accept(&mut stream, kind, "that is all").await;
                stream.shutdown().await.expect("shut down");
                heard.send(read_rest(&mut stream).await).expect("awaited");
            }
        })
        .await;
        let mut hears = hears;
        let mut stream = open(&agent, kind, "x", upstream.port).await;
        assert_eq!(read_rest(&mut stream).await, "that is all", "{kind:?}");
        stream.write_all(b"I hear").await.expect("sent");
        stream.flush().await.expect("sent");
        stream.shutdown().await.expect("shut down");
        assert_eq!(soon(hears.recv()).await.expect("heard"), "I hear", "{kind:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_carries_much_both_ways_at_once() {
    const MUCH: usize = 32 << 20;
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    for kind in Kind::ALL {
        let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| async move {
            accept(&mut stream, kind, "").await;
            let (mut reader, mut writer) = stream.split();
            tokio::io::copy(&mut reader, &mut writer).await.expect("echoed");
            writer.shutdown().await.expect("shut down");
        })
        .await;
        let stream = open(&agent, kind, "x", upstream.port).await;
        let (mut reader, mut writer) = tokio::io::split(stream);
        let writes = async {
            for _ in 0..MUCH >> 16 {
                writer.write_all(&[b'x'; 1 << 16]).await.expect("sent");
            }
            writer.shutdown().await.expect("shut down");
        };
        let reads = async {
            tokio::io::copy(&mut reader, &mut tokio::io::sink())
                .await
                .expect("read")
        };
        let ((), read) = soon(async { tokio::join!(writes, reads) }).await;
        assert_eq!(read, MUCH as u64, "{kind:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_upgrade_answers_as_ever() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    let answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno";
    let upstream = Upstream::says(agent.address_of(&sandbox), answer.into()).await;
    let mut request = crate::guests::get(&format!("/proxy/x/{}/", upstream.port));
    let headers = request.headers_mut();
    headers.insert("connection", http::HeaderValue::from_static("upgrade"));
    headers.insert("upgrade", http::HeaderValue::from_static("websocket"));
    let (status, _, body) = crate::guests::whole(agent.send(request).await).await;
    assert_eq!((status, body.as_deref()), (StatusCode::FORBIDDEN, Some(&b"no"[..])));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_side_that_breaks_ends_the_other() {
    let agent = Agent::start().await;
    let sandbox = agent.create("x", 0).await;
    for kind in Kind::ALL {
        let upstream = Upstream::start(agent.address_of(&sandbox), move |mut stream| async move {
            accept(&mut stream, kind, "hello").await;
            let mut rest = Vec::new();
            // Reset, or ended: it has gone.
            drop(stream.read_to_end(&mut rest).await);
        })
        .await;
        let mut stream = open(&agent, kind, "x", upstream.port).await;
        assert_eq!(read(&mut stream, 5).await, "hello");
        // Without a word of TLS.
        drop(stream);
        crate::guests::until(async || upstream.ended() == 1).await;
    }
}

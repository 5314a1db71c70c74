//! TLS: the name stands in the first message, which is read and passed on with all that follows it.

use std::io;

use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{HEAD_LIMIT, Refusal, Way, address_of};
use crate::proxy::tunnel;

/// Most bytes of a first message, records' heads among them: with keys of every kind it has two thousand.
const MAX_HELLO: usize = 32 << 10;
/// The port of servers.
const PORT: u16 = 443;
/// What a client is told that asks for a name which leads nowhere: a fatal alert, `unrecognized_name`.
const UNRECOGNIZED: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// Serves a connection to its end.
pub(super) async fn serve(mut stream: TcpStream, way: Way) {
    let hello = tokio::time::timeout(HEAD_LIMIT, hello(&mut stream)).await;
    let (name, seen) = match hello.unwrap_or(Err(Refusal::Unreadable("its first message did not come in time"))) {
        Ok(hello) => hello,
        Err(refusal) => return way.refuse("", &refusal),
    };
    let Ok(mut server) = way.follow(&name, PORT).await else {
        // It may have gone.
        drop(stream.write_all(&UNRECOGNIZED).await);
        return;
    };
    let address = address_of(&server);
    let pass_on = async {
        server.write_all(&seen).await?;
        tunnel::relay(stream, server, || (), std::future::pending()).await
    };
    tokio::select! {
        biased;
        () = way.ends(&name, address) => {}
        // How it ended is between the two.
        outcome = pass_on => drop::<io::Result<()>>(outcome),
    }
}

/// The name that a client asks for, and all that it has sent so far.
pub(super) async fn hello(stream: &mut (impl AsyncRead + Unpin)) -> Result<(String, Vec<u8>), Refusal> {
    let (mut acceptor, mut seen) = (Acceptor::default(), Vec::new());
    let mut piece = [0; 4096];
    loop {
        let read = match stream.read(&mut piece).await {
            Ok(0) | Err(_) => return Err(Refusal::Unreadable("it ended before its first message did")),
            Ok(read) => read,
        };
        let mut piece = &piece[..read];
        seen.extend_from_slice(piece);
        if seen.len() > MAX_HELLO {
            return Err(Refusal::Unreadable("its first message is too long"));
        }
        while !piece.is_empty() {
            if !matches!(acceptor.read_tls(&mut piece), Ok(taken) if taken > 0) {
                return Err(Refusal::Unreadable("it speaks no TLS"));
            }
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let hello = accepted.client_hello();
                    let name = hello.server_name();
                    let name = name.ok_or(Refusal::Unreadable("its first message names no server"))?;
                    return Ok((name.to_owned(), seen));
                }
                Err(_) => return Err(Refusal::Unreadable("it speaks no TLS")),
            }
        }
    }
}

//! One connection to a port of a guest: dialled, used for one request after another, and closed by being dropped.
//!
//! The guest is hostile: its heads are bounded in size and number, its bodies pass through and are held nowhere. How long it takes for an
//! answer is its caller's to bound, who goes away when it has waited enough: an application may rightly take minutes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::Body;
use super::connections::Socket;
use super::error::ProxyError;

/// Pauses between attempts to connect: an application that was just started may not listen yet.
const DIAL_PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_millis(200)];
/// How long one attempt may take: the kernel sends a first packet that was lost again after a second.
const DIAL_LIMIT: Duration = Duration::from_secs(3);
/// Largest head of an answer.
const MAX_HEAD: usize = 64 << 10;
/// Most headers in one.
const MAX_HEADERS: usize = 128;
/// How long a connection may take to be ready again after an answer, before it is closed instead.
const READY_LIMIT: Duration = Duration::from_secs(5);

/// Connects.
///
/// # Errors
/// [`ProxyError::Dial`] of the last attempt.
pub(super) async fn dial(address: SocketAddr) -> Result<TcpStream, ProxyError> {
    let mut pauses = DIAL_PAUSES.into_iter();
    loop {
        let outcome = tokio::time::timeout(DIAL_LIMIT, TcpStream::connect(address)).await;
        let source = match outcome.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
            Ok(stream) => {
                // Best effort: it is slower without.
                drop(stream.set_nodelay(true));
                return Ok(stream);
            }
            Err(source) => source,
        };
        let Some(pause) = pauses.next() else {
            let port = address.port();
            return Err(ProxyError::Dial { port, source });
        };
        tokio::time::sleep(pause).await;
    }
}

/// A connection that speaks HTTP/1.1. Dropping it closes it.
#[derive(Debug)]
pub(super) struct Upstream {
    sender: SendRequest<Body>,
    was_cut: Arc<AtomicBool>,
    /// Of whatever becomes of the connection: it outlives it as a tunnel.
    socket: Arc<Socket>,
    _open: oneshot::Sender<()>,
}

impl Upstream {
    /// Speaks HTTP/1.1 on a connection, until that is dropped or `over` ends.
    pub(super) async fn new(
        stream: TcpStream,
        socket: Socket,
        over: impl Future<Output = ()> + Send + 'static,
    ) -> hyper::Result<Self> {
        let mut client = http1::Builder::new();
        client.max_headers(MAX_HEADERS).max_buf_size(MAX_HEAD);
        let (sender, connection) = client.handshake(TokioIo::new(stream)).await?;
        let (open, closed) = oneshot::channel::<()>();
        let (was_cut, socket) = (Arc::new(AtomicBool::new(false)), Arc::new(socket));
        let (cut, counted) = (was_cut.clone(), socket.clone());
        tokio::spawn(async move {
            let connection = connection.with_upgrades();
            tokio::pin!(connection);
            tokio::select! {
                biased;
                // Before it is dropped, so that who waits for an answer knows why there is none.
                () = over => cut.store(true, Ordering::Release),
                // Nothing is ever sent.
                _ = closed => {}
                // How it ended, the request that was under way is told.
                _ = &mut connection => {}
            }
            drop(counted);
        });
        Ok(Self {
            sender,
            was_cut,
            socket,
            _open: open,
        })
    }

    /// Whether it was closed because its time was over.
    pub(super) fn was_cut(&self) -> bool {
        self.was_cut.load(Ordering::Acquire)
    }

    /// Whether it can take a request, as far as anybody knows.
    pub(super) fn is_usable(&self) -> bool {
        self.sender.is_ready()
    }

    /// Its socket, for who goes on with it.
    pub(super) fn socket(&self) -> Arc<Socket> {
        self.socket.clone()
    }

    /// Sends a request and waits for the head of its answer.
    pub(super) async fn send(
        &mut self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, TrySendError<Request<Body>>> {
        self.sender.try_send_request(request).await
    }

    /// Waits until it can take another request; whether it can.
    pub(super) async fn becomes_ready(&mut self) -> bool {
        let ready = tokio::time::timeout(READY_LIMIT, self.sender.ready());
        matches!(ready.await, Ok(Ok(())))
    }
}

//! What listens in a guest: as a program in it would, or as no program should.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::guests::Body;

/// A port at which something listens.
pub(crate) struct Upstream {
    pub(crate) port: u16,
    /// Connections that came, and that have ended.
    came: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
}

impl Upstream {
    /// Does this with each connection.
    pub(crate) async fn start<F, W>(address: IpAddr, work: W) -> Self
    where
        F: Future<Output = ()> + Send,
        W: Fn(TcpStream) -> F + Clone + Send + Sync + 'static,
    {
        let listener = TcpListener::bind(SocketAddr::new(address, 0)).await.expect("bound");
        let port = listener.local_addr().expect("an address").port();
        let (came, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (coming, ending) = (came.clone(), ended.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                coming.fetch_add(1, Ordering::AcqRel);
                let (work, ending) = (work.clone(), ending.clone());
                tokio::spawn(async move {
                    work(stream).await;
                    ending.fetch_add(1, Ordering::AcqRel);
                });
            }
        });
        Self { port, came, ended }
    }

    /// Answers requests as a program would.
    pub(crate) async fn http<F, W>(address: IpAddr, answer: W) -> Self
    where
        F: Future<Output = Response<Body>> + Send,
        W: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    {
        Self::start(address, move |stream| {
            let answer = answer.clone();
            async move {
                let service = service_fn(move |request| {
                    let answer = answer(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let server = hyper::server::conn::http1::Builder::new();
                // How it ends is for its other end to say.
                drop(server.serve_connection(TokioIo::new(stream), service).await);
            }
        })
        .await
    }

    /// Reads a head, and writes these bytes, then closes.
    pub(crate) async fn says(address: IpAddr, bytes: Vec<u8>) -> Self {
        let bytes = Arc::new(bytes);
        Self::start(address, move |mut stream| {
            let bytes = bytes.clone();
            async move {
                read_head(&mut stream).await;
                // The other end may not want to hear all of it.
                drop(stream.write_all(&bytes).await);
                drop(stream.shutdown().await);
            }
        })
        .await
    }

    pub(crate) fn came(&self) -> usize {
        self.came.load(Ordering::Acquire)
    }

    pub(crate) fn ended(&self) -> usize {
        self.ended.load(Ordering::Acquire)
    }
}

/// Reads a head to its end, byte for byte.
pub(crate) async fn read_head<S: AsyncReadExt + Unpin>(stream: &mut S) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(head).expect("ASCII")
}

/// Reads until the other end has closed, one way or another.
pub(crate) async fn read_to_close(stream: &mut TcpStream) {
    let mut piece = vec![0; 64 << 10];
    while matches!(stream.read(&mut piece).await, Ok(1..)) {}
}

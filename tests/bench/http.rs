//! HTTP/1.1 over a connection that is kept: to the agent over TLS, to envd in the clear, to a VMM over a Unix socket. What is measured is the
//! other end, so this does no more than it must.

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use roost_tests::eventually;
use roost_tests::roost::{PKI, enveloped};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

/// Longest silence of the other end.
const PATIENCE: Duration = Duration::from_secs(400);

/// How long one attempt to connect may take.
const CONNECT_LIMIT: Duration = Duration::from_millis(100);

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A connection.
pub(crate) struct Http {
    stream: BufReader<Box<dyn Stream>>,
    /// Lines of every request, each with its end.
    headers: String,
}

impl Http {
    /// The agent's API.
    pub(crate) fn agent() -> Self {
        Self::tls("127.0.0.1:50051")
    }

    /// Who has the agent's certificate, at an address.
    pub(crate) fn tls(address: &str) -> Self {
        let file = |name: &str| format!("{PKI}/{name}");
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(file("ca.pem")).expect("a CA") {
            roots.add(certificate.expect("a certificate")).expect("a root");
        }
        let chain = CertificateDer::pem_file_iter(file("client.pem")).expect("certificates");
        let chain = chain.collect::<Result<Vec<_>, _>>().expect("certificates");
        let key = PrivateKeyDer::from_pem_file(file("client-key.pem")).expect("a key");
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring has them")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .expect("a client's certificate");
        let name = "127.0.0.1".try_into().expect("an address");
        let tls = ClientConnection::new(Arc::new(config), name).expect("a client");
        Self::over(StreamOwned::new(tls, eventually("a connection", || tcp(address).ok())))
    }

    /// A server at an address, in the clear.
    pub(crate) fn plain(address: impl ToSocketAddrs) -> io::Result<Self> {
        tcp(address).map(Self::over)
    }

    /// A server at a Unix socket.
    pub(crate) fn unix(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self::over(stream))
    }

    fn over(stream: impl Read + Write + Send + 'static) -> Self {
        Self {
            stream: BufReader::with_capacity(64 << 10, Box::new(stream)),
            headers: "Host: bench\r\n".to_owned(),
        }
    }

    /// Sends a header with every request from now on.
    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers += &format!("{name}: {value}\r\n");
        self
    }

    /// A request; status and body of its answer.
    pub(crate) fn call(&mut self, method: &str, path: &str, kind: &str, body: &[u8]) -> io::Result<(u16, Vec<u8>)> {
        let mut answer = Vec::new();
        let status = self.stream(method, path, kind, body, |piece| answer.extend_from_slice(piece))?;
        Ok((status, answer))
    }

    /// As [`call`](Self::call); the body as it comes.
    pub(crate) fn stream(
        &mut self,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
        mut piece: impl FnMut(&[u8]),
    ) -> io::Result<u16> {
        let mut request = format!(
            "{method} {path} HTTP/1.1\r\n{}Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            self.headers,
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        let to = self.stream.get_mut();
        to.write_all(&request)?;
        to.flush()?;
        let status = self.line()?;
        let status = status.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status: u16 = status.ok_or(io::ErrorKind::InvalidData)?;
        let (mut length, mut chunked) = (0, false);
        loop {
            let line = self.line()?.to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?;
            }
            chunked |= line.starts_with("transfer-encoding:") && line.contains("chunked");
        }
        if !chunked {
            self.pass_on(length, &mut piece)?;
            return Ok(status);
        }
        loop {
            let size = usize::from_str_radix(&self.line()?, 16).map_err(|_| io::ErrorKind::InvalidData)?;
            self.pass_on(size, &mut piece)?;
            self.line()?;
            if size == 0 {
                return Ok(status);
            }
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }

    fn pass_on(&mut self, mut left: usize, piece: &mut impl FnMut(&[u8])) -> io::Result<()> {
        while left > 0 {
            let there = self.stream.fill_buf()?;
            if there.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let taken = there.len().min(left);
            piece(&there[..taken]);
            self.stream.consume(taken);
            left -= taken;
        }
        Ok(())
    }

    /// A call of `hostagent.v1` that must succeed.
    pub(crate) fn ask(&mut self, procedure: &str, request: &Value) -> Value {
        let path = format!("/hostagent.v1.HostAgentService/{procedure}");
        let (status, body) = self
            .call("POST", &path, "application/json", request.to_string().as_bytes())
            .expect("an answer");
        assert_eq!(status, 200, "{procedure}: {}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).expect("JSON")
    }

    /// The bytes of a stream's messages, of a procedure that must be there.
    pub(crate) fn follow(&mut self, path: &str, request: &Value) -> usize {
        let mut bytes = 0;
        let body = enveloped(request);
        let status = self.stream("POST", path, "application/connect+json", &body, |piece| {
            bytes += piece.len()
        });
        assert_eq!(status.expect("an answer"), 200, "{path}");
        bytes
    }
}

fn tcp(address: impl ToSocketAddrs) -> io::Result<TcpStream> {
    let address = address.to_socket_addrs()?.next().ok_or(io::ErrorKind::InvalidInput)?;
    // A guest that boots drops what comes, and TCP asks again after one second, three and seven: whoever waits for it must ask anew.
    let stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

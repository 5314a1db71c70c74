//! HTTPS to one agent: a connection for each call, TLS 1.3, our client certificate. Its errors say what a person can do.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use connectrpc::client::{BoxFuture, ClientBody, ClientConfig, ClientTransport};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::tls::{self, TlsError};
use roost_hostagent::hostagent::v1::HostAgentServiceClient;
use roost_hostagent::roost::v1::RoostServiceClient;

/// A client of the agent's API.
pub(super) type Client = HostAgentServiceClient<Https>;
/// A client of what roost adds to it.
pub(super) type Operator = RoostServiceClient<Https>;

/// Largest answer that is read: an Exec's output, and what JSON or an agent of another configuration may add.
const MAX_ANSWER: usize = 256 << 20;

/// Largest refusal that is read.
const MAX_REFUSAL: usize = 64 << 10;

/// Time for a connection to stand, and again for its handshake.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("{0:?} is no host and port, as in 127.0.0.1:50051")]
    BadHost(String),
    #[error("no client certificate (`roost pki init` makes one on a standalone host)")]
    Certificates(#[source] TlsError),
    #[error("cannot connect to {host}; is roost-agent running there?")]
    Connect {
        host: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{host} is not an agent whose certificate we trust, or does not trust ours")]
    Handshake {
        host: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{0:?} is no sandbox id")]
    BadSandbox(String),
    #[error("refused with status {status}: {message}")]
    Refused { status: StatusCode, message: String },
    #[error("{host} broke the connection off; it may not trust our client certificate")]
    Broken {
        host: String,
        #[source]
        source: hyper::Error,
    },
}

/// The transport.
#[derive(Clone)]
pub(super) struct Https {
    host: String,
    name: ServerName<'static>,
    tls: TlsConnector,
}

/// A client of the agent at `host` with the certificates in `pki`. Connects with each call.
pub(super) fn connect(host: &str, pki: &Path) -> Result<Client, ClientError> {
    channel(host, pki).map(|(https, config)| Client::new(https, config))
}

/// The same for what roost adds.
pub(super) fn connect_operator(host: &str, pki: &Path) -> Result<Operator, ClientError> {
    channel(host, pki).map(|(https, config)| Operator::new(https, config))
}

/// The transport alone, for what is no call.
pub(super) fn connect_plain(host: &str, pki: &Path) -> Result<Https, ClientError> {
    channel(host, pki).map(|(https, _)| https)
}

fn channel(host: &str, pki: &Path) -> Result<(Https, ClientConfig), ClientError> {
    let bad = || ClientError::BadHost(host.to_owned());
    let (name, port) = host.rsplit_once(':').ok_or_else(bad)?;
    port.parse::<u16>().map_err(|_| bad())?;
    let name = name.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(name).map_err(|_| bad())?;
    let tls = tls::client(pki).map_err(ClientError::Certificates)?;
    let base = format!("https://{host}").parse().map_err(|_| bad())?;
    let config = ClientConfig::new(base).with_default_max_message_size(MAX_ANSWER);
    Ok((
        Https {
            host: host.to_owned(),
            name,
            tls: TlsConnector::from(Arc::clone(&tls)),
        },
        config,
    ))
}

impl ClientTransport for Https {
    type ResponseBody = Incoming;
    type Error = ClientError;

    fn send(&self, request: Request<ClientBody>) -> BoxFuture<'static, Result<Response<Incoming>, ClientError>> {
        let transport = self.clone();
        Box::pin(async move { transport.exchange(request).await })
    }
}

impl Https {
    async fn exchange(self, mut request: Request<ClientBody>) -> Result<Response<Incoming>, ClientError> {
        let host = self.host.clone();
        let mut sender = self.open().await?;
        let value = http::HeaderValue::from_str(&host).map_err(|_| ClientError::BadHost(host.clone()))?;
        request.headers_mut().insert(http::header::HOST, value);
        let path = request
            .uri()
            .path()
            .parse()
            .map_err(|_| ClientError::BadHost(host.clone()))?;
        *request.uri_mut() = path;
        let broken = |source| ClientError::Broken { host, source };
        sender.send_request(request).await.map_err(broken)
    }

    /// A connection to the agent that speaks HTTP.
    async fn open<B>(&self) -> Result<hyper::client::conn::http1::SendRequest<B>, ClientError>
    where
        B: hyper::body::Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let host = &self.host;
        let late = |_| std::io::Error::from(std::io::ErrorKind::TimedOut);
        let connected = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(host)).await;
        let stream = connected
            .map_err(late)
            .and_then(|stream| stream)
            .map_err(|source| ClientError::Connect {
                host: host.clone(),
                source,
            })?;
        let shaken = tokio::time::timeout(CONNECT_LIMIT, self.tls.connect(self.name.clone(), stream)).await;
        let stream = shaken
            .map_err(late)
            .and_then(|stream| stream)
            .map_err(|source| ClientError::Handshake {
                host: host.clone(),
                source,
            })?;
        let broken = |source| ClientError::Broken {
            host: host.clone(),
            source,
        };
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        // Its end is told by the answer or by reading its body.
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    /// Bytes both ways to a port of a sandbox.
    pub(super) async fn forward(&self, sandbox: &str, port: u16) -> Result<Upgraded, ClientError> {
        let mut sender = self.open::<Empty<Bytes>>().await?;
        let request = Request::builder()
            .uri(format!("/forward/{sandbox}/{port}"))
            .header(http::header::HOST, &self.host)
            .header(http::header::CONNECTION, "upgrade")
            .header(http::header::UPGRADE, "tcp")
            .body(Empty::new())
            .map_err(|_| ClientError::BadSandbox(sandbox.to_owned()))?;
        let broken = |source| ClientError::Broken {
            host: self.host.clone(),
            source,
        };
        let answer = sender.send_request(request).await.map_err(broken)?;
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            return hyper::upgrade::on(answer).await.map_err(broken);
        }
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_REFUSAL).collect().await;
        let said = body.map(|body| body.to_bytes()).unwrap_or_default();
        let object: Option<serde_json::Value> = serde_json::from_slice(&said).ok();
        let message = object.as_ref().and_then(|object| object.get("message")?.as_str());
        let message = message.unwrap_or("no reason was given").replace(char::is_control, "?");
        Err(ClientError::Refused { status, message })
    }
}

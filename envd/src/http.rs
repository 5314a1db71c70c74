//! The listener: HTTP/1.1 and HTTP/2 without TLS on one port, who may call what, and where each call goes.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use connectrpc::{CompressionPolicy, ConnectRpcBody, ConnectRpcService, Limits, Router};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt as _, Either, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use nix::sys::socket::{self, Backlog};
use roost_common::guest::filesystem::FilesystemExt as _;
use roost_common::guest::process::ProcessExt as _;
use roost_common::guest::{
    ACCESS_TOKEN_HEADER, ENVS_PATH, FILES_COMPOSE_PATH, FILES_PATH, FSFREEZE_PATH, FSTHAW_PATH, HEALTH_PATH, INIT_PATH,
    METRICS_PATH, SNAPSHOT_PREPARE_PATH, VERSION_HEADER,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tower::Service as _;

use crate::connections::Connection;
use crate::console::say;
use crate::files::LongBody;
use crate::filesystem::service::FilesystemService;
use crate::process::service::ProcessService;
use crate::rest::{Rest, RestError};

/// Connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;

/// Connections that wait in the kernel to be accepted. With the 128 that the library asks for, a busy guest resets some of those that are
/// opened at once.
const BACKLOG: i32 = 1024;

/// How long a connection may be idle between requests: longer than the proxies in front of it keep theirs, so that none
/// of them sends a request into a closing connection.
const IDLE: Duration = Duration::from_secs(640);

/// HTTP/2 calls on one connection, and the room for their headers.
const MAX_STREAMS: u32 = 256;
const MAX_HEADERS: u32 = 64 * 1024;

/// Most bytes of one Connect message, or of the body of a call with one message.
const MAX_MESSAGE: usize = 4 << 20;

/// All that a connection needs to answer.
pub(crate) struct Server {
    rest: Rest,
    rpc: ConnectRpcService,
}

type Body = Either<LongBody, ConnectRpcBody>;

impl Server {
    pub(crate) fn new(rest: Rest, processes: ProcessService, filesystem: FilesystemService) -> Self {
        let limits = Limits::default()
            .with_max_message_size(MAX_MESSAGE)
            .with_max_request_body_size(MAX_MESSAGE);
        let router = Arc::new(filesystem).register(Arc::new(processes).register(Router::new()));
        let rpc = ConnectRpcService::new(router)
            .with_limits(limits)
            // The host is one hop away: compressing output would only take processor time from the guest.
            .with_compression_policy(CompressionPolicy::disabled());
        Self { rest, rpc }
    }

    /// Serves for as long as the runtime lives.
    pub(crate) async fn serve(self, listener: TcpListener) {
        let backlog = Backlog::new(BACKLOG).and_then(|backlog| socket::listen(&listener, backlog));
        if let Err(error) = backlog {
            say!("few connections can wait at a time: {error}");
        }
        let server = Arc::new(self);
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let permit = Arc::clone(&room)
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            match listener.accept().await {
                Ok((stream, _)) => {
                    // Here, so that what is accepted before a preparation is also seen as older than it.
                    let view = server.rest.guest.connections.open();
                    let server = Arc::clone(&server);
                    tokio::spawn(async move {
                        server.connection(stream, view).await;
                        drop(permit);
                    });
                }
                Err(error) => recover(&error).await,
            }
        }
    }

    /// Errors end the connection and are the client's to notice.
    async fn connection(self: Arc<Self>, stream: TcpStream, view: Connection) {
        // Small answers should not wait for more; where it fails the connection is gone.
        stream.set_nodelay(true).ok();
        let mut builder = Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(IDLE)
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADERS);
        let service = service_fn({
            let view = view.clone();
            move |request| {
                let (server, view) = (Arc::clone(&self), view.clone());
                async move { Ok::<_, Infallible>(server.answer(request, &view).await) }
            }
        });
        // The first bytes decide which protocol it is; a client that never sends any is not waited for.
        tokio::select! {
            biased;
            first = tokio::time::timeout(IDLE, stream.readable()) => if !matches!(first, Ok(Ok(()))) { return },
            () = view.closing() => return,
        }
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        tokio::select! {
            _ = connection.as_mut() => return,
            () = view.closing() => connection.as_mut().graceful_shutdown(),
        }
        tokio::select! {
            _ = connection => {}
            () = view.cut() => {}
        }
    }

    async fn answer(&self, request: Request<Incoming>, view: &Connection) -> Response<Body> {
        let version = request.version();
        let mut response = match self.route(request).await {
            Ok(response) => response,
            Err(refusal) => short(refusal.into_response()),
        };
        allow_browsers(response.headers_mut());
        // HTTP/2 has a frame for it, which the graceful shutdown sends.
        if view.is_closing() && version < Version::HTTP_2 {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }

    async fn route(&self, request: Request<Incoming>) -> Result<Response<Body>, RestError> {
        let rest = &self.rest;
        let path = request.uri().path();
        let only = |method: Method| {
            if request.method() == method {
                Ok(())
            } else {
                Err(RestError::Method)
            }
        };
        if request.method() == Method::OPTIONS {
            return Ok(short(preflight()));
        }
        if path == HEALTH_PATH {
            only(Method::GET)?;
            return rest.health().map(short);
        }
        rest.ready()?;
        if path == INIT_PATH {
            only(Method::POST)?;
            let (parts, body) = request.into_parts();
            return rest.init(&parts.headers, body).await.map(short);
        }
        // These look at the token themselves: a signature may stand in for it.
        if path == FILES_PATH {
            let (parts, body) = request.into_parts();
            return match parts.method {
                Method::GET | Method::HEAD => Ok(rest.download(&parts).await?.map(Either::Left)),
                Method::POST => rest.upload(&parts, body).await.map(short),
                _ => Err(RestError::Method),
            };
        }
        let token = request.headers().get(ACCESS_TOKEN_HEADER).map(HeaderValue::as_bytes);
        if !rest.guest.admits(token) {
            return Err(RestError::Token);
        }
        match path {
            METRICS_PATH => only(Method::GET).and_then(|()| rest.metrics()).map(short),
            ENVS_PATH => only(Method::GET).and_then(|()| rest.envs()).map(short),
            FILES_COMPOSE_PATH => {
                only(Method::POST)?;
                rest.compose(request.into_body()).await.map(short)
            }
            SNAPSHOT_PREPARE_PATH => {
                only(Method::POST)?;
                rest.prepare().await.map(short)
            }
            FSFREEZE_PATH => {
                only(Method::POST)?;
                rest.freeze().await.map(short)
            }
            FSTHAW_PATH => {
                only(Method::POST)?;
                rest.thaw().await.map(short)
            }
            "/freeze" | "/unfreeze" => Err(RestError::Unimplemented(
                "stop programs alone; /fsfreeze and /fsthaw stop them with the filesystems",
            )),
            "/upgrade" => Err(RestError::Unimplemented(
                "replace itself; a new one comes with a new template",
            )),
            path if is_procedure(path) => match self.rpc.clone().call(request).await {
                Ok(response) => Ok(response.map(Either::Right)),
                Err(never) => match never {},
            },
            _ => Err(RestError::NotFound),
        }
    }
}

/// An answer that is here as a whole.
fn short(response: Response<Full<Bytes>>) -> Response<Body> {
    response.map(|body| Either::Left(body.map_err(|never| match never {}).boxed_unsync()))
}

/// Whether a path has the form `/package.Service/Procedure`: those that we lack are the Connect layer's to refuse.
fn is_procedure(path: &str) -> bool {
    let parts = path.strip_prefix('/').and_then(|path| path.split_once('/'));
    parts.is_some_and(|(service, procedure)| service.contains('.') && !procedure.contains('/'))
}

/// Connections that broke before they were accepted are nothing to us. Without descriptors or memory, the connections
/// that end give some back: wait for that rather than spin.
async fn recover(error: &io::Error) {
    if matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    ) {
        say!("cannot accept connections: {error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Pages of any origin may call: what protects the sandbox is the token, not where a page came from.
fn allow_browsers(headers: &mut HeaderMap) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("*"));
    headers.insert(
        HeaderName::from_static(VERSION_HEADER),
        HeaderValue::from_static(crate::rest::VERSION),
    );
}

fn preflight() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET, HEAD, POST, OPTIONS"),
    );
    // `*` does not cover Authorization.
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("*, Authorization"),
    );
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("7200"));
    response
}

//! A guest, as far as its envd can be reached. The guest is hostile: every answer is bounded in size and time, and nothing it says is
//! trusted beyond being handed to the caller who owns it.
//!
//! Here are health, init, and what comes before a snapshot; [`process`] has its processes, [`files`] its files.

pub mod files;
pub mod process;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use connectrpc::client::{ClientConfig, HttpClient};
use connectrpc::{ConnectError, ErrorCode};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use roost_common::guest::filesystem::FilesystemClient;
use roost_common::guest::process::ProcessClient;
use roost_common::guest::{
    ACCESS_TOKEN_HEADER, FSFREEZE_PATH, FSTHAW_PATH, HEALTH_PATH, HELD_HEADER, Held, INIT_PATH, InitRequest,
    METRICS_PATH, Metrics, NONCE_HEADER, PORT, SNAPSHOT_PREPARE_PATH, VERSION_HEADER,
};
use roost_common::ids::{SandboxId, Slot};
use roost_common::net::HOST_NET;
use tokio::net::TcpStream;

use crate::errors::Chain;
use crate::failpoint;
use crate::host::consoles::Console;
use crate::proxy::Connections;

/// Pause between two attempts to reach an envd that is not up yet, and has not been heard of either.
const PROBE_PAUSE: Duration = Duration::from_millis(50);
/// Pause between two attempts in any case: a guest may write to its console all the time.
const LEAST_PROBE_PAUSE: Duration = Duration::from_millis(2);
/// How long one attempt to reach an envd that is not up yet may take to connect: a guest without a network drops the first packet,
/// and a retransmission would come a second later.
const PROBE_LIMIT: Duration = Duration::from_millis(250);
/// How long it may take to connect to one that has been reached: the first packets may be lost on a busy host.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to connect for a command, whose caller waits as long as that takes: the kernel sends a first packet again
/// after 1, 3, 7 and 15 seconds, and a guest that has much to do may lose some.
const COMMAND_CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// How long envd may take to answer a connection that stands.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long an `/init` may take to be answered for its time to be good: the guest sets its clock at some moment of the exchange, and is
/// behind by what has passed until then. envd leaves a clock alone that is off by less than as much again.
const CLOCK_ACCURACY: Duration = Duration::from_millis(50);
/// How often the time is told at most until that was quick enough.
const CLOCK_ATTEMPTS: u32 = 5;
/// How long it may take to connect to envd to tell it the time once more, and how long envd may take to answer that.
const CLOCK_LIMIT: Duration = Duration::from_secs(1);
/// How long envd may take to make ready for a snapshot, which is best effort: it writes out what is dirty.
const PREPARE_LIMIT: Duration = Duration::from_secs(3);
/// How long envd may take to freeze or thaw: the kernel writes out what is dirty first.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);
/// How long envd may take to say what it uses: one that is slower has what it said before.
const METRICS_LIMIT: Duration = Duration::from_secs(2);
/// Largest answer to a plain HTTP call that is read.
const MAX_ANSWER: usize = 64 << 10;
/// Largest message of a stream; envd's chunks are 32 KiB.
const MAX_MESSAGE: usize = 1 << 20;
/// Letters of a guest's error message that are passed on.
const MAX_MESSAGE_TEXT: usize = 400;
/// Why a call of a guest has no result.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// envd did not come up in time.
    #[error("the guest did not answer within {}s", .0.as_secs())]
    NotUp(Duration),
    /// A plain HTTP call failed.
    #[error("the guest's envd did not answer {path}")]
    Http {
        /// The call.
        path: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// envd refused a plain HTTP call.
    #[error("the guest's envd answered {path} with status {status}: {body}")]
    Refused {
        /// The call.
        path: &'static str,
        /// The status.
        status: StatusCode,
        /// The beginning of the body, escaped.
        body: String,
    },
    /// Its process service cannot be reached, or the connection broke.
    #[error("the guest's envd cannot be reached")]
    Unreachable(#[source] Arc<dyn std::error::Error + Send + Sync>),
    /// A call of its process service failed: also what the caller got wrong, such as a missing program.
    #[error("the guest refused the command: {message}")]
    Process {
        /// The guest's code.
        code: ErrorCode,
        /// The guest's words, escaped and cut short.
        message: String,
    },
    /// There is no such process.
    #[error("{0}")]
    NoProcess(String),
    /// A call about files failed: also what the caller got wrong, such as a missing file.
    #[error("the guest refused: {message}")]
    File {
        /// What kind of refusal.
        code: ErrorCode,
        /// The guest's words, escaped and cut short.
        message: String,
    },
    /// The file is larger than a call can return.
    #[error("the file has more than {0} bytes; stream it")]
    TooLarge(usize),
    /// The bytes of a file broke off on the caller's side; the file is as it was.
    #[error("what was to be written broke off")]
    Aborted,
    /// The command did not end in time; it has been killed.
    #[error("the command did not end within {} s and was killed", .0.as_secs())]
    TimedOut(Duration),
    /// The command wrote more than a call can return; it has been killed.
    #[error("the command wrote more than {0} bytes and was killed; redirect its output to a file, or stream it")]
    TooMuchOutput(u64),
    /// The stream of a command broke off.
    #[error("the guest's answer {0}")]
    BadStream(&'static str),
    /// envd repeated another nonce than the one it was sent: this is an answer to something else.
    #[error("the guest's envd acknowledged something else than what it was told")]
    WrongNonce,
    /// envd repeated none, though it has before: nothing says that it has taken in what it was told.
    #[error("the guest's envd did not acknowledge what it was told")]
    NoNonce,
}

/// Where guests are reached from this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestNet {
    /// The address of slot n is n more than this.
    pub base: Ipv4Addr,
    /// envd's.
    pub port: u16,
}

/// The network plan's.
impl Default for GuestNet {
    fn default() -> Self {
        Self {
            base: HOST_NET.0,
            port: PORT,
        }
    }
}

impl GuestNet {
    /// Where the guest in a slot is reached.
    pub fn address_of(self, slot: Slot) -> SocketAddr {
        let address = Ipv4Addr::from_bits(self.base.to_bits() + u32::from(slot));
        SocketAddr::from((address, self.port))
    }
}

/// What envd asks of callers, known to nobody but the agent. Not shown in logs.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// A new one.
    pub fn random() -> Self {
        Self(crate::sandbox::build::random_hex())
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(...)")
    }
}

/// Whether a guest's filesystems are frozen, and its programs have stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Freeze {
    /// They are, and all programs have stopped: nothing of the guest's runs before it is told who it is.
    Held,
    /// They are: nothing of the guest's is written until they are thawed.
    Frozen,
    /// This envd knows nothing of it.
    Unknown,
}

/// Whether an envd repeats the nonce that `/init` sends it, once it has taken in the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nonces {
    /// It has, so it is asked for.
    Repeated,
    /// It knows nothing of them, as far as anybody knows.
    #[default]
    Unknown,
}

/// What a guest is told at the start.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The sandbox.
    pub sandbox: SandboxId,
    /// Its template, as text.
    pub template: String,
    /// Runs commands of calls that name no user; unset: envd's choice.
    pub user: Option<String>,
    /// Environment of all commands.
    pub env: BTreeMap<String, String>,
    /// Resolvers.
    pub resolvers: Vec<Ipv4Addr>,
    /// Random bytes for the guest's pool.
    pub entropy: Vec<u8>,
    /// New with every boot and restore.
    pub lifecycle: String,
}

/// One incarnation of a guest. The token is set by [`Guest::init`] and known to nobody else.
pub struct Guest {
    address: SocketAddr,
    token: Token,
    process: ProcessClient<HttpClient>,
    filesystem: FilesystemClient<HttpClient>,
    connections: Connections,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Guest {
    /// The guest behind an address. Connects to nothing yet.
    pub fn new(address: SocketAddr, token: Token) -> Self {
        let base = format!("http://{address}").parse().expect("an address is an authority");
        let config = ClientConfig::new(base)
            .with_default_max_message_size(MAX_MESSAGE)
            .with_default_header(ACCESS_TOKEN_HEADER, token.0.as_str());
        let transport = HttpClient::builder()
            .tcp_connect_timeout(COMMAND_CONNECT_LIMIT)
            .plaintext();
        Self {
            address,
            process: ProcessClient::new(transport.clone(), config.clone()),
            filesystem: FilesystemClient::new(transport, config.with_default_max_message_size(files::MAX_LISTING)),
            token,
            connections: Connections::default(),
        }
    }

    /// Where its envd is reached, and at other ports what else listens in it.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What is proxied to it, which ends with it.
    pub(crate) fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Waits until envd answers, at most `limit`; its version.
    ///
    /// # Errors
    /// [`GuestError::NotUp`].
    pub async fn wait_until_up(&self, limit: Duration, console: &Console) -> Result<String, GuestError> {
        let attempts = async {
            loop {
                match self.health().await {
                    Ok(version) => return version,
                    Err(error) => {
                        tracing::trace!(error = %Chain(&error), "envd is not up yet");
                        tokio::time::sleep(LEAST_PROBE_PAUSE).await;
                        // An envd that is up says so there.
                        drop(tokio::time::timeout(PROBE_PAUSE, console.written()).await);
                    }
                }
            }
        };
        tokio::time::timeout(limit, attempts)
            .await
            .map_err(|_| GuestError::NotUp(limit))
    }

    async fn health(&self) -> Result<String, GuestError> {
        let call = Call {
            method: Method::GET,
            path: HEALTH_PATH,
            token: &self.token,
            connect_limit: PROBE_LIMIT,
        };
        let answer = self.exchange(call, Vec::new, ANSWER_LIMIT).await?;
        let header = answer
            .headers()
            .get(VERSION_HEADER)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let version = header.or_else(|| {
            let health: roost_common::guest::Health = serde_json::from_slice(answer.body()).ok()?;
            health.version
        });
        Ok(version
            .unwrap_or_default()
            .chars()
            .filter(char::is_ascii_graphic)
            .take(64)
            .collect())
    }

    /// Tells envd who it is, and waits until it has taken that in: its clock, its entropy, its identity. An envd that knows of
    /// nonces repeats the one it was sent, and has read from its disk before; whether this one does. `known` is the token that it asks
    /// for where that is not ours yet, as in a clone; `nonces`, whether it has repeated one before: the same envd, woken, does so
    /// again. A guest that takes its time is told the time once more.
    ///
    /// # Errors
    /// [`GuestError::Http`], [`GuestError::Refused`], [`GuestError::WrongNonce`], [`GuestError::NoNonce`].
    pub async fn init(&self, known: Option<&Token>, identity: Identity, nonces: Nonces) -> Result<Nonces, GuestError> {
        let nonce = crate::sandbox::build::random_hex();
        let (sandbox, lifecycle) = (identity.sandbox, identity.lifecycle);
        let request = InitRequest {
            env_vars: Some(identity.env),
            access_token: Some(self.token.0.clone()),
            default_user: identity.user,
            lifecycle_id: Some(lifecycle.clone()),
            sandbox_id: Some(sandbox.to_string()),
            template_id: Some(identity.template),
            entropy: identity.entropy,
            dns: Some(identity.resolvers.into_iter().map(IpAddr::V4).collect()),
            nonce: Some(nonce.clone()),
            ..InitRequest::default()
        };
        let call = Call {
            method: Method::POST,
            path: INIT_PATH,
            token: known.unwrap_or(&self.token),
            connect_limit: CONNECT_LIMIT,
        };
        let (answer, took) = self.init_now(call, request, ANSWER_LIMIT).await?;
        let nonces = match answer.headers().get(NONCE_HEADER) {
            Some(repeated) if repeated.as_bytes() != nonce.as_bytes() => return Err(GuestError::WrongNonce),
            Some(_) => Nonces::Repeated,
            None if nonces == Nonces::Repeated => return Err(GuestError::NoNonce),
            None => Nonces::Unknown,
        };
        self.set_clock(&sandbox, &lifecycle, took).await;
        Ok(nonces)
    }

    /// Tells envd the time until that is quick enough; it was told it once, which took `took`. An attempt that comes out worse does no
    /// harm: a clock is only ever set forward by it. Best effort: the guest is up, whatever its clock.
    async fn set_clock(&self, sandbox: &SandboxId, lifecycle: &str, mut took: Duration) {
        for _ in 1..CLOCK_ATTEMPTS {
            if took <= CLOCK_ACCURACY {
                return;
            }
            let request = InitRequest {
                access_token: Some(self.token.0.clone()),
                lifecycle_id: Some(lifecycle.to_owned()),
                ..InitRequest::default()
            };
            let call = Call {
                method: Method::POST,
                path: INIT_PATH,
                token: &self.token,
                connect_limit: CLOCK_LIMIT,
            };
            match self.init_now(call, request, CLOCK_LIMIT).await {
                Ok((_, again)) => took = again,
                // One that is late all the same is older than what envd hears of the next.
                Err(error) => {
                    tracing::debug!(sandbox_id = %sandbox, error = %Chain(&error), "a guest was not told the time")
                }
            }
        }
        if took > CLOCK_ACCURACY {
            tracing::warn!(sandbox_id = %sandbox, elapsed_ms = %took.as_millis(), "a guest's clock may be behind by this");
        }
    }

    /// Sends `/init` with the time at which it is written, once the connection stands; how long the answer took from there on.
    async fn init_now(
        &self,
        call: Call<'_>,
        request: InitRequest,
        limit: Duration,
    ) -> Result<(http::Response<Bytes>, Duration), GuestError> {
        let mut written = Instant::now();
        let body = || {
            written = Instant::now();
            let request = InitRequest {
                timestamp: Some(SystemTime::now()),
                ..request
            };
            serde_json::to_vec(&request).expect("strings serialise")
        };
        let answer = self.exchange(call, body, limit).await?;
        Ok((answer, written.elapsed()))
    }

    /// What the guest says it uses.
    ///
    /// # Errors
    /// [`GuestError::Http`], [`GuestError::Refused`].
    pub async fn metrics(&self) -> Result<Metrics, GuestError> {
        let answer = self.call(Method::GET, METRICS_PATH, METRICS_LIMIT).await?;
        serde_json::from_slice(answer.body()).map_err(|error| GuestError::Http {
            path: METRICS_PATH,
            source: error.into(),
        })
    }

    /// Asks envd to make ready for a snapshot: to write out and drop caches, and to keep no connection open. Best effort, so a
    /// failure is for the log.
    ///
    /// # Errors
    /// [`GuestError::Http`], [`GuestError::Refused`].
    pub async fn prepare(&self) -> Result<(), GuestError> {
        self.call(Method::POST, SNAPSHOT_PREPARE_PATH, PREPARE_LIMIT)
            .await
            .map(drop)
    }

    /// Stops the guest's programs and freezes its filesystems; what is frozen stays so.
    ///
    /// # Errors
    /// [`GuestError::Http`], [`GuestError::Refused`]; whether they are frozen is then unknown.
    pub async fn freeze(&self) -> Result<Freeze, GuestError> {
        match self.call(Method::POST, FSFREEZE_PATH, FREEZE_LIMIT).await {
            Ok(answer) => {
                let word = answer.headers().get(HELD_HEADER).map(http::HeaderValue::as_bytes);
                Ok(match word.and_then(Held::of_word) {
                    Some(Held::All) => Freeze::Held,
                    Some(Held::Some | Held::None) | None => Freeze::Frozen,
                })
            }
            Err(GuestError::Refused { status, .. }) if status == StatusCode::NOT_FOUND => Ok(Freeze::Unknown),
            Err(error) => Err(error),
        }
    }

    /// Thaws the guest's filesystems and lets its programs go on; where none is frozen that is no error, nor where envd knows nothing
    /// of it.
    ///
    /// # Errors
    /// [`GuestError::Http`], [`GuestError::Refused`].
    pub async fn thaw(&self) -> Result<(), GuestError> {
        match self.call(Method::POST, FSTHAW_PATH, FREEZE_LIMIT).await {
            Err(GuestError::Refused { status, .. }) if status == StatusCode::NOT_FOUND => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    async fn call(
        &self,
        method: Method,
        path: &'static str,
        limit: Duration,
    ) -> Result<http::Response<Bytes>, GuestError> {
        let call = Call {
            method,
            path,
            token: &self.token,
            connect_limit: CONNECT_LIMIT,
        };
        self.exchange(call, Vec::new, limit).await
    }

    /// `body` is asked for once the connection stands.
    async fn exchange(
        &self,
        call: Call<'_>,
        body: impl FnOnce() -> Vec<u8>,
        limit: Duration,
    ) -> Result<http::Response<Bytes>, GuestError> {
        let Call {
            method,
            path,
            token,
            connect_limit,
        } = call;
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| GuestError::Http { path, source };
        let stream = tokio::time::timeout(connect_limit, TcpStream::connect(self.address))
            .await
            .map_err(|error| failed(error.into()))?
            .map_err(|error| failed(error.into()))?;
        let exchange = async {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|error| failed(error.into()))?;
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header(http::header::HOST, self.address.to_string())
                .header(http::header::CONTENT_TYPE, "application/json")
                .header(ACCESS_TOKEN_HEADER, &token.0)
                .body(Full::new(Bytes::from(body())))
                .expect("an address and a hexadecimal token are header values");
            let answer = async {
                let answer = sender
                    .send_request(request)
                    .await
                    .map_err(|error| failed(error.into()))?;
                let (head, body) = answer.into_parts();
                let body = Limited::new(body, MAX_ANSWER)
                    .collect()
                    .await
                    .map_err(failed)?
                    .to_bytes();
                Ok(http::Response::from_parts(head, body))
            };
            tokio::pin!(answer);
            tokio::select! {
                outcome = &mut answer => outcome,
                _ = connection => answer.await,
            }
        };
        let answer = tokio::time::timeout(limit, exchange)
            .await
            .map_err(|error| failed(error.into()))??;
        // What a sampler asks is no step of anything.
        if path != METRICS_PATH && failpoint::loses(path) {
            return Err(failed("its answer was lost".into()));
        }
        let (status, body) = (answer.status(), answer.body());
        if status.is_success() {
            Ok(answer)
        } else {
            let body = body[..body.len().min(200)].escape_ascii().to_string();
            Err(GuestError::Refused { path, status, body })
        }
    }
}

/// A plain HTTP call.
struct Call<'a> {
    method: Method,
    path: &'static str,
    token: &'a Token,
    connect_limit: Duration,
}

/// A guest's error: a guest wrote the message, so it is escaped and cut short.
fn refused(error: ConnectError) -> GuestError {
    // Only our side of the connection gives an error a source.
    if let Some(source) = error.source_arc() {
        return GuestError::Unreachable(source);
    }
    GuestError::Process {
        code: error.code,
        message: escaped(&error.message.unwrap_or_default()),
    }
}

/// A guest's words, as they may be shown.
fn escaped(words: &str) -> String {
    let cut: String = words.chars().take(MAX_MESSAGE_TEXT).collect();
    cut.replace(char::is_control, "?")
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// A guest that answers every connection with the same bytes.
    async fn hostile(answer: &'static [u8]) -> Guest {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    // What becomes of this connection is the client's affair.
                    drop(stream.read(&mut request).await);
                    drop(stream.write_all(answer).await);
                });
            }
        });
        Guest::new(address, Token::random())
    }

    #[tokio::test]
    async fn health_takes_any_success_and_bounds_the_version() {
        let guest = hostile(b"HTTP/1.1 204 No Content\r\nX-Envd-Version: 0.5.7\r\n\r\n").await;
        assert_eq!(
            guest
                .wait_until_up(Duration::from_secs(10), &Console::unheard())
                .await
                .expect("up"),
            "0.5.7"
        );
        let guest = hostile(b"HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{\"version\":\"1.2.3\"}").await;
        assert_eq!(
            guest
                .wait_until_up(Duration::from_secs(10), &Console::unheard())
                .await
                .expect("up"),
            "1.2.3"
        );
    }

    #[tokio::test]
    async fn a_guest_that_does_not_come_up_is_given_up() {
        let guest = hostile(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n").await;
        let outcome = guest
            .wait_until_up(Duration::from_millis(200), &Console::unheard())
            .await;
        assert!(matches!(outcome, Err(GuestError::NotUp(_))));
    }

    #[tokio::test]
    async fn a_command_for_a_guest_that_cannot_be_reached_says_why() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        let guest = Guest::new(address, Token::random());
        let outcome = guest.exec("x".into(), Vec::new(), Duration::from_secs(5), 1000).await;
        let error = outcome.expect_err("nobody listens");
        assert!(matches!(error, GuestError::Unreachable(_)), "{error:?}");
        let said = Chain(&error).to_string();
        assert!(said.to_lowercase().contains("refused"), "{said}");
    }

    #[tokio::test]
    async fn endless_and_garbled_answers_are_errors() {
        static ENDLESS: std::sync::LazyLock<Vec<u8>> =
            std::sync::LazyLock::new(|| [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b'x'; 1 << 20]].concat());
        for answer in [
            &ENDLESS[..],
            b"\xff\xfe\x00",
            b"",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        ] {
            let guest = hostile(answer).await;
            assert!(guest.health().await.is_err());
            let outcome = guest.exec("x".into(), Vec::new(), Duration::from_secs(5), 1000).await;
            assert!(outcome.is_err());
        }
    }

    /// What a guest was told by `/init`.
    type Told = std::sync::Mutex<Vec<InitRequest>>;

    /// Reads an `/init`.
    async fn read_init(stream: &mut TcpStream) -> InitRequest {
        let (mut request, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            let read = stream.read(&mut piece).await.expect("read");
            request.extend_from_slice(&piece[..read]);
            let at = request.windows(4).position(|window| window == b"\r\n\r\n");
            if let Some(Ok(body)) = at.map(|at| serde_json::from_slice(&request[at + 4..])) {
                return body;
            }
        }
    }

    /// A guest whose envd takes this long over each `/init` in turn; what it is told, for as long as it is.
    fn slow(listener: TcpListener, delays: Vec<Duration>) -> Arc<Told> {
        let told = Arc::new(Told::default());
        let heard = told.clone();
        tokio::spawn(async move {
            for delay in delays {
                let (mut stream, _) = listener.accept().await.expect("accepted");
                let init = read_init(&mut stream).await;
                let nonce = init.nonce.clone().unwrap_or_default();
                heard.lock().expect("no panic").push(init);
                tokio::time::sleep(delay).await;
                let answer = format!("HTTP/1.1 204 No Content\r\n{NONCE_HEADER}: {nonce}\r\n\r\n");
                // One that came too late is not read.
                drop(stream.write_all(answer.as_bytes()).await);
            }
        });
        told
    }

    fn identity() -> Identity {
        Identity {
            sandbox: "x".parse().expect("an id"),
            template: "t".into(),
            user: None,
            env: BTreeMap::new(),
            resolvers: Vec::new(),
            entropy: vec![7; 8],
            lifecycle: "first".into(),
        }
    }

    #[tokio::test]
    async fn a_guest_that_takes_its_time_is_told_the_time_once_more() {
        let (slowly, late) = (Duration::from_millis(200), CLOCK_LIMIT + Duration::from_millis(200));
        let quickly = [Duration::ZERO; 20];
        // A busy machine may make the quick ones slow as well.
        for (delays, calls) in [
            ([&[slowly][..], &quickly].concat(), 2..=5),
            ([&[slowly, late][..], &quickly].concat(), 3..=5),
            (vec![slowly; 20], 5..=5),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
            let guest = Guest::new(listener.local_addr().expect("an address"), Token::random());
            let told = slow(listener, delays);
            guest
                .init(None, identity(), Nonces::Unknown)
                .await
                .expect("it was told");
            let told = told.lock().expect("no panic");
            assert!(calls.contains(&told.len()), "told {} times", told.len());
            for (number, request) in told.iter().enumerate() {
                assert!(request.timestamp.is_some());
                assert_eq!(request.lifecycle_id.as_deref(), Some("first"));
                assert_eq!(request.access_token.as_deref(), Some(guest.token.0.as_str()));
                // What it is told of itself it is told once.
                let is_first = number == 0;
                assert_eq!(request.sandbox_id.is_some(), is_first);
                assert_eq!(request.nonce.is_some(), is_first);
                assert_eq!(request.env_vars.is_some(), is_first);
                assert_eq!(request.entropy.is_empty(), !is_first);
            }
            let times: Vec<_> = told.iter().map(|request| request.timestamp).collect();
            assert!(times.is_sorted(), "{times:?}");
        }
    }

    #[tokio::test]
    async fn the_time_that_a_guest_is_told_is_that_after_it_could_be_reached() {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
        // One connection may wait. The kernel drops the first packet of the next, and sends it again after a second.
        let listener = socket.listen(0).expect("it listens");
        let address = listener.local_addr().expect("an address");
        let first = TcpStream::connect(address).await.expect("connected");
        let guest = Guest::new(address, Token::random());
        let accepted = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            drop((listener.accept().await.expect("accepted"), first));
            slow(listener, vec![Duration::ZERO; 20])
        };
        let began = SystemTime::now();
        let (told, outcome) = tokio::join!(accepted, guest.init(None, identity(), Nonces::Unknown));
        outcome.expect("it was told");
        let told = told.lock().expect("no panic");
        let time = told[0].timestamp.expect("a time");
        let age = time.duration_since(began).expect("later");
        assert!(
            age >= Duration::from_millis(500),
            "taken after {age:?}, before there was a connection"
        );
    }

    /// An envd that answers `/init` with these headers, of which `%` is the nonce that it was sent.
    async fn acknowledges(headers: &'static str, nonces: Nonces) -> Result<Nonces, GuestError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let guest = Guest::new(listener.local_addr().expect("an address"), Token::random());
        let envd = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let nonce = read_init(&mut stream).await.nonce.expect("a nonce");
            let headers = headers.replace('%', &nonce);
            let answer = format!("HTTP/1.1 204 No Content\r\n{headers}\r\n");
            stream.write_all(answer.as_bytes()).await.expect("answered");
        });
        let outcome = guest.init(None, identity(), nonces).await;
        envd.await.expect("no panic");
        outcome
    }

    #[tokio::test]
    async fn an_envd_that_has_repeated_a_nonce_must_do_so_again_and_no_other_one() {
        let right = format!("{NONCE_HEADER}: %\r\n").leak();
        let wrong = format!("{NONCE_HEADER}: %0\r\n").leak();
        for nonces in [Nonces::Unknown, Nonces::Repeated] {
            assert_eq!(
                acknowledges(right, nonces).await.expect("acknowledged"),
                Nonces::Repeated
            );
            let outcome = acknowledges(wrong, nonces).await;
            assert!(matches!(outcome, Err(GuestError::WrongNonce)), "{outcome:?}");
        }
        assert_eq!(acknowledges("", Nonces::Unknown).await.expect("taken"), Nonces::Unknown);
        let outcome = acknowledges("", Nonces::Repeated).await;
        assert!(matches!(outcome, Err(GuestError::NoNonce)), "{outcome:?}");
    }
}

//! The VMM's REST API, over the Unix socket in a VM's run directory. The other end runs hostile code at worst: every answer is
//! bounded in size and time, and nothing in it is trusted beyond being printed.

pub mod version;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::failpoint;

/// The call that writes a VM to files.
pub const SNAPSHOT: &str = "vm.snapshot";
/// How long one call may take.
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(30);
/// How long a snapshot may take: it writes as much as the guest has memory, at worst to a slow and busy disk.
const SNAPSHOT_LIMIT: Duration = Duration::from_secs(240);
/// How long a restored VM may take until it can be resumed: where it cannot load its memory lazily, it loads it first.
const RESTORE_LIMIT: Duration = Duration::from_secs(240);
/// How long a VM that runs may take to load the rest of its memory.
const LOADING_LIMIT: Duration = Duration::from_secs(120);
/// Pause between two questions whether it has.
const LOADING_PAUSE: Duration = Duration::from_millis(100);
/// What cloud-hypervisor says meanwhile.
const STILL_LOADING: &str = "memory restore is still in progress";
/// Pause between two attempts of what the VMM is not ready for yet.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// Largest answer that is read.
const MAX_ANSWER: usize = 1 << 20;

/// Why a call of the VMM has no result.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The socket cannot be connected to.
    #[error("cannot connect to the VMM at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke or what came is no HTTP.
    #[error("the VMM did not answer {call}")]
    Http {
        /// Which call.
        call: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It took too long.
    #[error("the VMM did not answer {call} in time")]
    Timeout {
        /// Which call.
        call: &'static str,
    },
    /// An answer other than success, or one that does not parse.
    #[error("the VMM answered {call} with status {status}: {body}")]
    Refused {
        /// Which call.
        call: &'static str,
        /// The status.
        status: StatusCode,
        /// The beginning of the body, escaped.
        body: String,
    },
}

/// What a VM is doing, as its VMM says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
pub enum State {
    /// Configured, not booted.
    Created,
    /// Running.
    Running,
    /// Its processors are stopped.
    Paused,
    /// Powered off.
    Shutdown,
}

/// One VMM's API.
#[derive(Debug, Clone)]
pub struct Vmm {
    socket: PathBuf,
}

impl Vmm {
    /// The API at a socket; connects with each call.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.into() }
    }

    /// The VMM's version, as it says, which it does once it has set up its VM: on a host that starts many at once, that takes as long as they do.
    ///
    /// # Errors
    /// Any [`VmmError`]; a timeout after `limit`.
    pub async fn version(&self, limit: Duration) -> Result<String, VmmError> {
        #[derive(serde::Deserialize)]
        struct Ping {
            version: String,
        }
        let ping: Ping = self.ask("vmm.ping", limit).await?;
        Ok(version::printable(&ping.version))
    }

    /// What the VM is doing.
    ///
    /// # Errors
    /// Any [`VmmError`].
    pub async fn state(&self) -> Result<State, VmmError> {
        #[derive(serde::Deserialize)]
        struct Info {
            state: State,
        }
        let info: Info = self.ask("vm.info", CALL_LIMIT).await?;
        Ok(info.state)
    }

    /// Stops the guest's processors.
    ///
    /// # Errors
    /// Any [`VmmError`].
    pub async fn pause(&self) -> Result<(), VmmError> {
        self.call(Method::PUT, "vm.pause", Vec::new(), CALL_LIMIT)
            .await
            .map(drop)
    }

    /// Lets the guest's processors run.
    ///
    /// # Errors
    /// Any [`VmmError`].
    pub async fn resume(&self) -> Result<(), VmmError> {
        self.call(Method::PUT, "vm.resume", Vec::new(), CALL_LIMIT)
            .await
            .map(drop)
    }

    /// Writes a paused VM into `directory`, which is there and empty.
    ///
    /// # Errors
    /// Any [`VmmError`]; what is in the directory then is of no use.
    pub async fn snapshot(&self, directory: &Path) -> Result<(), VmmError> {
        let body = serde_json::json!({ "destination_url": format!("file://{}", directory.display()) });
        self.call(Method::PUT, SNAPSHOT, body.to_string().into_bytes(), SNAPSHOT_LIMIT)
            .await
            .map(drop)
    }

    /// Waits until a VMM that was started to restore has done so: its VM is paused then.
    ///
    /// # Errors
    /// Any [`VmmError`]; its own end is for the caller to notice.
    pub async fn restored(&self) -> Result<(), VmmError> {
        let call = "vm.info";
        let attempts = async {
            loop {
                match self.state().await {
                    Ok(State::Paused) => return Ok(()),
                    // There is no VM yet. A VMM may as well not answer before it has loaded one.
                    Ok(State::Created) | Err(VmmError::Timeout { .. }) => {}
                    Err(VmmError::Refused { status, .. }) if !status.is_success() => {}
                    Ok(state @ (State::Running | State::Shutdown)) => {
                        return Err(VmmError::Refused {
                            call,
                            status: StatusCode::OK,
                            body: format!("{state:?} where a restored VM is paused"),
                        });
                    }
                    Err(error) => return Err(error),
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        };
        tokio::time::timeout(RESTORE_LIMIT, attempts)
            .await
            .map_err(|_| VmmError::Timeout { call })?
    }

    /// Waits until a VM that was restored on demand has all of its memory. A snapshot that is asked of it is refused either way,
    /// because it runs, but first because its memory is still being loaded: no call says so plainly (`vmm/src/lib.rs`, v53).
    ///
    /// # Errors
    /// Any [`VmmError`]; [`VmmError::Timeout`] where it does not get there.
    pub async fn loaded(&self) -> Result<(), VmmError> {
        let call = SNAPSHOT;
        let body = serde_json::json!({ "destination_url": "file:///nonexistent" }).to_string();
        let attempts = async {
            loop {
                let outcome = self
                    .call(Method::PUT, call, body.clone().into_bytes(), CALL_LIMIT)
                    .await;
                match outcome {
                    Err(VmmError::Refused { body, .. }) if body.contains(STILL_LOADING) => {}
                    Ok(_) | Err(VmmError::Refused { .. }) => return Ok(()),
                    Err(error) => return Err(error),
                }
                tokio::time::sleep(LOADING_PAUSE).await;
            }
        };
        tokio::time::timeout(LOADING_LIMIT, attempts)
            .await
            .map_err(|_| VmmError::Timeout { call })?
    }

    /// Asks for something in JSON.
    async fn ask<T: serde::de::DeserializeOwned>(&self, call: &'static str, limit: Duration) -> Result<T, VmmError> {
        let body = self.call(Method::GET, call, Vec::new(), limit).await?;
        serde_json::from_slice(&body).map_err(|_| VmmError::Refused {
            call,
            status: StatusCode::OK,
            body: shorten(&body),
        })
    }

    async fn call(
        &self,
        method: Method,
        call: &'static str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<Bytes, VmmError> {
        match tokio::time::timeout(limit, self.exchange(method, call, body)).await {
            Ok(Ok(_)) if failpoint::loses(call) => Err(VmmError::Timeout { call }),
            Ok(outcome) => outcome,
            Err(_) => Err(VmmError::Timeout { call }),
        }
    }

    async fn exchange(&self, method: Method, call: &'static str, body: Vec<u8>) -> Result<Bytes, VmmError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| VmmError::Http { call, source };
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| VmmError::Connect {
                path: self.socket.clone(),
                source,
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| failed(error.into()))?;
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1/{call}"))
            .header(http::header::HOST, "localhost")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::<Bytes>::from(body))
            .expect("constant parts");
        let exchange = async {
            let answer = sender
                .send_request(request)
                .await
                .map_err(|error| failed(error.into()))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER)
                .collect()
                .await
                .map_err(failed)?
                .to_bytes();
            if status.is_success() {
                Ok(body)
            } else {
                Err(VmmError::Refused {
                    call,
                    status,
                    body: shorten(&body),
                })
            }
        };
        tokio::pin!(exchange);
        tokio::select! {
            outcome = &mut exchange => outcome,
            // The connection's own end is an error of the exchange, which says more.
            _ = connection => exchange.await,
        }
    }
}

fn shorten(body: &[u8]) -> String {
    body[..body.len().min(200)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    /// Answers one connection with `answer`, then closes or keeps it.
    async fn version_from(answer: &'static [u8]) -> Result<String, VmmError> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("api.sock");
        let listener = UnixListener::bind(&path).expect("bound");
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let mut request = [0; 1024];
            let _read = stream.read(&mut request).await.expect("a request");
            // A client that has seen enough closes early, which is its right.
            drop(stream.write_all(answer).await);
        });
        let outcome = Vmm::new(&path).version(CALL_LIMIT).await;
        server.await.expect("no panic");
        outcome
    }

    #[tokio::test]
    async fn the_version_is_what_the_vmm_says_without_what_is_not_printable() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 28\r\n\r\n{\"version\":\"v53.0\\u0007\\n<\"}   ";
        assert_eq!(version_from(answer).await.expect("a version"), "v53.0<");
    }

    #[tokio::test]
    async fn memory_has_been_loaded_once_no_refusal_speaks_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("api.sock");
        let listener = UnixListener::bind(&path).expect("bound");
        let server = tokio::spawn(async move {
            let loading = r#"["Error from API","The VM could not be snapshotted","VM on-demand memory restore is still in progress"]"#;
            let running =
                r#"["Error from API","The VM could not be snapshotted","Trying to snapshot while VM is running"]"#;
            for body in [loading, loading, running] {
                let (mut stream, _) = listener.accept().await.expect("accepted");
                let mut request = [0; 1024];
                let _read = stream.read(&mut request).await.expect("a request");
                let answer = format!("HTTP/1.1 500 x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.expect("answered");
            }
        });
        Vmm::new(&path).loaded().await.expect("loaded");
        server.await.expect("all three questions were asked");
    }

    #[tokio::test]
    async fn a_hostile_vmm_is_an_error() {
        for answer in [
            &b""[..],
            b"garbage\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 1\r\n\r\n\x07",
        ] {
            assert!(version_from(answer).await.is_err(), "{}", answer.escape_ascii());
        }
    }

    #[tokio::test]
    async fn an_endless_answer_is_cut_off() {
        static ENDLESS: std::sync::LazyLock<Vec<u8>> =
            std::sync::LazyLock::new(|| [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b' '; 4 << 20]].concat());
        assert!(matches!(version_from(&ENDLESS).await, Err(VmmError::Http { .. })));
    }

    #[tokio::test]
    async fn a_vmm_that_does_not_answer_is_waited_for_as_long_as_is_said() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("api.sock");
        let _mute = UnixListener::bind(&path).expect("bound");
        let limit = Duration::from_millis(20);
        let outcome = Vmm::new(&path).version(limit).await;
        assert!(
            matches!(outcome, Err(VmmError::Timeout { call: "vmm.ping" })),
            "{outcome:?}"
        );
    }

    #[tokio::test]
    async fn a_vmm_that_is_not_there_is_named() {
        let error = Vmm::new(Path::new("/nonexistent/api.sock"))
            .version(CALL_LIMIT)
            .await
            .expect_err("nobody listens");
        assert!(error.to_string().contains("/nonexistent/api.sock"));
    }
}

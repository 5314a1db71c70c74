//! The plain HTTP calls: `/health`, `/init`, `/metrics`, `/envs`, and those around a snapshot: `/snapshot/prepare`,
//! `/fsfreeze`, `/fsthaw`. What those on files do is in `files`.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use connectrpc::ErrorCode;
use http::header::HeaderValue;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use roost_common::guest::{
    ACCESS_TOKEN_HEADER, HELD_HEADER, InitRequest, MAX_ENTROPY, MAX_NONCE, NONCE_HEADER, VERSION_HEADER,
};
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;

use crate::clock::{self, Clock, Decision};
use crate::console::{chain, say};
use crate::disk::RootDisk;
use crate::entropy;
use crate::files::{LongBody, Operation, Query, download, upload};
use crate::filesystem::FileError;
use crate::filesystems::Files;
use crate::guest::{Guest, Machine, Readiness};
use crate::identity;
use crate::metrics::Sampler;
use crate::process::spawn::is_variable;
use crate::snapshot::Settling;
use crate::users::UserError;

/// What clients read to learn what this envd can do: the highest version of this family's envd all of whose abilities
/// it has. 0.6.2 is metadata of files, 0.6.3 the entry in a change that is watched, 0.6.4 watches on networks.
pub(crate) const VERSION: &str = "0.6.4";

/// Most bytes of an `/init` body, and how long it may take to arrive.
const MAX_BODY: usize = 1 << 20;
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The state of these calls.
pub(crate) struct Rest {
    pub(crate) guest: Arc<Guest>,
    pub(crate) metrics: Sampler,
    /// Held while an `/init` is applied: one at a time.
    heard: Mutex<Heard>,
    settling: Settling,
    root_disk: RootDisk,
}

/// What the host said before.
#[derive(Default)]
struct Heard {
    clock: Clock,
    /// Of the last `/init` that was applied. The clock has its own: it hears the time of those that fail later, too.
    lifecycle: Option<String>,
}

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestError {
    #[error("there is nothing here")]
    NotFound,
    #[error("this is not how to call it")]
    Method,
    #[error("the machine is not set up yet")]
    Starting,
    #[error("the machine could not be set up: {0}")]
    Failed(String),
    #[error("the access token is missing or wrong")]
    Token,
    #[error("the body exceeds {MAX_BODY} bytes")]
    TooLarge,
    #[error("the body did not arrive")]
    Body,
    #[error("the body is not a valid request: {0}")]
    Json(serde_json::Error),
    #[error("{0} is not acceptable")]
    Field(&'static str),
    #[error("the signature {0}")]
    Signature(&'static str),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("the form cannot be read: {0}")]
    Form(multer::Error),
    #[error("the body broke off: {0}")]
    Broken(io::Error),
    #[error("{0:?} is named twice")]
    Repeated(PathBuf),
    #[error("the body is compressed in a way that is not known; gzip is")]
    Encoding,
    #[error("there is no form of the answer that is acceptable; gzip is one")]
    NotAcceptable,
    #[error("this envd does not: {0}")]
    Unimplemented(&'static str),
    #[error("{step}: {reason}")]
    Effect { step: &'static str, reason: String },
}

impl RestError {
    fn status(&self) -> (StatusCode, &'static str) {
        match self {
            RestError::NotFound => (StatusCode::NOT_FOUND, "not_found"),
            RestError::Method => (StatusCode::METHOD_NOT_ALLOWED, "unimplemented"),
            RestError::Starting | RestError::Failed(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            RestError::Token | RestError::Signature(_) => (StatusCode::UNAUTHORIZED, "unauthenticated"),
            // As other envds answer it here; a Connect call has `invalid_argument`.
            RestError::File(FileError::User(UserError::Unknown(_))) => (StatusCode::UNAUTHORIZED, "invalid_argument"),
            RestError::File(error) if error.is_full_disk() => (StatusCode::INSUFFICIENT_STORAGE, "resource_exhausted"),
            RestError::File(error) => file_status(error),
            RestError::Form(_) | RestError::Broken(_) | RestError::Repeated(_) => {
                (StatusCode::BAD_REQUEST, "invalid_argument")
            }
            RestError::Encoding => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_argument"),
            RestError::NotAcceptable => (StatusCode::NOT_ACCEPTABLE, "invalid_argument"),
            RestError::Unimplemented(_) => (StatusCode::NOT_IMPLEMENTED, "unimplemented"),
            RestError::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "resource_exhausted"),
            RestError::Body => (StatusCode::REQUEST_TIMEOUT, "deadline_exceeded"),
            RestError::Json(_) | RestError::Field(_) => (StatusCode::BAD_REQUEST, "invalid_argument"),
            RestError::Effect { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        }
    }

    /// The answer, in the form of Connect errors, so that clients of either kind of call read it.
    pub(crate) fn into_response(self) -> Response<Full<Bytes>> {
        let (status, code) = self.status();
        let body = serde_json::json!({ "code": code, "message": self.to_string() });
        json(status, body.to_string())
    }
}

fn file_status(error: &FileError) -> (StatusCode, &'static str) {
    let code = error.code();
    let status = match code {
        ErrorCode::InvalidArgument | ErrorCode::FailedPrecondition => StatusCode::BAD_REQUEST,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::PermissionDenied => StatusCode::FORBIDDEN,
        ErrorCode::AlreadyExists => StatusCode::CONFLICT,
        ErrorCode::ResourceExhausted => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, code.as_str())
}

pub(crate) type RestResult = Result<Response<Full<Bytes>>, RestError>;

impl Rest {
    pub(crate) fn new(guest: Arc<Guest>) -> Self {
        Self {
            guest,
            metrics: Sampler::default(),
            heard: Mutex::default(),
            settling: Settling::default(),
            root_disk: RootDisk::default(),
        }
    }

    /// `GET /health`.
    pub(crate) fn health(&self) -> RestResult {
        self.ready()?;
        Ok(empty())
    }

    /// Whether calls may touch the machine.
    pub(crate) fn ready(&self) -> Result<(), RestError> {
        match &*self.guest.readiness.borrow() {
            Readiness::Ready => Ok(()),
            Readiness::Starting => Err(RestError::Starting),
            Readiness::Failed(reason) => Err(RestError::Failed(reason.clone())),
        }
    }

    /// `GET /metrics`.
    pub(crate) fn metrics(&self) -> RestResult {
        to_json(&self.metrics.sample(&self.guest.root))
    }

    /// `GET /envs`.
    pub(crate) fn envs(&self) -> RestResult {
        to_json(&self.guest.settings().environment())
    }

    /// `POST /snapshot/prepare`.
    pub(crate) async fn prepare(&self) -> RestResult {
        self.guest.ports.stop();
        let settled = match self.guest.machine {
            Machine::Own => self.settling.settle().await,
            Machine::Borrowed => Ok(()),
        };
        // Last, so that those opened meanwhile go too; and whatever became of the rest.
        self.guest.connections.close();
        settled.map_err(|error| effect("settling for a snapshot", &error))?;
        Ok(empty())
    }

    /// `POST /fsfreeze`. Answers after the root filesystem has its size: growing it writes.
    pub(crate) async fn freeze(&self) -> RestResult {
        let guest = &self.guest;
        guest.disk_settled().await;
        let frozen = guest.filesystems.freeze(guest.machine).await;
        let held = frozen.map_err(|error| effect("freezing the filesystems", &error))?;
        // The snapshot is next: this call's own connection, opened since the preparation, would be in it.
        guest.connections.close();
        let mut answer = empty();
        let held = HeaderValue::from_static(held.word());
        answer.headers_mut().insert(HELD_HEADER, held);
        Ok(answer)
    }

    /// `POST /fsthaw`.
    pub(crate) async fn thaw(&self) -> RestResult {
        let guest = &self.guest;
        let thawed = guest.filesystems.thaw(guest.machine, guest.root.clone()).await;
        guest.ports.go_on();
        thawed.map_err(|error| effect("thawing the filesystems", &error))?;
        Ok(empty())
    }

    /// `GET /files` and `HEAD /files`.
    pub(crate) async fn download(&self, request: &http::request::Parts) -> Result<Response<LongBody>, RestError> {
        let query = Query::parse(request.uri.query())?;
        query.admit(&self.guest, &request.headers, Operation::Read)?;
        download::get(&self.guest, &request.method, &request.headers, &query).await
    }

    /// `POST /files`.
    pub(crate) async fn upload(&self, request: &http::request::Parts, body: Incoming) -> RestResult {
        let query = Query::parse(request.uri.query())?;
        query.admit(&self.guest, &request.headers, Operation::Write)?;
        to_json(&upload::post(&self.guest, &request.headers, &query, body).await?)
    }

    /// `POST /files/compose`.
    pub(crate) async fn compose(&self, body: Incoming) -> RestResult {
        to_json(&upload::compose(&self.guest, read_request(body).await?).await?)
    }

    /// `POST /init`. Checks all of the request before it applies any of it. Answers after the root filesystem has its
    /// size. A caller that leaves may leave a part applied; what it sends again completes it.
    pub(crate) async fn init(&self, headers: &HeaderMap, body: Incoming) -> RestResult {
        let request: InitRequest = read_request(body).await?;
        // The host's own header admits a change of token; without it the body must repeat the one that is set.
        let header = headers.get(ACCESS_TOKEN_HEADER).map(|value| value.as_bytes());
        let token = header.or(request.access_token.as_deref().map(str::as_bytes));
        if !self.guest.admits(token) {
            return Err(RestError::Token);
        }
        check(&request)?;
        let nonce = request.nonce.as_deref().map(HeaderValue::from_str).transpose();
        let nonce = nonce.map_err(|_| RestError::Field("nonce"))?;
        let mut heard = self.heard.lock().await;
        self.guest.disk_settled().await;
        let lifecycle = request.lifecycle_id.clone().or_else(|| heard.lifecycle.clone());
        self.apply(request, &mut heard.clock).await?;
        self.guest.ports.go_on();
        let answer = self.prove(nonce).await;
        let before = std::mem::replace(&mut heard.lifecycle, lifecycle);
        // After the proof, for which the answer's own connection has to live. Before the first life there was none.
        if before.is_some() && before != heard.lifecycle {
            self.guest.connections.cut();
        }
        answer
    }

    async fn apply(&self, request: InitRequest, clock: &mut Clock) -> Result<(), RestError> {
        let guest = &self.guest;
        // First: until then programs draw the numbers of the snapshot.
        if !request.entropy.is_empty() && guest.machine == Machine::Own {
            entropy::feed(&request.entropy).map_err(|error| effect("feeding the random pool", &error))?;
        }
        if let Some(host) = request.timestamp {
            let decision = clock.hear(SystemTime::now(), host, request.lifecycle_id.as_deref());
            if decision == Decision::Step && guest.machine == Machine::Own {
                clock::step(host).map_err(|error| effect("setting the clock", &error))?;
                say!("clock set by the host");
            }
        }
        let mut known = guest.settings().identity;
        known.extend(identity::variables(
            request.sandbox_id.as_deref(),
            request.template_id.as_deref(),
        ));
        if guest.owns_files() {
            let files = Files {
                resolvers: request.dns,
                identity: Some(known.clone()),
            };
            let written = guest.filesystems.write(guest.root.clone(), files).await;
            written.map_err(|error| effect("writing files", &error))?;
        }
        guest.change(|settings| {
            settings.identity = known;
            settings.variables = request
                .env_vars
                .unwrap_or_else(|| std::mem::take(&mut settings.variables));
            let keep = |new: Option<String>, old: &mut Option<String>| {
                if let Some(new) = new {
                    *old = Some(new).filter(|text| !text.is_empty());
                }
            };
            keep(request.default_user, &mut settings.user);
            keep(request.default_workdir, &mut settings.workdir);
            // An empty token is none given: it must not open what one protects.
            settings.token = request
                .access_token
                .filter(|token| !token.is_empty())
                .or(settings.token.take());
        });
        Ok(())
    }

    /// The answer to an `/init` that has been applied; with a nonce, after the root disk has answered too.
    async fn prove(&self, nonce: Option<HeaderValue>) -> RestResult {
        let mut answer = empty();
        if let Some(nonce) = nonce {
            if self.guest.machine == Machine::Own {
                let read = self.root_disk.read().await;
                read.map_err(|error| effect("reading the root disk", &error))?;
            }
            answer.headers_mut().insert(NONCE_HEADER, nonce);
        }
        Ok(answer)
    }
}

/// Reads a JSON object; of a body that is empty, the default.
async fn read_request<T: DeserializeOwned>(body: Incoming) -> Result<T, RestError> {
    let collect = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY).collect());
    let body = collect.await.map_err(|_| RestError::Body)?.map_err(|error| {
        if error.is::<LengthLimitError>() {
            RestError::TooLarge
        } else {
            RestError::Body
        }
    })?;
    let bytes = body.to_bytes();
    let bytes = if bytes.is_empty() {
        Bytes::from_static(b"{}")
    } else {
        bytes
    };
    // An object first: serde would take an array for the fields in their order.
    let object = serde_json::from_slice::<serde_json::Map<_, _>>(&bytes).map_err(RestError::Json)?;
    serde_json::from_value(object.into()).map_err(RestError::Json)
}

fn check(request: &InitRequest) -> Result<(), RestError> {
    let is_id = |id: &Option<String>| {
        id.as_ref()
            .is_none_or(|id| id.len() <= identity::MAX_ID && !id.contains(|c: char| c.is_control()))
    };
    let is_text = |text: &Option<String>| text.as_ref().is_none_or(|text| !text.contains('\0'));
    let variables = request.env_vars.iter().flatten();
    let problems = [
        (request.entropy.len() > MAX_ENTROPY, "entropy"),
        (!is_id(&request.sandbox_id), "sandboxID"),
        (!is_id(&request.template_id), "templateID"),
        (!request.nonce.as_deref().is_none_or(is_nonce), "nonce"),
        (!is_text(&request.default_user), "defaultUser"),
        (!is_text(&request.default_workdir), "defaultWorkdir"),
        (
            variables.clone().any(|(name, value)| !is_variable(name, value)),
            "envVars",
        ),
        (
            request.timestamp.is_some_and(|time| time < SystemTime::UNIX_EPOCH),
            "timestamp",
        ),
    ];
    problems
        .into_iter()
        .find(|(bad, _)| *bad)
        .map_or(Ok(()), |(_, field)| Err(RestError::Field(field)))
}

/// Whether a header can repeat it as it is.
fn is_nonce(text: &str) -> bool {
    (1..=MAX_NONCE).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn effect(step: &'static str, error: &dyn std::error::Error) -> RestError {
    RestError::Effect {
        step,
        reason: chain(error),
    }
}

fn empty() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
        .headers_mut()
        .insert(VERSION_HEADER, header::HeaderValue::from_static(VERSION));
    response
}

fn to_json(value: &impl serde::Serialize) -> RestResult {
    let body = serde_json::to_string(value).map_err(|error| effect("writing the answer", &error))?;
    Ok(json(StatusCode::OK, body))
}

fn json(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_503_until_the_machine_is_set_up_and_says_why_it_cannot_be() {
        let rest = Rest::new(Arc::new(Guest::new("/".into(), Machine::Own)));
        let status = |rest: &Rest| {
            rest.health()
                .map_or_else(|error| error.status().0, |answer| answer.status())
        };
        assert_eq!(status(&rest), StatusCode::SERVICE_UNAVAILABLE);
        rest.guest
            .readiness
            .send_replace(Readiness::Failed("no eth0".to_owned()));
        assert_eq!(status(&rest), StatusCode::SERVICE_UNAVAILABLE);
        assert!(rest.health().unwrap_err().to_string().contains("no eth0"));
        rest.guest.readiness.send_replace(Readiness::Ready);
        assert_eq!(status(&rest), StatusCode::NO_CONTENT);
    }

    #[test]
    fn a_nonce_is_1_to_64_bytes_of_printable_ascii() {
        let is_taken = |nonce: &str| {
            let request = InitRequest {
                nonce: Some(nonce.to_owned()),
                ..Default::default()
            };
            check(&request).is_ok()
        };
        assert!(is_taken("!") && is_taken("a1-~") && is_taken(&"n".repeat(64)));
        for bad in ["", " ", "a b", "a\r\nx: y", "\0", "\u{7f}", "\u{e9}", &"n".repeat(65)] {
            assert!(!is_taken(bad), "{bad:?}");
        }
        assert!(check(&InitRequest::default()).is_ok());
    }
}

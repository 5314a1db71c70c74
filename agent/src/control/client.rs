//! Calls to the control plane: a POST with a small JSON body, over a connection that is kept open between calls. Answers are bounded in
//! size, calls in time. An answer is any status; what it means is its caller's affair.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::credentials::Secret;
use super::url::Url;

/// Largest answer.
const MAX_ANSWER: usize = 64 << 10;
/// Time for a connection to stand.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long a connection is kept open for the next call. Heartbeats come every 30 s; most servers close after 60 s, and a call that meets
/// that is one whose answer may be lost.
const KEPT_OPEN: Duration = Duration::from_secs(45);
/// The header with a host's token.
const HOST_TOKEN: HeaderName = HeaderName::from_static("x-host-token");
/// Where distributions have the CAs that they trust.
const SYSTEM_CAS: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The CAs cannot be read.
    #[error("{} holds no certificate that can be read", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// There is nothing in it that could be trusted.
    #[error("{} holds no certificate of a CA", path.display())]
    NoCa {
        /// The file.
        path: PathBuf,
    },
    /// Transport security cannot be had.
    #[error("no transport security")]
    Tls(#[from] rustls::Error),
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nothing was sent.
    #[error("cannot connect to {to}")]
    Connect {
        /// Where to.
        to: String,
        /// Why.
        #[source]
        source: legacy::Error,
    },
    /// The connection broke; it may have been done.
    #[error("{to} broke the connection off")]
    Broken {
        /// Where to.
        to: String,
        /// Why.
        #[source]
        source: legacy::Error,
    },
    /// The answer broke off, or was too large; it may have been done.
    #[error("the answer of {to} could not be read")]
    Unread {
        /// Where to.
        to: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It took too long; it may have been done.
    #[error("{to} did not answer within {} s", limit.as_secs())]
    Late {
        /// Where to.
        to: String,
        /// How long was waited.
        limit: Duration,
    },
}

impl CallError {
    /// Whether the control plane cannot have heard of it.
    pub fn is_unsent(&self) -> bool {
        matches!(self, Self::Connect { .. })
    }
}

/// An answer, whatever it says.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    body: Zeroizing<Vec<u8>>,
}

/// The control plane's own words about what is wrong. Anything else with such a status is of somebody on the way.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Fault {
    pub(super) code: String,
    pub(super) message: String,
}

impl Answer {
    /// What it says where it is an error of the control plane itself.
    pub(super) fn fault(&self) -> Option<Fault> {
        #[derive(Deserialize)]
        struct Body {
            error: Fault,
        }
        let body: Body = serde_json::from_slice(&self.body).ok()?;
        Some(body.error)
    }

    /// Whether the control plane has looked at a call and refused it, in its own words. One that is overloaded or away, and whoever
    /// answers in its place, has judged nothing.
    pub(super) fn is_judgement(&self) -> bool {
        let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
        self.status.is_client_error() && !passing.contains(&self.status) && self.fault().is_some()
    }

    /// What it says where it is a success.
    pub(super) fn json<T: for<'de> Deserialize<'de>>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.body)
    }

    /// Its status, and its text where the control plane gave one: for a log, so escaped and cut short.
    pub(super) fn summary(&self) -> String {
        match self.fault() {
            Some(Fault { code, message }) => {
                let text: String = format!("{code}: {message}").chars().take(300).collect();
                format!("{} ({})", self.status, text.escape_debug())
            }
            None => self.status.to_string(),
        }
    }
}

/// A client of one control plane.
#[derive(Debug, Clone)]
pub struct Client {
    url: Url,
    http: legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Client {
    /// A client that trusts the CAs of a file, or else those that this system trusts. Connects to nothing yet. Blocks.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn new(url: Url, ca_file: Option<&Path>) -> Result<Self, ClientError> {
        let roots = match ca_file {
            Some(file) => roots(file)?,
            None => system_roots(),
        };
        // TLS 1.2 as well: what terminates it for a control plane is somebody's proxy.
        let tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_LIMIT));
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let http = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEPT_OPEN)
            .pool_max_idle_per_host(4)
            .http1_max_buf_size(MAX_ANSWER)
            .build(https);
        Ok(Self { url, http })
    }

    /// Where to.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Makes a call. Dropping it closes its connection.
    ///
    /// # Errors
    /// [`CallError`]: there is no answer.
    pub(super) async fn post(
        &self,
        path: &str,
        token: Option<&Secret>,
        body: Bytes,
        limit: Duration,
    ) -> Result<Answer, CallError> {
        let to = self.url.to_string();
        let answer = tokio::time::timeout(limit, self.exchange(path, token, body)).await;
        answer.unwrap_or_else(|_| Err(CallError::Late { to, limit }))
    }

    async fn exchange(&self, path: &str, token: Option<&Secret>, body: Bytes) -> Result<Answer, CallError> {
        let to = || self.url.to_string();
        let uri = self.url.of(path).expect("a URL, and a path of ours");
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        let agent = concat!("roost/", env!("CARGO_PKG_VERSION"));
        let headers = request.headers_mut();
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // A token that is no header's value is none of the control plane's, which will say so.
        if let Some(mut token) = token.and_then(|token| HeaderValue::from_str(token.expose()).ok()) {
            token.set_sensitive(true);
            headers.insert(HOST_TOKEN, token);
        }
        let response = self.http.request(request).await.map_err(|source| {
            if source.is_connect() {
                CallError::Connect { to: to(), source }
            } else {
                CallError::Broken { to: to(), source }
            }
        })?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|source| CallError::Unread { to: to(), source })?;
        Ok(Answer {
            status,
            body: Zeroizing::new(body.to_bytes().to_vec()),
        })
    }
}

/// A body.
pub(super) fn json(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).expect("strings and numbers serialise").into()
}

fn roots(file: &Path) -> Result<RootCertStore, ClientError> {
    let failed = |source| ClientError::Ca {
        path: file.into(),
        source,
    };
    let certificates = CertificateDer::pem_file_iter(file)
        .map_err(failed)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(ClientError::NoCa { path: file.into() });
    }
    Ok(roots)
}

/// None where the system has none, as for a control plane that is reached without HTTPS: one with it then says whom it does not trust.
fn system_roots() -> RootCertStore {
    let found = SYSTEM_CAS.iter().find_map(|file| roots(Path::new(file)).ok());
    found.unwrap_or_else(|| {
        tracing::warn!(files = ?SYSTEM_CAS, "no CAs of this system; no HTTPS but with ca_file");
        RootCertStore::empty()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer {
            status: StatusCode::from_u16(status).expect("a status"),
            body: Zeroizing::new(body.as_bytes().to_vec()),
        }
    }

    #[test]
    fn only_the_control_planes_own_error_is_one() {
        let own = answer(404, r#"{"error": {"code": "not_found", "message": "no such host"}}"#);
        assert_eq!(own.fault().expect("an error").code, "not_found");
        for body in [
            "",
            "<html><body>404 Not Found</body></html>",
            "{}",
            "null",
            r#"{"error": "not found"}"#,
            r#"{"error": {"code": 404, "message": "no Route matched"}}"#,
            r#"{"error": {"code": "not_found"}}"#,
            r#"{"message": "no Route matched with those values"}"#,
        ] {
            assert_eq!(answer(404, body).fault(), None, "{body}");
        }
    }

    #[test]
    fn what_an_answer_says_is_escaped_and_cut_short() {
        let body = serde_json::json!({"error": {"code": "x", "message": format!("\u{1b}[2J{}", "a".repeat(4000))}});
        let summary = answer(400, &body.to_string()).summary();
        assert!(summary.starts_with("400 Bad Request (x: \\u{1b}[2J"), "{summary}");
        assert!(summary.len() < 400);
        assert_eq!(answer(502, "<html>").summary(), "502 Bad Gateway");
    }

    #[test]
    fn a_file_without_a_ca_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("ca.pem");
        let url: Url = "https://control.example".parse().expect("a URL");
        for content in [None, Some(""), Some("no PEM")] {
            if let Some(content) = content {
                std::fs::write(&file, content).expect("written");
            }
            let error = Client::new(url.clone(), Some(&file)).expect_err("no CA");
            assert!(error.to_string().contains("ca.pem"), "{error}");
        }
    }
}

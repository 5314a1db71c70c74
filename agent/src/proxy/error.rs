//! Why a proxied request has no answer of the guest's, and what its caller sees instead: a status, and JSON as the API's errors are.
//!
//! The statuses are part of the protocol: 400 for the path, 403 for what nobody may reach, 503 where there is nothing to reach now, 502
//! where there is and it failed.

use connectrpc::{ConnectError, ErrorCode};
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};

use super::{Body, FORWARD_PROTOCOL, MAX_CALLS, MAX_PROXIED};
use crate::api::errors::ApiError;
use crate::errors::Chain;

/// Why a proxied request has no answer of the guest's.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProxyError {
    #[error("{0}")]
    BadPath(&'static str),
    #[error("this port is the sandbox's own agent's and is not proxied")]
    Envd,
    #[error("CONNECT is not proxied: GET /forward/{{sandbox_id}}/{{port}} opens a connection")]
    Connect,
    #[error("a forward is a GET with Connection: Upgrade and Upgrade: {FORWARD_PROTOCOL}, and without a body")]
    NotAForward,
    #[error("an upgrade needs HTTP/1.1")]
    NotHttp11,
    #[error("a body in another transfer coding than chunked is not proxied")]
    Coding,
    #[error(transparent)]
    Sandbox(#[from] ApiError),
    #[error("the sandbox is being paused")]
    Draining,
    #[error("the sandbox has {MAX_CALLS} proxied connections, as many as it may")]
    TooMany,
    #[error("this host has {MAX_PROXIED} proxied connections, as many as it may")]
    HostIsFull,
    /// While the request was under way.
    #[error("the sandbox has stopped running")]
    Ended,
    #[error("nothing in the sandbox takes connections at port {port}")]
    Dial {
        port: u16,
        #[source]
        source: std::io::Error,
    },
    #[error("the sandbox did not answer with HTTP at port {port}")]
    Broken {
        port: u16,
        #[source]
        source: hyper::Error,
    },
    #[error("the sandbox answered in a way that cannot be passed on: {0}")]
    BadAnswer(&'static str),
}

impl ProxyError {
    fn status(&self) -> (StatusCode, ErrorCode) {
        match self {
            Self::BadPath(_) => (StatusCode::BAD_REQUEST, ErrorCode::InvalidArgument),
            Self::Envd => (StatusCode::FORBIDDEN, ErrorCode::PermissionDenied),
            Self::Connect => (StatusCode::METHOD_NOT_ALLOWED, ErrorCode::Unimplemented),
            Self::NotAForward => (StatusCode::UPGRADE_REQUIRED, ErrorCode::InvalidArgument),
            Self::NotHttp11 => (StatusCode::HTTP_VERSION_NOT_SUPPORTED, ErrorCode::Unimplemented),
            Self::Coding => (StatusCode::NOT_IMPLEMENTED, ErrorCode::Unimplemented),
            // Also where there is no sandbox of that id: the caller has it from somewhere, so it was one.
            Self::Sandbox(_) | Self::Draining | Self::Ended => {
                (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::Unavailable)
            }
            Self::TooMany | Self::HostIsFull => (StatusCode::SERVICE_UNAVAILABLE, ErrorCode::ResourceExhausted),
            Self::Dial { .. } => (StatusCode::BAD_GATEWAY, ErrorCode::Unavailable),
            Self::Broken { .. } | Self::BadAnswer(_) => (StatusCode::BAD_GATEWAY, ErrorCode::Unknown),
        }
    }

    /// What the caller sees.
    pub(super) fn into_response(self) -> Response<Body> {
        let (status, code) = self.status();
        let json = ConnectError::new(code, Chain(&self).to_string()).to_json();
        let mut response = Response::new(Full::new(json).map_err(|never| match never {}).boxed_unsync());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if status == StatusCode::UPGRADE_REQUIRED {
            headers.insert(header::UPGRADE, HeaderValue::from_static(FORWARD_PROTOCOL));
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        }
        response
    }
}

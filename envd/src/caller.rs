//! What the headers of a Connect call say of its caller.

use std::str;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use connectrpc::{ConnectError, RequestContext};
use http::header::AUTHORIZATION;
use roost_common::guest::KEEPALIVE_HEADER;

/// Silence after which a stream says that it lives, where the caller does not say.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// The longest silence of a stream.
pub(crate) fn keepalive(context: &RequestContext) -> Duration {
    let seconds = context
        .header(KEEPALIVE_HEADER)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    seconds
        .filter(|seconds| (1..=3600).contains(seconds))
        .map_or(KEEPALIVE, Duration::from_secs)
}

/// The user name of HTTP Basic authentication, if there is one. Other schemes are not ours to judge.
pub(crate) fn basic_user(context: &RequestContext) -> Result<Option<String>, ConnectError> {
    let Some(value) = context.header(AUTHORIZATION) else {
        return Ok(None);
    };
    let malformed = || ConnectError::invalid_argument("the Authorization header is malformed");
    let (scheme, credentials) = value
        .to_str()
        .map_err(|_| malformed())?
        .split_once(' ')
        .ok_or_else(malformed)?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return Ok(None);
    }
    let decoded = BASE64_STANDARD.decode(credentials.trim()).map_err(|_| malformed())?;
    let (user, _password) = str::from_utf8(&decoded)
        .ok()
        .and_then(|text| text.split_once(':'))
        .ok_or_else(malformed)?;
    Ok((!user.is_empty()).then(|| user.to_owned()))
}

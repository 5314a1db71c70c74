//! `/files`: what is in files, up and down, with the rights of the user that a call names.
//!
//! | module | holds |
//! |---|---|
//! | [`download`] | `GET` and `HEAD`: ranges, compression |
//! | [`upload`], [`target`] | `POST`: what arrives, and how it gets to its place; `/files/compose` |
//! | [`signature`] | what stands in for the token in links that are given away |
//!
//! Not here: names and attributes (`filesystem`).

pub(crate) mod download;
mod signature;
mod target;
pub(crate) mod upload;

use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body_util::combinators::UnsyncBoxBody;
use roost_common::guest::ACCESS_TOKEN_HEADER;

pub(crate) use self::signature::Operation;
use self::signature::Signed;
use crate::filesystem::FileError;
use crate::filesystem::path::resolve;
use crate::guest::{Guest, equal_in_constant_time};
use crate::rest::RestError;
use crate::users::User;

/// A body that may be longer than memory.
pub(crate) type LongBody = UnsyncBoxBody<Bytes, io::Error>;

/// What is read of a file, or of a body that is decompressed, at a time.
const CHUNK: usize = 64 * 1024;

/// The query of a call.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Query {
    path: Option<String>,
    username: Option<String>,
    signature: Option<String>,
    expiration: Option<i64>,
}

impl Query {
    /// Parameters that are not known are ignored; of one that comes twice the first counts.
    ///
    /// # Errors
    /// [`RestError::Field`].
    pub(crate) fn parse(query: Option<&str>) -> Result<Self, RestError> {
        let mut parsed = Self::default();
        for (name, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
            let field = match name.as_ref() {
                "path" => &mut parsed.path,
                "username" => &mut parsed.username,
                "signature" => &mut parsed.signature,
                "signature_expiration" => {
                    let expiration = value.parse().map_err(|_| RestError::Field("signature_expiration"))?;
                    parsed.expiration.get_or_insert(expiration);
                    continue;
                }
                _ => continue,
            };
            field.get_or_insert_with(|| value.into_owned());
        }
        Ok(parsed)
    }

    /// Whether the caller may do this: it knows the token, or has a signature for exactly this.
    ///
    /// # Errors
    /// [`RestError::Token`], [`RestError::Signature`].
    pub(crate) fn admit(&self, guest: &Guest, headers: &HeaderMap, operation: Operation) -> Result<(), RestError> {
        // An empty one is none given, as in `/init`.
        let header = headers.get(ACCESS_TOKEN_HEADER).map(HeaderValue::as_bytes);
        let header = header.filter(|token| !token.is_empty());
        let (None, Some(token)) = (header, guest.settings().token) else {
            return if guest.admits(header) {
                Ok(())
            } else {
                Err(RestError::Token)
            };
        };
        let Some(signature) = &self.signature else {
            return Err(RestError::Token);
        };
        let signed = Signed {
            path: self.path.as_deref().unwrap_or_default(),
            operation,
            user: self.username.as_deref().unwrap_or_default(),
            expiration: self.expiration,
        };
        if !equal_in_constant_time(signed.signature(&token).as_bytes(), signature.as_bytes()) {
            return Err(RestError::Signature("is not one for this"));
        }
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        match self.expiration {
            Some(expiration) if u64::try_from(expiration).is_ok_and(|at| at >= now.as_secs()) => Ok(()),
            Some(_) => Err(RestError::Signature("has expired")),
            None => Ok(()),
        }
    }

    fn caller(&self, guest: &Guest) -> Result<Caller, RestError> {
        Caller::named(guest, self.username.as_deref())
    }
}

/// Who calls, and where relative paths start.
struct Caller {
    user: User,
    workdir: Option<String>,
}

impl Caller {
    fn named(guest: &Guest, name: Option<&str>) -> Result<Self, RestError> {
        let settings = guest.settings();
        let name = name.filter(|name| !name.is_empty());
        let user = guest.user(name, &settings).map_err(FileError::User)?;
        Ok(Self {
            user,
            workdir: settings.workdir,
        })
    }

    fn resolve(&self, path: &str) -> Result<PathBuf, FileError> {
        resolve(path, &self.user, self.workdir.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_decoded_and_the_first_of_two_counts() {
        let query = Query::parse(Some("path=%2Fa%20b+c&x=1&path=other&username=u&signature_expiration=5")).unwrap();
        let expected = Query {
            path: Some("/a b c".to_owned()),
            username: Some("u".to_owned()),
            signature: None,
            expiration: Some(5),
        };
        assert_eq!(query, expected);
        assert_eq!(Query::parse(None).unwrap(), Query::default());
        for bad in [
            "signature_expiration=",
            "signature_expiration=1e3",
            "signature_expiration=5s",
        ] {
            assert!(Query::parse(Some(bad)).is_err(), "{bad}");
        }
    }
}

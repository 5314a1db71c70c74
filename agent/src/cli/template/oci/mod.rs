//! Images of containers: which layers an OCI image layout or an archive of `docker save` has, and the layers themselves.
//!
//! ```text
//! OCI:     index.json --> [index -->] manifest of this machine's architecture --> layers; each a blob named by its SHA-256
//! docker:  manifest.json --> config (named by its SHA-256, lists the SHA-256 of each layer's tar), layers
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`store`] | where an image's parts are: a directory, or an archive's members |
//! | [`manifest`] | which of them are its layers |
//! | [`layer`] | a layer's content, unpacked and checked |
//!
//! Holds: nothing is used whose SHA-256 is not the one by which it was asked for; documents are bounded in size, layers in number, and what
//! all layers unpack to in sum ([`MAX_UNPACKED`]). Layers are checked to their last byte after they were read: whoever reads them throws
//! away what came of it when that fails.

mod layer;
mod manifest;
mod store;

use std::io;

use ring::digest::Context;

use super::archive::{ArchiveError, shown};
pub(super) use layer::{Limited, MAX_UNPACKED, unpack};
#[cfg(test)]
pub(super) use manifest::architecture;
use store::MAX_DOCUMENT;
pub(super) use store::{Store, is_part};

/// How much is read at a time.
const BUFFER: usize = 256 << 10;

/// Why there are no layers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OciError {
    /// Something that should be there.
    #[error("the image has no {0}")]
    Missing(String),
    /// Something that cannot be read.
    #[error("{what} of the image cannot be read")]
    Read {
        /// What.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A document that is too long.
    #[error("{what} of the image has more than {MAX_DOCUMENT} bytes")]
    Long {
        /// Which one.
        what: String,
    },
    /// A document that is none.
    #[error("{what} of the image is not what it should be")]
    Document {
        /// Which one.
        what: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A digest of a kind that we do not know.
    #[error("{0:?} is no digest of the form sha256:<64 hexadecimal digits>")]
    Digest(String),
    /// Something that is not what was asked for.
    #[error("{what} of the image is damaged: its SHA-256 is {found}, not {expected}")]
    Damaged {
        /// What.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A length that is not the one that was said.
    #[error("{what} of the image is damaged: it has {found} bytes, not {expected}")]
    Length {
        /// What.
        what: String,
        /// What it should have.
        expected: u64,
        /// What it has.
        found: u64,
    },
    /// A kind of manifest or layer that we do not know.
    #[error("{what} of the image has the media type {media_type:?}, which cannot be read")]
    MediaType {
        /// What.
        what: &'static str,
        /// Its type.
        media_type: String,
    },
    /// None for this machine.
    #[error("the image is for {found}, and not for linux/{wanted}")]
    Architecture {
        /// What it is for.
        found: String,
        /// What this machine is.
        wanted: &'static str,
    },
    /// Several to choose from.
    #[error("there are several images; --image says which: {0}")]
    Several(String),
    /// None of that name.
    #[error("there is no image {wanted:?}; there are: {found}")]
    NoSuch {
        /// What was asked for.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// More than anybody needs.
    #[error("the image has more than {most} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        most: usize,
    },
    /// A docker image whose layers and config do not go together.
    #[error("the image has {layers} layers, and its config lists {listed}")]
    Layers {
        /// How many there are.
        layers: usize,
        /// How many the config has.
        listed: usize,
    },
    /// The archive that all of it is in.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

/// A SHA-256.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sha256(String);

impl Sha256 {
    fn parse(digest: &str) -> Result<Self, OciError> {
        let hex = digest.strip_prefix("sha256:").filter(|hex| is_sha256(hex));
        hex.map(|hex| Self(hex.to_owned()))
            .ok_or_else(|| OciError::Digest(shown(digest.as_bytes())))
    }

    fn of(context: Context) -> Self {
        Self(
            context
                .finish()
                .as_ref()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        )
    }
}

fn is_sha256(hex: &str) -> bool {
    hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn same(what: &str, expected: &Sha256, found: &Sha256) -> Result<(), OciError> {
    if expected == found {
        return Ok(());
    }
    Err(OciError::Damaged {
        what: what.to_owned(),
        expected: expected.0.clone(),
        found: found.0.clone(),
    })
}

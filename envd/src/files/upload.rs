//! `POST /files` and `POST /files/compose`.
//!
//! ```text
//! body --gunzip--> multipart --bytes--> a queue of QUEUE --thread with the user's rights--> Target
//! ```
//!
//! Holds: memory is bounded, however long a body is, however fast it comes, and whatever is in it. A body that ends too early
//! changes no file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use async_compression::tokio::bufread::GzipDecoder;
use bytes::Bytes;
use futures::stream::{Stream, StreamExt as _, TryStreamExt as _};
use http::{HeaderMap, header};
use http_body_util::BodyDataStream;
use hyper::body::Incoming;
use multer::Multipart;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::io::{ReaderStream, StreamReader};

use super::target::Target;
use super::{CHUNK, Caller, Query};
use crate::filesystem::entry::{METADATA_PREFIX, metadata, name};
use crate::filesystem::{FileError, Step, at};
use crate::guest::Guest;
use crate::rest::RestError;

/// Pieces of a body that wait for the disk; each is at most what a connection reads at a time, some 100 KiB.
const QUEUE: usize = 4;

/// Of a multipart body, what may come without being a file's contents: headers, boundaries, or a body without any.
const MAX_FORM: usize = 1 << 20;

/// What is read of the rest of a body that was refused, so that its sender comes to read why.
const MAX_REST: usize = 64 << 20;

/// Request headers with this before their name become attributes of the file.
const METADATA_HEADER: &str = "x-metadata-";

/// As long as the names of extended attributes can be, and as much as ext4 stores beside a file.
const MAX_METADATA_KEY: usize = 255 - METADATA_PREFIX.len();
const MAX_METADATA: usize = 4096;

/// A file that was written, as the answer tells it.
#[derive(Debug, Serialize)]
pub(crate) struct Written {
    name: String,
    r#type: &'static str,
    path: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
}

impl Written {
    fn at(path: &Path) -> Self {
        Self {
            name: name(path),
            r#type: "file",
            path: path.to_string_lossy().into_owned(),
            metadata: metadata(path),
        }
    }
}

/// The body of `/files/compose`.
#[derive(Debug, Deserialize)]
pub(crate) struct ComposeRequest {
    /// In their order.
    source_paths: Vec<String>,
    destination: String,
    username: Option<String>,
}

type Chunks = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// What the thread that writes is sent. Without an end, what came breaks off.
enum Part {
    Bytes(Bytes),
    End,
}

/// Writes the files of a body; `query` says where, or their names in the body.
///
/// # Errors
/// Files that came before the one that is refused are written.
pub(crate) async fn post(
    guest: &Guest,
    headers: &HeaderMap,
    query: &Query,
    body: Incoming,
) -> Result<Vec<Written>, RestError> {
    let caller = query.caller(guest)?;
    let metadata = metadata_of(headers)?;
    let mut chunks = decoded(headers, body)?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = kind.unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let written = match essence.as_str() {
        "application/octet-stream" => {
            let path = query.path.as_deref().filter(|path| !path.is_empty());
            let path = caller.resolve(path.ok_or(RestError::Field("path"))?)?;
            write(guest, &caller, path, &metadata, &mut chunks)
                .await
                .map(|file| vec![file])
        }
        essence if essence.starts_with("multipart/") => {
            let boundary = multer::parse_boundary(kind).map_err(RestError::Form)?;
            return form(guest, &caller, query, &metadata, chunks, boundary).await;
        }
        _ => Err(RestError::Field("content-type")),
    };
    if written.is_err() {
        drain(&mut chunks).await;
    }
    written
}

async fn form(
    guest: &Guest,
    caller: &Caller,
    query: &Query,
    metadata: &BTreeMap<String, String>,
    chunks: Chunks,
    boundary: String,
) -> Result<Vec<Written>, RestError> {
    let ahead = Arc::new(AtomicUsize::new(0));
    let paced = Paced {
        chunks,
        ahead: Arc::clone(&ahead),
        rests: false,
    };
    let mut form = Multipart::new(paced, boundary);
    let mut paths = BTreeSet::new();
    let mut written = Vec::new();
    while let Some(mut field) = form.next_field().await.map_err(RestError::Form)? {
        let path = match (field.name(), &query.path) {
            (Some("file"), Some(path)) => Some(path.clone()),
            (Some("file"), None) => Some(field.file_name().ok_or(RestError::Field("filename"))?.to_owned()),
            _ => None,
        };
        let counted = futures::stream::poll_fn(|context| {
            let chunk = Pin::new(&mut field).poll_next(context);
            if matches!(chunk, Poll::Ready(Some(Ok(_)))) {
                // What was ahead were contents.
                ahead.store(0, Ordering::Relaxed);
            }
            chunk.map_err(io::Error::other)
        });
        let mut counted = std::pin::pin!(counted);
        let Some(path) = path else {
            while counted.try_next().await.map_err(RestError::Broken)?.is_some() {}
            continue;
        };
        let path = caller.resolve(&path)?;
        if !paths.insert(path.clone()) {
            return Err(RestError::Repeated(path));
        }
        match write(guest, caller, path, metadata, &mut counted).await {
            Ok(file) => written.push(file),
            Err(error) => {
                drain(&mut counted).await;
                return Err(error);
            }
        }
    }
    Ok(written)
}

/// Writes one file.
async fn write(
    guest: &Guest,
    caller: &Caller,
    path: PathBuf,
    metadata: &BTreeMap<String, String>,
    chunks: &mut (impl Stream<Item = io::Result<Bytes>> + Unpin),
) -> Result<Written, RestError> {
    guest.hold.released().await;
    let (sender, mut parts) = mpsc::channel(QUEUE);
    let metadata = metadata.clone();
    let writing = guest.threads.start(&caller.user, move || {
        let mut target = Target::open(path)?;
        loop {
            match parts.blocking_recv() {
                Some(Part::Bytes(bytes)) => target.write(&bytes)?,
                Some(Part::End) => return target.finish(&metadata).map(|path| Some(Written::at(&path))),
                None => return Ok(None),
            }
        }
    });
    let writing = writing.await?;
    let sent = async {
        while let Some(chunk) = chunks.try_next().await? {
            if sender.send(Part::Bytes(chunk)).await.is_err() {
                // The thread has failed, and says why.
                return Ok(());
            }
        }
        sender.send(Part::End).await.ok();
        Ok(())
    };
    let sent: io::Result<()> = sent.await;
    drop(sender);
    let written = writing.await.map_err(|_| FileError::Panicked)?;
    sent.map_err(RestError::Broken)?;
    Ok(written?.expect("the thread was sent the end"))
}

/// Joins files to one, and removes them.
///
/// # Errors
/// Nothing is removed, and there is no new file.
pub(crate) async fn compose(guest: &Guest, request: ComposeRequest) -> Result<Written, RestError> {
    let caller = Caller::named(guest, request.username.as_deref())?;
    if request.source_paths.is_empty() {
        return Err(RestError::Field("source_paths"));
    }
    if request.destination.is_empty() {
        return Err(RestError::Field("destination"));
    }
    let destination = caller.resolve(&request.destination)?;
    let sources = request.source_paths.iter().map(|path| caller.resolve(path));
    let sources = sources.collect::<Result<Vec<_>, _>>()?;
    if sources.contains(&destination) {
        return Err(RestError::Repeated(destination));
    }
    guest.hold.released().await;
    let composed = guest.threads.run(&caller.user, move || {
        let open = |path: &PathBuf| {
            let file = super::download::open(path)?;
            if !file.1.is_file() {
                return Err(FileError::NotFile(path.clone()));
            }
            Ok(file.0)
        };
        // All of them once before anything is written; one that is gone by its turn is told then.
        sources.iter().try_for_each(|source| open(source).map(drop))?;
        let mut target = Target::open(destination)?;
        for source in &sources {
            let mut file: File = open(source)?;
            target.copy(&mut file)?;
        }
        let path = target.finish(&BTreeMap::new())?;
        for source in sources.iter().collect::<BTreeSet<_>>() {
            std::fs::remove_file(source).map_err(at(Step::Remove, source))?;
        }
        Ok(Written::at(&path))
    });
    Ok(composed.await?)
}

/// Reads what is left of a body, within bounds.
async fn drain(chunks: &mut (impl Stream<Item = io::Result<Bytes>> + Unpin)) {
    let mut left = MAX_REST;
    while let Some(Ok(chunk)) = chunks.next().await {
        let Some(less) = left.checked_sub(chunk.len()) else {
            return;
        };
        left = less;
    }
}

/// The body as its sender had it before compression.
fn decoded(headers: &HeaderMap, body: Incoming) -> Result<Chunks, RestError> {
    let chunks = BodyDataStream::new(body).map_err(io::Error::other);
    match headers.get(header::CONTENT_ENCODING).map(|value| value.as_bytes()) {
        None | Some(b"" | b"identity") => Ok(Box::pin(chunks)),
        Some(encoding) if encoding.eq_ignore_ascii_case(b"gzip") || encoding.eq_ignore_ascii_case(b"x-gzip") => {
            let mut decoder = GzipDecoder::new(StreamReader::new(chunks));
            decoder.multiple_members(true);
            Ok(Box::pin(ReaderStream::with_capacity(decoder, CHUNK)))
        }
        Some(_) => Err(RestError::Encoding),
    }
}

fn metadata_of(headers: &HeaderMap) -> Result<BTreeMap<String, String>, RestError> {
    let mut metadata = BTreeMap::new();
    for (name, value) in headers {
        let Some(key) = name
            .as_str()
            .strip_prefix(METADATA_HEADER)
            .filter(|key| !key.is_empty())
        else {
            continue;
        };
        let value = value.to_str().ok().filter(|value| !value.contains('\t'));
        let value = value
            .filter(|_| key.len() <= MAX_METADATA_KEY)
            .ok_or(RestError::Field("x-metadata"))?;
        metadata.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    let size = |(key, value): (&String, &String)| METADATA_PREFIX.len() + key.len() + value.len();
    if metadata.iter().map(size).sum::<usize>() > MAX_METADATA {
        return Err(RestError::Field("x-metadata"));
    }
    Ok(metadata)
}

/// A body for the multipart reader, which takes into memory whatever is ready: one piece each time that it is asked, and no
/// more than [`MAX_FORM`] before some of it was a field's.
struct Paced {
    chunks: Chunks,
    ahead: Arc<AtomicUsize>,
    rests: bool,
}

impl Stream for Paced {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.rests) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let next = self.chunks.as_mut().poll_next(context);
        if let Poll::Ready(Some(Ok(bytes))) = &next {
            self.rests = true;
            let ahead = self.ahead.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len();
            if ahead > MAX_FORM + bytes.len() {
                return Poll::Ready(Some(Err(io::Error::other("there is too much between its fields"))));
            }
        }
        next
    }
}

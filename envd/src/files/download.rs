//! `GET /files` and `HEAD /files`.
//!
//! Holds: a body that was announced longer than the file turns out to be ends with an error, never as if it were whole.

use std::fs::{File, Metadata};
use std::io::{self, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use async_compression::tokio::bufread::GzipEncoder;
use bytes::{Bytes, BytesMut};
use futures::stream::{self, Stream, TryStreamExt as _};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::body::Frame;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, BufReader};
use tokio_util::io::ReaderStream;

use super::{CHUNK, LongBody, Query};
use crate::filesystem::entry::name;
use crate::filesystem::{FileError, Step, at};
use crate::guest::Guest;
use crate::rest::RestError;

/// Answers with a file, or a part of it.
///
/// # Errors
/// Before the answer has begun.
pub(crate) async fn get(
    guest: &Guest,
    method: &Method,
    headers: &HeaderMap,
    query: &Query,
) -> Result<Response<LongBody>, RestError> {
    let caller = query.caller(guest)?;
    let path = caller.resolve(query.path.as_deref().unwrap_or_default())?;
    let (file, metadata, path) = {
        let opened = move || -> Result<(File, Metadata, PathBuf), FileError> {
            let (file, metadata) = open(&path)?;
            if metadata.is_dir() {
                return Err(FileError::Directory(path));
            }
            if !metadata.is_file() {
                return Err(FileError::NotFile(path));
            }
            Ok((file, metadata, path))
        };
        guest.threads.run(&caller.user, opened).await?
    };
    let modified = metadata.modified().map_err(at(Step::Look, &path))?;
    let mut answer = Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
    describe(answer.headers_mut(), &path, modified);
    if is_unchanged(headers, modified) {
        *answer.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(answer);
    }
    let length = metadata.len();
    let range = range(headers, modified, length);
    let compressed = range == Range::Whole && takes_gzip(headers)?;
    let (from, length) = match range {
        Range::Whole => (0, length),
        Range::Part { from, length: part } => {
            *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
            set(
                &mut answer,
                header::CONTENT_RANGE,
                format!("bytes {from}-{}/{length}", from + part - 1),
            );
            (from, part)
        }
        Range::Outside => {
            *answer.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
            set(&mut answer, header::CONTENT_RANGE, format!("bytes */{length}"));
            return Ok(answer);
        }
    };
    if compressed {
        set(&mut answer, header::CONTENT_ENCODING, "gzip".to_owned());
    } else if length > 0 {
        set(&mut answer, header::CONTENT_LENGTH, length.to_string());
    }
    if method == Method::HEAD {
        return Ok(answer);
    }
    let mut file = tokio::fs::File::from_std(file);
    file.seek(SeekFrom::Start(from)).await.map_err(at(Step::Read, &path))?;
    *answer.body_mut() = if compressed {
        let encoder = GzipEncoder::new(BufReader::with_capacity(CHUNK, file));
        body(ReaderStream::with_capacity(encoder, CHUNK))
    } else if length > 0 {
        body(exactly(file, length))
    } else {
        // Empty, or, as files of the kernel's, of a length that is not known before it is read.
        body(ReaderStream::with_capacity(file, CHUNK))
    };
    Ok(answer)
}

/// Opens a file for reading. Nonblocking, so that a pipe without a writer is not waited for.
pub(super) fn open(path: &Path) -> Result<(File, Metadata), FileError> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(at(Step::Open, path))?;
    let metadata = file.metadata().map_err(at(Step::Look, path))?;
    Ok((file, metadata))
}

fn body(chunks: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> LongBody {
    StreamBody::new(chunks.map_ok(Frame::data)).boxed_unsync()
}

/// The next `length` bytes of a file, or an error.
fn exactly(file: tokio::fs::File, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::try_unfold((file, length), |(mut file, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let mut chunk = BytesMut::zeroed(CHUNK.min(usize::try_from(left).unwrap_or(CHUNK)));
        let read = file.read(&mut chunk).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        chunk.truncate(read);
        Ok(Some((chunk.freeze(), (file, left - read as u64))))
    })
}

fn describe(headers: &mut HeaderMap, path: &Path, modified: SystemTime) {
    let name = name(path);
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type(&name)));
    let texts = [
        (header::CONTENT_DISPOSITION, disposition(&name)),
        (
            header::LAST_MODIFIED,
            httpdate::fmt_http_date(modified.max(SystemTime::UNIX_EPOCH)),
        ),
    ];
    for (header, text) in texts {
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(header, value);
        }
    }
}

fn set(answer: &mut Response<LongBody>, header: HeaderName, text: String) {
    let value = HeaderValue::from_str(&text).expect("numbers and words can stand in a header");
    answer.headers_mut().insert(header, value);
}

/// A name as RFC 6266 has it; one that is not plain ASCII is percent-encoded.
fn disposition(name: &str) -> String {
    if name
        .bytes()
        .all(|byte| (b' '..=b'~').contains(&byte) && !matches!(byte, b'"' | b'\\'))
    {
        return format!("inline; filename=\"{name}\"");
    }
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    let encoded: String = name.bytes().map(encode).collect();
    format!("inline; filename*=utf-8''{encoded}")
}

/// By the end of the name; what browsers show rather than save is what matters here.
fn content_type(name: &str) -> &'static str {
    let end = name.rsplit_once('.').map_or("", |(_, end)| end).to_ascii_lowercase();
    match end.as_str() {
        "txt" | "log" | "md" | "py" | "rs" | "sh" | "toml" | "yaml" | "yml" => "text/plain; charset=utf-8",
        "html" | "htm" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "csv" => "text/csv; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "xml" => "text/xml; charset=utf-8",
        "json" => "application/json",
        "pdf" => "application/pdf",
        "wasm" => "application/wasm",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "svg" => "image/svg+xml",
        "webp" => "image/webp",
        _ => "application/octet-stream",
    }
}

fn is_unchanged(headers: &HeaderMap, modified: SystemTime) -> bool {
    let since = text(headers, header::IF_MODIFIED_SINCE).and_then(|since| httpdate::parse_http_date(since).ok());
    // Headers have whole seconds.
    since.is_some_and(|since| modified < since + Duration::from_secs(1))
}

/// What of a file is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Range {
    Whole,
    Part { from: u64, length: u64 },
    Outside,
}

/// One range; several, or what is none, are answered with the whole, as RFC 9110 permits.
fn range(headers: &HeaderMap, modified: SystemTime, length: u64) -> Range {
    if let Some(condition) = text(headers, header::IF_RANGE)
        && condition != httpdate::fmt_http_date(modified.max(SystemTime::UNIX_EPOCH))
    {
        return Range::Whole;
    }
    let range = text(headers, header::RANGE).and_then(|range| range.strip_prefix("bytes=")?.trim().split_once('-'));
    let (from, to) = match range.map(|(from, to)| (from.parse::<u64>(), to.parse::<u64>(), from, to)) {
        Some((Ok(from), Ok(to), ..)) if from <= to => (from, to.saturating_add(1).min(length)),
        Some((Ok(from), _, _, "")) => (from, length),
        Some((_, Ok(last), "", _)) => (length.saturating_sub(last), if last == 0 { 0 } else { length }),
        _ => return Range::Whole,
    };
    if from < to {
        Range::Part {
            from,
            length: to - from,
        }
    } else {
        Range::Outside
    }
}

/// Whether the answer is to be compressed.
///
/// # Errors
/// [`RestError::NotAcceptable`]: neither as it is nor compressed.
fn takes_gzip(headers: &HeaderMap) -> Result<bool, RestError> {
    let (mut gzip, mut identity) = (false, true);
    for value in headers.get_all(header::ACCEPT_ENCODING) {
        for coding in value.to_str().unwrap_or_default().split(',') {
            let mut parts = coding.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default().to_ascii_lowercase();
            let is_refused = parts.any(|part| {
                let weight = part.strip_prefix("q=").or_else(|| part.strip_prefix("Q="));
                weight.is_some_and(|weight| weight.trim().parse() == Ok(0.0_f32))
            });
            match name.as_str() {
                "gzip" | "x-gzip" => gzip = !is_refused,
                "identity" => identity = !is_refused,
                "*" if is_refused => identity = false,
                _ => {}
            }
        }
    }
    if gzip || identity {
        Ok(gzip)
    } else {
        Err(RestError::NotAcceptable)
    }
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(HeaderName, &'static str)| (name.clone(), HeaderValue::from_static(value));
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn ranges_are_those_of_rfc_9110() {
        let of = |text| range(&headers(&[(header::RANGE, text)]), SystemTime::UNIX_EPOCH, 10);
        let part = |from, length| Range::Part { from, length };
        for (text, expected) in [
            ("bytes=0-0", part(0, 1)),
            ("bytes=2-4", part(2, 3)),
            ("bytes=5-", part(5, 5)),
            ("bytes=5-100", part(5, 5)),
            ("bytes=-3", part(7, 3)),
            ("bytes=-30", part(0, 10)),
            ("bytes=10-", Range::Outside),
            ("bytes=-0", Range::Outside),
            ("bytes=4-2", Range::Whole),
            ("bytes=0-1,3-4", Range::Whole),
            ("bytes=-", Range::Whole),
            ("lines=1-2", Range::Whole),
            ("bytes=99999999999999999999-", Range::Whole),
        ] {
            assert_eq!(of(text), expected, "{text}");
        }
        let stale = headers(&[
            (header::RANGE, "bytes=0-1"),
            (header::IF_RANGE, "Thu, 01 Jan 1970 00:00:01 GMT"),
        ]);
        assert_eq!(range(&stale, SystemTime::UNIX_EPOCH, 10), Range::Whole);
    }

    #[test]
    fn an_answer_is_compressed_for_those_who_take_it() {
        let of = |text| takes_gzip(&headers(&[(header::ACCEPT_ENCODING, text)]));
        for (text, expected) in [
            ("gzip, deflate", true),
            ("br;q=1.0, GZIP;q=0.5", true),
            ("gzip;q=0", false),
            ("identity", false),
            ("*", false),
            ("", false),
        ] {
            assert_eq!(of(text).unwrap(), expected, "{text:?}");
        }
        assert!(!takes_gzip(&HeaderMap::new()).unwrap());
        assert!(of("identity;q=0").is_err() && of("*;q=0").is_err() && of("gzip;q=0, *;q=0.0").is_err());
        assert!(of("gzip, identity;q=0").unwrap());
    }

    #[test]
    fn names_stand_in_a_header_whatever_is_in_them() {
        assert_eq!(disposition("a b.txt"), "inline; filename=\"a b.txt\"");
        assert_eq!(disposition("\u{e9}\"\n"), "inline; filename*=utf-8''%C3%A9%22%0A");
    }
}

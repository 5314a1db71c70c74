//! Files of a guest: read, written, listed, made, removed.
//!
//! Holds: a file passes through in pieces and is never held whole; a guest that stops taking or giving pieces ends the call; a
//! file whose bytes break off on their way in is not written, as far as the guest's envd keeps to that.

use std::time::Duration;

use bytes::Bytes;
use connectrpc::ErrorCode;
use connectrpc::client::CallOptions;
use http::{Method, Request, Response, StatusCode};
use http_body_util::channel::{Channel, Sender};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;
use roost_common::guest::filesystem::{EntryInfo, ListDirRequest, MakeDirRequest, RemoveRequest};
use roost_common::guest::{ACCESS_TOKEN_HEADER, FILES_PATH};
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinHandle};

use super::{COMMAND_CONNECT_LIMIT, Guest, GuestError, MAX_ANSWER, escaped, refused};

/// Largest listing of a directory that is read.
pub(super) const MAX_LISTING: usize = 16 << 20;
/// How long envd may take for a directory: removing a large one takes its time.
const DIRECTORY_LIMIT: Duration = Duration::from_secs(600);
/// How long envd may take for the next piece of a file, for taking one, and for its answer after the last: a disk may be slow.
const PIECE_LIMIT: Duration = Duration::from_secs(60);

/// A task that does not outlive what needs it.
#[derive(Debug)]
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A file on its way out of a guest.
#[derive(Debug)]
pub struct Reading {
    body: Incoming,
    _connection: Task,
}

impl Reading {
    /// The next piece; `None` at the end of the file.
    ///
    /// # Errors
    /// [`GuestError::BadStream`], [`GuestError::Http`]: it broke off.
    pub async fn next(&mut self) -> Result<Option<Bytes>, GuestError> {
        loop {
            let frame = tokio::time::timeout(PIECE_LIMIT, self.body.frame()).await;
            let Some(frame) = frame.map_err(|_| GuestError::BadStream("fell silent"))? else {
                return Ok(None);
            };
            // Trailers say nothing here.
            if let Ok(piece) = frame.map_err(failed)?.into_data()
                && !piece.is_empty()
            {
                return Ok(Some(piece));
            }
        }
    }

    /// All of it, where that is no more than `most` bytes.
    ///
    /// # Errors
    /// [`GuestError::TooLarge`], and those of [`Reading::next`].
    pub async fn whole(mut self, most: usize) -> Result<Vec<u8>, GuestError> {
        // What a guest says of its length is not believed.
        let mut bytes = Vec::new();
        while let Some(piece) = self.next().await? {
            if bytes.len() + piece.len() > most {
                return Err(GuestError::TooLarge(most));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }
}

/// A file on its way into a guest. Dropping it before [`Writing::finish`] breaks it off.
#[derive(Debug)]
pub struct Writing {
    pieces: Sender<Bytes, std::io::Error>,
    answer: JoinHandle<Result<(), GuestError>>,
    task: Task,
    boundary: String,
}

impl Writing {
    /// Sends a piece, once the guest takes it.
    ///
    /// # Errors
    /// What envd answers before it has all of it, as where its disk is full; [`GuestError::BadStream`].
    pub async fn send(&mut self, piece: Bytes) -> Result<(), GuestError> {
        let sent = tokio::time::timeout(PIECE_LIMIT, self.pieces.send_data(piece)).await;
        match sent.map_err(|_| GuestError::BadStream("did not come: it took nothing more"))? {
            Ok(()) => Ok(()),
            // Nobody takes more, so there is an answer, and it is no success.
            Err(_) => match self.answer().await {
                Ok(()) => Err(GuestError::BadStream("came before the file was whole")),
                Err(error) => Err(error),
            },
        }
    }

    /// Ends the file, and waits until it is written.
    ///
    /// # Errors
    /// As [`Writing::send`].
    pub async fn finish(mut self) -> Result<(), GuestError> {
        let end = format!("\r\n--{}--\r\n", self.boundary);
        self.send(end.into()).await?;
        let Self {
            pieces, answer, task, ..
        } = self;
        drop(pieces);
        let answer = tokio::time::timeout(PIECE_LIMIT, answer).await;
        drop(task);
        answer
            .map_err(|_| GuestError::BadStream("did not come"))?
            .expect("it is not aborted before, and does not panic")
    }

    async fn answer(&mut self) -> Result<(), GuestError> {
        let answer = tokio::time::timeout(PIECE_LIMIT, &mut self.answer).await;
        answer
            .map_err(|_| GuestError::BadStream("did not come"))?
            .expect("it is not aborted before, and does not panic")
    }
}

impl Guest {
    /// Opens a file to read it. Relative paths begin at the home of the sandbox's default user, whose rights count.
    ///
    /// # Errors
    /// [`GuestError::File`], [`GuestError::Http`].
    pub async fn read_file(&self, path: &str) -> Result<Reading, GuestError> {
        let request = self.request(Method::GET, path, Empty::<Bytes>::new());
        let (mut sender, connection) = self.connect().await?;
        let connection = Task(tokio::spawn(connection).abort_handle());
        let answer = tokio::time::timeout(PIECE_LIMIT, sender.send_request(request)).await;
        let answer = answer
            .map_err(|_| GuestError::BadStream("did not come"))?
            .map_err(failed)?;
        let body = checked(answer).await?;
        Ok(Reading {
            body,
            _connection: connection,
        })
    }

    /// Begins to write a file, in place of one of that name. Missing directories are made.
    ///
    /// # Errors
    /// [`GuestError::Http`].
    pub async fn write_file(&self, path: &str) -> Result<Writing, GuestError> {
        let boundary = crate::sandbox::build::random_hex();
        let (mut pieces, body) = Channel::new(1);
        // As a form: every envd of this family takes those.
        let mut request = self.request(Method::POST, path, body);
        let kind = format!("multipart/form-data; boundary={boundary}");
        let kind = kind.parse().expect("hexadecimal digits");
        request.headers_mut().insert(http::header::CONTENT_TYPE, kind);
        let (mut sender, connection) = self.connect().await?;
        let head = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"file\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        );
        let answer = tokio::spawn(async move {
            let answered = async {
                let answer = sender.send_request(request).await.map_err(failed)?;
                let body = checked(answer).await?;
                // Which files it wrote: one, and we know which.
                Limited::new(body, MAX_ANSWER)
                    .collect()
                    .await
                    .map_err(|error| GuestError::Http {
                        path: FILES_PATH,
                        source: error,
                    })?;
                Ok(())
            };
            tokio::pin!(answered);
            tokio::select! {
                outcome = &mut answered => outcome,
                _ = connection => answered.await,
            }
        });
        let task = Task(answer.abort_handle());
        // There is room for one.
        drop(pieces.send_data(head.into()).await);
        Ok(Writing {
            pieces,
            answer,
            task,
            boundary,
        })
    }

    /// What is in a directory, `depth` levels of it.
    ///
    /// # Errors
    /// [`GuestError::File`], [`GuestError::Unreachable`].
    pub async fn list_dir(&self, path: String, depth: u32) -> Result<Vec<EntryInfo>, GuestError> {
        let request = ListDirRequest {
            path,
            depth,
            ..ListDirRequest::default()
        };
        let listed = self.filesystem.list_dir_with_options(request, options()).await;
        Ok(listed.map_err(of_file)?.into_owned().entries)
    }

    /// Makes a directory, and those above it.
    ///
    /// # Errors
    /// As [`Guest::list_dir`].
    pub async fn make_dir(&self, path: String) -> Result<EntryInfo, GuestError> {
        let request = MakeDirRequest {
            path,
            ..MakeDirRequest::default()
        };
        let made = self.filesystem.make_dir_with_options(request, options()).await;
        Ok(made
            .map_err(of_file)?
            .into_owned()
            .entry
            .into_option()
            .unwrap_or_default())
    }

    /// Removes a file, or a directory with all that is in it.
    ///
    /// # Errors
    /// As [`Guest::list_dir`].
    pub async fn remove(&self, path: String) -> Result<(), GuestError> {
        let request = RemoveRequest {
            path,
            ..RemoveRequest::default()
        };
        let removed = self.filesystem.remove_with_options(request, options()).await;
        removed.map(drop).map_err(of_file)
    }

    fn request<B>(&self, method: Method, path: &str, body: B) -> Request<B> {
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("path", path)
            .finish();
        Request::builder()
            .method(method)
            .uri(format!("{FILES_PATH}?{query}"))
            .header(http::header::HOST, self.address.to_string())
            .header(ACCESS_TOKEN_HEADER, &self.token.0)
            .body(body)
            .expect("an address, a hexadecimal token and an escaped path")
    }

    async fn connect<B>(&self) -> Result<Connection<B>, GuestError>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let stream = tokio::time::timeout(COMMAND_CONNECT_LIMIT, TcpStream::connect(self.address));
        let stream = stream.await.map_err(failed)?.map_err(failed)?;
        hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(failed)
    }
}

type Connection<B> = (
    hyper::client::conn::http1::SendRequest<B>,
    hyper::client::conn::http1::Connection<TokioIo<TcpStream>, B>,
);

fn options() -> CallOptions {
    CallOptions::default().with_timeout(DIRECTORY_LIMIT)
}

fn failed(source: impl std::error::Error + Send + Sync + 'static) -> GuestError {
    GuestError::Http {
        path: FILES_PATH,
        source: Box::new(source),
    }
}

/// An error of the filesystem service.
fn of_file(error: connectrpc::ConnectError) -> GuestError {
    match refused(error) {
        GuestError::Process { code, message } => GuestError::File { code, message },
        other => other,
    }
}

/// The body of an answer, unless that is a refusal.
async fn checked(answer: Response<Incoming>) -> Result<Incoming, GuestError> {
    let (head, body) = answer.into_parts();
    if head.status.is_success() {
        return Ok(body);
    }
    let read = tokio::time::timeout(PIECE_LIMIT, Limited::new(body, MAX_ANSWER).collect()).await;
    let bytes = read
        .ok()
        .and_then(Result::ok)
        .map(|body| body.to_bytes())
        .unwrap_or_default();
    Err(GuestError::File {
        code: code(head.status),
        message: escaped(&words(&bytes)),
    })
}

fn code(status: StatusCode) -> ErrorCode {
    match status {
        StatusCode::BAD_REQUEST => ErrorCode::InvalidArgument,
        StatusCode::FORBIDDEN => ErrorCode::PermissionDenied,
        StatusCode::NOT_FOUND => ErrorCode::NotFound,
        StatusCode::PAYLOAD_TOO_LARGE | StatusCode::INSUFFICIENT_STORAGE => ErrorCode::ResourceExhausted,
        _ => ErrorCode::Internal,
    }
}

/// What a refusal says: the `message` of a JSON object, else the text as it is.
fn words(body: &[u8]) -> String {
    let object = serde_json::from_slice::<serde_json::Value>(body).ok();
    let message = object.as_ref().and_then(|object| object.get("message")?.as_str());
    message.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    use super::super::Token;
    use super::*;

    /// A guest that reads one request, as far as `until` wants it, and then does as it likes.
    async fn guest<F>(
        until: fn(&[u8]) -> bool,
        then: impl FnOnce(TcpStream) -> F + Send + 'static,
    ) -> (Guest, oneshot::Receiver<Vec<u8>>)
    where
        F: Future<Output = ()> + Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let (told, heard) = oneshot::channel();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let (mut request, mut piece) = (Vec::new(), [0; 4096]);
            while !until(&request) {
                match stream.read(&mut piece).await {
                    Ok(0) | Err(_) => break,
                    Ok(read) => request.extend_from_slice(&piece[..read]),
                }
            }
            // Not every test asks.
            drop(told.send(request));
            then(stream).await;
        });
        (Guest::new(address, Token::random()), heard)
    }

    fn has_head(request: &[u8]) -> bool {
        request.windows(4).any(|window| window == b"\r\n\r\n")
    }

    fn is_whole(request: &[u8]) -> bool {
        request.ends_with(b"\r\n0\r\n\r\n")
    }

    /// Answers with these bytes and closes.
    async fn answers(bytes: &'static [u8]) -> Guest {
        let then = move |mut stream: TcpStream| async move {
            // Who has heard enough closes.
            drop(stream.write_all(bytes).await);
        };
        guest(has_head, then).await.0
    }

    /// Sends the first bytes, and then the second without end.
    async fn never_ends(first: &'static [u8], again: &'static [u8]) -> Guest {
        let then = move |mut stream: TcpStream| async move {
            drop(stream.write_all(first).await);
            while stream.write_all(again).await.is_ok() {}
        };
        guest(has_head, then).await.0
    }

    async fn read(guest: &Guest) -> Result<Vec<u8>, GuestError> {
        guest.read_file("/a").await?.whole(100_000).await
    }

    #[tokio::test]
    async fn a_file_is_read_whole_or_not_at_all() {
        let whole = answers(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").await;
        assert_eq!(read(&whole).await.expect("read"), b"hello");
        for broken in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello"[..],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nhello",
            b"\xff\xfe\x00\x01",
            b"",
        ] {
            let error = read(&answers(broken).await).await.expect_err("broken");
            assert!(matches!(error, GuestError::Http { .. }), "{error:?}");
        }
    }

    #[tokio::test]
    async fn what_never_ends_is_given_up() {
        let body = never_ends(b"HTTP/1.1 200 OK\r\n\r\n", &[b'x'; 4096]).await;
        assert!(matches!(read(&body).await, Err(GuestError::TooLarge(100_000))));
        let head = never_ends(b"HTTP/1.1 200 OK\r\n", b"X-Header: and another, and another\r\n").await;
        assert!(matches!(read(&head).await, Err(GuestError::Http { .. })));
        let refusal = never_ends(b"HTTP/1.1 404 Not Found\r\n\r\n", &[b'x'; 4096]).await;
        assert!(matches!(
            read(&refusal).await,
            Err(GuestError::File {
                code: ErrorCode::NotFound,
                ..
            })
        ));
    }

    #[tokio::test]
    async fn a_guest_that_neither_gives_nor_takes_more_of_a_file_is_given_up() {
        let stays = |head: &'static [u8]| {
            move |mut stream: TcpStream| async move {
                stream.write_all(head).await.expect("sent");
                std::future::pending::<()>().await;
                drop(stream);
            }
        };
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf";
        let (giving, _) = guest(has_head, stays(head)).await;
        let mut reading = giving.read_file("/a").await.expect("begun");
        assert_eq!(reading.next().await.expect("read").expect("a piece"), "half");
        let (taking, _) = guest(has_head, stays(b"")).await;
        let mut writing = taking.write_file("/a").await.expect("begun");
        // From here on nothing happens but that time passes.
        tokio::time::pause();
        let error = reading.next().await.expect_err("read on");
        assert!(matches!(error, GuestError::BadStream("fell silent")), "{error:?}");
        let error = loop {
            if let Err(error) = writing.send(Bytes::from_static(&[b'x'; 65536])).await {
                break error;
            }
        };
        assert!(
            matches!(error, GuestError::BadStream("did not come: it took nothing more")),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn a_refusal_has_its_code_and_words_that_can_be_shown() {
        let named = answers(b"HTTP/1.1 404 Not Found\r\n\r\n{\"message\": \"no /a \\u001b[31m here\"}");
        let error = read(&named.await).await.expect_err("refused");
        let GuestError::File { code, message } = error else {
            panic!("{error:?}")
        };
        assert_eq!((code, message.as_str()), (ErrorCode::NotFound, "no /a ?[31m here"));
        for (status, expected) in [
            (400, ErrorCode::InvalidArgument),
            (401, ErrorCode::Internal),
            (403, ErrorCode::PermissionDenied),
            (507, ErrorCode::ResourceExhausted),
            (500, ErrorCode::Internal),
        ] {
            assert_eq!(code_of(status), expected, "{status}");
        }
    }

    fn code_of(status: u16) -> ErrorCode {
        code(StatusCode::from_u16(status).expect("a status"))
    }

    #[tokio::test]
    async fn a_file_is_written_as_a_form_that_ends_with_it() {
        let then = |mut stream: TcpStream| async move {
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]";
            stream.write_all(answer).await.expect("answered");
        };
        let (guest, heard) = guest(is_whole, then).await;
        let mut writing = guest.write_file("/dir/a b&c").await.expect("begun");
        for piece in [&b"one "[..], b"two"] {
            writing.send(Bytes::from_static(piece)).await.expect("sent");
        }
        writing.finish().await.expect("written");
        let request = String::from_utf8(heard.await.expect("heard")).expect("text");
        assert!(
            request.starts_with("POST /files?path=%2Fdir%2Fa+b%26c HTTP/1.1\r\n"),
            "{request}"
        );
        let contents: String = request
            .split("\r\n")
            .filter(|line| ["one ", "two"].contains(line))
            .collect();
        assert_eq!(contents, "one two", "{request}");
        assert!(
            request.contains("--\r\n\r\n0\r\n\r\n") || request.ends_with("--\r\n\r\n0\r\n\r\n"),
            "{request}"
        );
    }

    #[tokio::test]
    async fn a_file_that_is_given_up_has_no_end() {
        let (guest, heard) = guest(is_whole, |_| async {}).await;
        let mut writing = guest.write_file("/a").await.expect("begun");
        writing.send(Bytes::from_static(b"half")).await.expect("sent");
        drop(writing);
        let request = heard.await.expect("heard");
        assert!(!is_whole(&request), "an envd would take this for the file");
    }

    #[tokio::test]
    async fn a_guest_that_refuses_a_file_under_way_says_why() {
        let then = |mut stream: TcpStream| async move {
            let answer = b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 19\r\n\r\n{\"message\": \"full\"}";
            stream.write_all(answer).await.expect("answered");
        };
        let (full, _) = guest(has_head, then).await;
        let (gone, _) = guest(has_head, |stream| async { drop(stream) }).await;
        for (guest, is_told) in [(full, true), (gone, false)] {
            let mut writing = guest.write_file("/a").await.expect("begun");
            let error = loop {
                // Until the answer is noticed; with luck only at the end.
                if let Err(error) = writing.send(Bytes::from_static(&[b'x'; 65536])).await {
                    break error;
                }
            };
            let says_full =
                matches!(&error, GuestError::File { code: ErrorCode::ResourceExhausted, message } if message == "full");
            // Who closes with bytes unread may have its answer lost on the way.
            assert!(says_full || matches!(error, GuestError::Http { .. }), "{error:?}");
            assert!(is_told || !says_full);
        }
    }
}

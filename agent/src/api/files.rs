//! Files of a sandbox over the API.
//!
//! Holds: a stream of a file costs a few pieces of memory, whatever its size; whole files are bounded in size, and few of them are held
//! at a time.

use std::sync::Arc;

use bytes::Bytes;
use connectrpc::InboundStream;
use futures::stream::{self, Stream, StreamExt as _};
use roost_common::guest::filesystem::{EntryInfo, FileType};
use roost_hostagent::hostagent::v1::*;
use tokio::sync::Semaphore;

use super::errors::ApiError;
use super::process::while_running;
use super::service::Service;
use crate::guest::files::Reading;
use crate::guest::{Guest, GuestError};

/// Largest file that a call takes or returns whole.
pub(crate) const MAX_WHOLE: usize = 32 << 20;
/// How many are held at a time; others wait.
const WHOLE_AT_A_TIME: usize = 8;
/// Bytes of a file in one message.
const CHUNK: usize = 64 << 10;
/// Longest path: the kernel's.
const MAX_PATH: usize = 4096;
/// Most levels of a directory that are listed at once.
const MAX_DEPTH: u32 = 100;

/// A file of which pieces are to be had in messages.
struct Chunks {
    reading: Option<Reading>,
    /// What has come and not been sent.
    left: Bytes,
}

impl Chunks {
    /// The next message's worth, as it comes: nothing waits for a message to be full.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, GuestError> {
        if self.left.is_empty() {
            let Some(piece) = self.reading.as_mut().expect("opened before").next().await? else {
                return Ok(None);
            };
            self.left = piece;
        }
        let chunk = self.left.split_to(self.left.len().min(CHUNK));
        Ok(Some(chunk.to_vec()))
    }
}

impl Service {
    pub(super) async fn write_whole(&self, request: WriteFileRequest) -> Result<(), ApiError> {
        let path = path(request.path)?;
        let content = Bytes::from(request.content);
        self.ask(&request.sandbox_id, async |guest: Arc<Guest>| {
            let mut writing = guest.write_file(&path).await?;
            writing.send(content).await?;
            writing.finish().await
        })
        .await
    }

    pub(super) async fn read_whole(&self, sandbox: &str, name: &str) -> Result<Vec<u8>, ApiError> {
        let path = path(name.to_owned())?;
        let _place = self.whole_files().acquire().await.expect("never closed");
        self.ask(sandbox, async |guest: Arc<Guest>| {
            guest.read_file(&path).await?.whole(MAX_WHOLE).await
        })
        .await
    }

    /// Writes what comes. Where that breaks off, the file is as it was.
    pub(super) async fn write_streamed(
        &self,
        mut requests: InboundStream<WriteFileStreamRequest>,
    ) -> Result<(), ApiError> {
        use write_file_stream_request::Content;
        let first = requests.next().await.transpose().map_err(ApiError::Caller)?;
        let Some(Content::Meta(meta)) = first.and_then(|message| message.to_owned_message().content) else {
            return Err(ApiError::BadCommand("the first message of a file is its meta"));
        };
        let path = path(meta.path)?;
        let mut broken = None;
        let written = self
            .ask(&meta.sandbox_id, async |guest: Arc<Guest>| {
                let mut writing = guest.write_file(&path).await?;
                while let Some(message) = requests.next().await {
                    let content = match message {
                        Ok(message) => message.to_owned_message().content,
                        Err(error) => {
                            broken = Some(ApiError::Caller(error));
                            return Err(GuestError::Aborted);
                        }
                    };
                    match content {
                        Some(Content::Chunk(chunk)) if !chunk.is_empty() => writing.send(chunk.into()).await?,
                        Some(Content::Chunk(_)) | None => {}
                        Some(Content::Meta(_)) => {
                            broken = Some(ApiError::BadCommand("a file has one meta, before its bytes"));
                            return Err(GuestError::Aborted);
                        }
                    }
                }
                writing.finish().await
            })
            .await;
        match broken {
            Some(error) => Err(error),
            None => written,
        }
    }

    pub(super) fn stream_file(
        &self,
        sandbox: &str,
        name: &str,
    ) -> Result<impl Stream<Item = Result<Vec<u8>, ApiError>> + Send + use<>, ApiError> {
        let path = path(name.to_owned())?;
        let (handle, guest) = self.running(sandbox)?;
        let in_use = handle.begin_use();
        let chunks = Chunks {
            reading: None,
            left: Bytes::new(),
        };
        let state = Some((chunks, path, handle, guest, in_use));
        Ok(stream::unfold(state, |state| async move {
            let (mut chunks, path, handle, guest, in_use) = state?;
            let next = async {
                if chunks.reading.is_none() {
                    chunks.reading = Some(guest.read_file(&path).await?);
                }
                chunks.next().await
            };
            match while_running(&handle, &guest, next).await {
                Ok(chunk) => Some((Ok(chunk?), Some((chunks, path, handle, guest, in_use)))),
                Err(error) => Some((Err(error), None)),
            }
        }))
    }

    pub(super) async fn list_dir_of(&self, request: ListDirRequest) -> Result<Vec<FileEntry>, ApiError> {
        let path = path(request.path)?;
        if request.depth > MAX_DEPTH {
            return Err(ApiError::BadCommand("depth is at most 100"));
        }
        let list = async |guest: Arc<Guest>| guest.list_dir(path, request.depth).await;
        let entries = self.ask(&request.sandbox_id, list).await?;
        Ok(entries.into_iter().map(entry).collect())
    }

    pub(super) async fn make_dir_in(&self, sandbox: &str, name: &str) -> Result<FileEntry, ApiError> {
        let path = path(name.to_owned())?;
        let made = self.ask(sandbox, async |guest: Arc<Guest>| guest.make_dir(path).await);
        made.await.map(entry)
    }

    pub(super) async fn remove_in(&self, sandbox: &str, name: &str) -> Result<(), ApiError> {
        let path = path(name.to_owned())?;
        self.ask(sandbox, async |guest: Arc<Guest>| guest.remove(path).await)
            .await
    }
}

/// Places for whole files.
pub(super) fn places() -> Semaphore {
    Semaphore::new(WHOLE_AT_A_TIME)
}

fn path(path: String) -> Result<String, ApiError> {
    if path.is_empty() || path.len() > MAX_PATH || path.contains('\0') {
        return Err(ApiError::BadCommand(
            "path is empty, has more than 4096 bytes, or a NUL among them",
        ));
    }
    Ok(path)
}

fn entry(info: EntryInfo) -> FileEntry {
    let kind = match info.r#type.as_known() {
        // Guest agents of this family say of a link what it leads to.
        _ if info.symlink_target.is_some() => "symlink",
        Some(FileType::FILE_TYPE_DIRECTORY) => "directory",
        Some(FileType::FILE_TYPE_SYMLINK) => "symlink",
        // Devices and sockets have no word of their own.
        Some(FileType::FILE_TYPE_FILE | FileType::FILE_TYPE_UNSPECIFIED) | None => "file",
    };
    FileEntry {
        name: info.name,
        path: info.path,
        r#type: kind.to_owned(),
        size: info.size,
        mode: info.mode,
        permissions: info.permissions,
        owner: info.owner,
        group: info.group,
        modified_at: info.modified_time.into_option().map_or(0, |time| time.seconds),
        symlink_target: info.symlink_target,
        ..FileEntry::default()
    }
}

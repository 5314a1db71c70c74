//! Sending an image to the agent: what is in it and not its holes, in pieces, and its checksum behind them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use futures::stream;
use indicatif::ProgressBar;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::super::CliError;
use super::super::client::Operator;
use crate::snapshot::copy::{next_data, nonzero};
use crate::templates::digest::{self, Digest, PIECE};
use roost_hostagent::roost::v1::import_template_request::Content;
use roost_hostagent::roost::v1::{
    ImportTemplateEnd, ImportTemplateHeader, ImportTemplatePiece, ImportTemplateRequest, ImportTemplateResponse,
};

/// Messages that are ready and not sent yet.
const AHEAD: usize = 4;
/// Unit of what is sent.
const BLOCK: u64 = 4096;

/// Why an image is not sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    /// The image that was made.
    #[error("{} cannot be read", path.display())]
    Read {
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An image to be sent.
pub(super) struct Image {
    path: PathBuf,
    file: File,
    pub(super) length: u64,
    /// Bytes of blocks that are not all zeros.
    data: u64,
    digest: Digest,
}

impl Image {
    /// Opens an image and reads it once, for its checksum and for how much there is to send. Blocks.
    pub(super) fn open(path: &Path) -> Result<Self, UploadError> {
        let failed = |source| UploadError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let read = digest::read(&file, |_| true).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            length: read.length,
            data: read.data,
            digest: read.digest,
        })
    }
}

fn message(content: Content) -> ImportTemplateRequest {
    ImportTemplateRequest {
        content: Some(content),
        ..ImportTemplateRequest::default()
    }
}

/// Sends an image as a template.
pub(super) async fn send(
    operator: &Operator,
    team: &str,
    template: Uuid,
    name: &str,
    image: Image,
    bar: &ProgressBar,
) -> Result<ImportTemplateResponse, CliError> {
    let header = ImportTemplateHeader {
        team_id: team.to_owned(),
        template_id: template.to_string(),
        name: name.to_owned(),
        length: image.length,
        data_bytes: image.data,
        ..ImportTemplateHeader::default()
    };
    bar.set_length(image.data);
    bar.set_position(0);
    let (sender, messages) = mpsc::channel(AHEAD);
    let read = tokio::task::spawn_blocking({
        let bar = bar.clone();
        move || read_all(header, &image, &sender, &bar)
    });
    let messages = stream::unfold(messages, |mut messages| async {
        let message = messages.recv().await?;
        Some((message, messages))
    });
    let answer = operator.import_template(Box::pin(messages)).await;
    // Where that failed, this has heard of it: its messages are not taken any more.
    read.await
        .expect("reading does not panic")
        .map_err(super::build::BuildError::from)?;
    Ok(answer?.into_owned())
}

/// Makes all messages. Blocks; ends when nobody takes them any more.
fn read_all(
    header: ImportTemplateHeader,
    image: &Image,
    to: &mpsc::Sender<ImportTemplateRequest>,
    bar: &ProgressBar,
) -> Result<(), UploadError> {
    let failed = |source| UploadError::Read {
        path: image.path.clone(),
        source,
    };
    let is_taken = |content| to.blocking_send(message(content)).is_ok();
    if !is_taken(Content::Header(Box::new(header))) {
        return Ok(());
    }
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while let Some((start, _)) = next_data(&image.file, at, image.length).map_err(failed)? {
        // Data may begin within a block of ours, where those of the filesystem are smaller.
        at = start - start % BLOCK;
        let some = usize::try_from(image.length - at).map_or(PIECE, |rest| rest.min(PIECE));
        let piece = &mut buffer[..some];
        image.file.read_exact_at(piece, at).map_err(failed)?;
        for (start, end) in nonzero(piece) {
            let content = ImportTemplatePiece {
                offset: at + start as u64,
                data: piece[start..end].to_vec(),
                ..ImportTemplatePiece::default()
            };
            bar.inc((end - start) as u64);
            if !is_taken(Content::Piece(Box::new(content))) {
                return Ok(());
            }
        }
        at += some as u64;
    }
    let end = ImportTemplateEnd {
        digest: image.digest.to_string(),
        ..ImportTemplateEnd::default()
    };
    is_taken(Content::End(Box::new(end)));
    Ok(())
}

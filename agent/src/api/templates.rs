//! Templates over the API: those that are imported, and what is to be known of all of them.
//!
//! Holds: an import costs a few pieces of memory, whatever its size; few are made, and fewer read through, at a time. File work is done on a
//! blocking thread that hears of a caller that goes away by the end of its channel or its flag, and removes what it has made itself.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use connectrpc::InboundStream;
use futures::stream::StreamExt as _;
use roost_common::units::{Bytes, Mebibytes};
use roost_hostagent::roost::v1::*;
use tokio::sync::{Semaphore, mpsc};

use super::errors::ApiError;
use super::service::Service;
use crate::host::files::blocking;
use crate::host::images::TemplateRef;
use crate::registry::Refusal;
use crate::sandbox::plan;
use crate::templates::TemplateError;
use crate::templates::digest::Digest;
use crate::templates::import::{Header, Part, import};
use crate::templates::look::{self, Outcome};

/// How many are imported at a time; others wait.
const IMPORTS: usize = 4;
/// How many are read through at a time: each keeps a processor and a disk busy.
const READS: usize = 2;
/// Pieces that have come and are not written yet.
const AHEAD: usize = 4;
/// How long an import may be silent.
const SILENCE: Duration = Duration::from_secs(120);
/// Bytes after which an import asks whether there is still room.
const STRETCH: u64 = 64 << 20;

/// Places for work on templates.
#[derive(Debug)]
pub(super) struct Places {
    imports: Semaphore,
    reads: Semaphore,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            imports: Semaphore::new(IMPORTS),
            reads: Semaphore::new(READS),
        }
    }
}

/// Says stop when it goes.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Service {
    pub(super) async fn import_template(
        &self,
        mut requests: InboundStream<ImportTemplateRequest>,
    ) -> Result<ImportTemplateResponse, ApiError> {
        use import_template_request::Content;
        let registry = self.ready()?;
        let Some(Content::Header(header)) = content(&mut requests).await? else {
            return Err(ApiError::BadCommand("the first message of an import is its header"));
        };
        let header = Header {
            template: plan::template(&header.team_id, &header.template_id)?,
            name: plan::name(header.name)?,
            length: header.length,
            data: header.data_bytes,
        };
        let host = registry.host();
        let most = Mebibytes(host.config().max_disk_mb).bytes().0;
        header.check(most).map_err(TemplateError::from)?;
        let _place = self.places().imports.acquire().await.expect("never closed");
        registry.takes_work(header.data)?;
        let (sender, parts) = mpsc::channel(AHEAD);
        let images = host.layout.images();
        // It goes on to where the parts end. Where that is not their end, because this call failed or was dropped, it leaves nothing.
        let made = tokio::spawn(blocking(move || import(&images, header, parts)));
        let forwarded = forward(requests, sender, || registry.has_room()).await;
        let made = made.await.expect("file work does not panic");
        forwarded?;
        let (digest, size) = made?;
        tracing::info!(op = "import", bytes = size.0, "a template was imported");
        Ok(ImportTemplateResponse {
            digest: digest.to_string(),
            size_bytes: i64::try_from(size.0).unwrap_or(i64::MAX),
            ..ImportTemplateResponse::default()
        })
    }

    pub(super) async fn list_templates(&self) -> Result<Vec<Template>, ApiError> {
        let images = self.ready()?.host().layout.images();
        let found = blocking(move || look::list(&images)).await?;
        let users = self.users()?;
        Ok(found.into_iter().map(|found| message(found, &users)).collect())
    }

    pub(super) async fn inspect_template(
        &self,
        team: &str,
        template: &str,
    ) -> Result<InspectTemplateResponse, ApiError> {
        let which = plan::template(team, template)?;
        let images = self.ready()?.host().layout.images();
        let found = blocking(move || look::look(&images, which)).await;
        let found = found.ok_or_else(|| TemplateError::unknown(which))?;
        let about = found.memory.as_ref().and_then(|memory| memory.about.clone());
        let mebibytes = |bytes: Bytes| i32::try_from(bytes.0 >> 20).unwrap_or(i32::MAX);
        let memory = about.map(|about| TemplateMemory {
            vcpus: about.size.vcpus.0.into(),
            memory_mb: mebibytes(about.size.memory.bytes()),
            disk_size_mb: mebibytes(about.size.disk.bytes()),
            kernel_version: about.kernel_version,
            vmm_version: about.vmm_version,
            envd_version: about.envd_version,
            cpu_model: about.cpu.model_name,
            ..TemplateMemory::default()
        });
        Ok(InspectTemplateResponse {
            template: message(found, &self.users()?).into(),
            memory: memory.into(),
            ..InspectTemplateResponse::default()
        })
    }

    pub(super) async fn verify_template(&self, team: &str, template: &str) -> Result<Vec<VerifiedFile>, ApiError> {
        let which = plan::template(team, template)?;
        let dir = which.dir(&self.ready()?.host().layout.images());
        let _place = self.places().reads.acquire().await.expect("never closed");
        let stop = Arc::new(AtomicBool::new(false));
        let _stop = StopOnDrop(stop.clone());
        let found = blocking(move || {
            if !dir.is_dir() {
                return Err(TemplateError::unknown(which));
            }
            look::verify(&dir, &stop)
        });
        let found = found.await?;
        for file in &found {
            if let Outcome::Differs(how) | Outcome::Unreadable(how) = &file.outcome {
                tracing::error!(template = %which.template, team = %which.team, file = file.file, error = how, "a template is damaged");
            }
        }
        Ok(found.into_iter().map(verified).collect())
    }

    /// How many sandboxes there are of each template.
    fn users(&self) -> Result<HashMap<(uuid::Uuid, uuid::Uuid), u32>, ApiError> {
        let mut users = HashMap::new();
        for handle in self.ready()?.list() {
            *users.entry(key(handle.plan.template)).or_insert(0) += 1;
        }
        Ok(users)
    }
}

/// Passes the parts of an import on, until their end or until nobody takes them any more: then the import has failed, and says why.
async fn forward(
    mut requests: InboundStream<ImportTemplateRequest>,
    to: mpsc::Sender<Part>,
    has_room: impl Fn() -> Result<(), Refusal>,
) -> Result<(), ApiError> {
    use import_template_request::Content;
    let mut stretch = 0;
    loop {
        let part = match content(&mut requests).await? {
            Some(Content::Piece(piece)) => Part::Piece(piece.offset, piece.data),
            Some(Content::End(end)) if end.digest.is_empty() => Part::End(None),
            Some(Content::End(end)) => Part::End(Some(end.digest.parse()?)),
            Some(Content::Header(_)) => {
                return Err(ApiError::BadCommand("an import has one header, before its pieces"));
            }
            None => return Err(ApiError::BadCommand("an import ends with its end")),
        };
        let is_last = matches!(part, Part::End(_));
        if let Part::Piece(_, bytes) = &part {
            stretch += bytes.len() as u64;
            if stretch >= STRETCH {
                stretch = 0;
                has_room()?;
            }
        }
        if to.send(part).await.is_err() || is_last {
            return Ok(());
        }
    }
}

fn key(which: TemplateRef) -> (uuid::Uuid, uuid::Uuid) {
    (which.team, which.template)
}

/// What the next message of an import says; `None` behind the last.
async fn content(
    requests: &mut InboundStream<ImportTemplateRequest>,
) -> Result<Option<import_template_request::Content>, ApiError> {
    loop {
        let next = tokio::time::timeout(SILENCE, requests.next()).await;
        let Some(message) = next.map_err(|_| ApiError::Silent(SILENCE))? else {
            return Ok(None);
        };
        // One that says nothing is as good as none.
        if let Some(content) = message.map_err(ApiError::Caller)?.to_owned_message().content {
            return Ok(Some(content));
        }
    }
}

fn message(found: look::Template, users: &HashMap<(uuid::Uuid, uuid::Uuid), u32>) -> Template {
    let digest = |digest: Option<Digest>| digest.map(|digest| digest.to_string()).unwrap_or_default();
    let (memory_allocated, memory_digest) = match &found.memory {
        Some(memory) => (memory.allocated.0, digest(memory.digest.clone())),
        None => (0, String::new()),
    };
    Template {
        team_id: found.which.team.to_string(),
        template_id: found.which.template.to_string(),
        sandboxes: users.get(&key(found.which)).copied().unwrap_or(0),
        name: found.name,
        made_at_unix: found.made_at_unix,
        rootfs_length: found.rootfs_length.0,
        rootfs_allocated: found.rootfs_allocated.0,
        memory_allocated,
        has_memory: found.memory.is_some(),
        rootfs_digest: digest(found.rootfs_digest),
        memory_digest,
        broken: found.broken.unwrap_or_default(),
        ..Template::default()
    }
}

fn verified(file: look::Verified) -> VerifiedFile {
    let (outcome, detail) = match file.outcome {
        Outcome::Ok => ("ok", String::new()),
        Outcome::Differs(how) => ("differs", how),
        Outcome::Unreadable(how) => ("unreadable", how),
        Outcome::Missing => ("missing", String::new()),
        Outcome::Unchecked => (
            "unchecked",
            "no checksum was taken when the template was made".to_owned(),
        ),
    };
    VerifiedFile {
        file: file.file.to_owned(),
        outcome: outcome.to_owned(),
        detail,
        bytes_read: file.read,
        ..VerifiedFile::default()
    }
}

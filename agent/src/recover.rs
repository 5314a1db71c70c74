//! What an agent does with what it finds when it starts: files of sandboxes, and shims that still run.
//!
//! An agent that was stopped or killed leaves VMs running. This version does not take them over: it ends each shim that it finds,
//! writes a tombstone for each sandbox that had been answered as running, and removes the files. When this has ended, the host is
//! as if no sandbox had been.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use roost_common::ids::SandboxId;
use roost_common::shim::SHIM_SOCKET;

use crate::errors::{Chain, FileError};
use crate::host::shim::{self, ShimFault};
use crate::host::{Host, files};
use crate::sandbox::record::{Phase, Record};
use crate::tombstone::{self, End, Tombstone};

/// Ends what runs and removes what is left. What cannot be removed is logged and tried again at the next start, or when its id is
/// used again: one sandbox's trouble is no reason to keep a host from serving.
///
/// # Errors
/// When the directories themselves cannot be read.
pub async fn recover(host: &Arc<Host>) -> Result<(), FileError> {
    let started = Instant::now();
    let (runs, sandboxes) = (host.layout.vm_runs().to_owned(), host.layout.sandboxes());
    let listed = tokio::task::spawn_blocking(move || {
        Ok::<_, FileError>(
            names(&runs)?
                .into_iter()
                .chain(names(&sandboxes)?)
                .collect::<BTreeSet<String>>(),
        )
    });
    let mut found = BTreeSet::new();
    for name in listed.await.expect("file work does not panic")? {
        // A directory on its way out has its id behind the prefix; what is no id is none of ours.
        let id = name.strip_prefix(".removing-").unwrap_or(&name).parse::<SandboxId>();
        match id {
            Ok(id) => drop(found.insert(id)),
            Err(_) => tracing::warn!(name = %name.escape_debug(), "left alone: its name is no sandbox id"),
        }
    }
    let count = found.len();
    let mut tasks = tokio::task::JoinSet::new();
    for id in found {
        let host = host.clone();
        tasks.spawn(async move { clear(&host, &id).await });
    }
    tasks.join_all().await;
    tracing::info!(
        op = "recover",
        sandboxes = count,
        elapsed_ms = started.elapsed().as_millis(),
        "recovered"
    );
    Ok(())
}

async fn clear(host: &Arc<Host>, id: &SandboxId) {
    let socket = host.layout.vm_run(id).join(SHIM_SOCKET);
    match end_shim(&socket).await {
        Ok(true) => tracing::warn!(sandbox_id = %id, "ended a VM of an earlier agent"),
        Ok(false) => {}
        Err(error) => {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "a shim does not end; its files stay");
            return;
        }
    }
    let (host, id) = (host.clone(), id.clone());
    let removed = tokio::task::spawn_blocking(move || {
        bury(&host, &id);
        if let Err(error) = files::remove_sandbox(&host.layout, &id) {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "files stay");
        }
    });
    removed.await.expect("file work does not panic");
}

/// Whether a shim was there to be ended.
async fn end_shim(socket: &Path) -> Result<bool, ShimFault> {
    match shim::connect(socket).await {
        Ok(link) => link.kill().await.map(|_| true),
        // No socket, or nobody behind it: the shim has gone, and its VMM with it.
        Err(ShimFault::Unreachable { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// A sandbox whose create was answered gets a tombstone; of one that was still being built nobody knows.
fn bury(host: &Host, id: &SandboxId) {
    let record = match Record::read(&host.layout, id) {
        Ok(record) => record,
        Err(error) => {
            tracing::debug!(sandbox_id = %id, error = %Chain(&error), "no record");
            return;
        }
    };
    match record.phase {
        Phase::Creating => {}
        Phase::Running => {
            let tombstone = Tombstone::new(id, record.created_at_unix, End::AgentRestarted);
            if let Err(error) = tombstone::bury(&host.layout, &tombstone) {
                tracing::error!(sandbox_id = %id, error = %Chain(&error), "no tombstone");
            }
        }
    }
}

fn names(dir: &Path) -> Result<Vec<String>, FileError> {
    let failed = |source| FileError::new("reading", dir, source);
    std::fs::read_dir(dir)
        .map_err(failed)?
        .map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned()))
        .collect()
}

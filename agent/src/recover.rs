//! What an agent does with what it finds when it starts: files of sandboxes, and shims that still run.
//!
//! An agent that was stopped or killed leaves VMs running. This version does not take them over: it ends each shim that it finds,
//! writes a tombstone for each sandbox that had been answered as running, and removes the files. When this has ended, the host is
//! as if no sandbox had been.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use nix::fcntl::OFlag;
use roost_common::ids::{SandboxId, Slot};
use roost_common::shim::{EXIT_FILE, Exit, MAX_EXIT_FILE};

use crate::errors::{Chain, FileError};
use crate::host::files::Layout;
use crate::registry::Registry;
use crate::sandbox::build;
use crate::sandbox::plan::Plan;
use crate::sandbox::record::{Phase, Record};
use crate::tombstone::{self, End, Tombstone};

/// Ends what runs and removes what is left. What cannot be removed becomes a sandbox of the registry that is on its way out: one
/// sandbox's trouble is no reason to keep a host from serving.
///
/// # Errors
/// When the directories themselves cannot be read.
pub async fn recover(registry: &Arc<Registry>) -> Result<(), FileError> {
    let started = Instant::now();
    let layout = &registry.host().layout;
    let (runs, sandboxes) = (layout.vm_runs().to_owned(), layout.sandboxes());
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
        let registry = registry.clone();
        tasks.spawn(async move { clear(&registry, id).await });
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

async fn clear(registry: &Arc<Registry>, id: SandboxId) {
    let host = registry.host();
    let read = tokio::task::spawn_blocking({
        let (host, id) = (host.clone(), id.clone());
        move || (Record::read(&host.layout, &id), read_exit(&host.layout, &id))
    });
    let (record, exit) = read.await.expect("file work does not panic");
    let record = record
        .inspect_err(|error| tracing::debug!(sandbox_id = %id, error = %Chain(error), "no record"))
        .ok();
    let outcome = build::tear_down(host, &id, None).await;
    // A sandbox whose create was answered gets a tombstone; of one that was still being built nobody knows.
    if let Some(record) = record.as_ref().filter(|record| record.phase == Phase::Running) {
        let end = exit.as_ref().map_or(End::AgentRestarted, End::Vmm);
        let tombstone = Tombstone::new(&id, record.created_at_unix, end);
        tracing::warn!(sandbox_id = %id, reason = %tombstone.summary(), "ended a sandbox of an earlier agent");
        let host = host.clone();
        let written = tokio::task::spawn_blocking(move || tombstone::bury_once(&host.layout, &tombstone));
        if let Err(error) = written.await.expect("file work does not panic") {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "no tombstone");
        }
    }
    if let Err(error) = outcome {
        tracing::error!(sandbox_id = %id, error = %Chain(&error), "a sandbox of an earlier agent stays; it is tried again");
        let slot = record.as_ref().and_then(|record| Slot::try_from(record.slot).ok());
        let plan = record.map_or_else(|| Plan::unknown(id), |record| record.plan);
        registry.take_remains(plan, slot);
    }
}

/// How the VMM ended, where its shim has written that down: it ended while no agent was there to be told.
fn read_exit(layout: &Layout, id: &SandboxId) -> Option<Exit> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(layout.vm_run(id).join(EXIT_FILE))
        .ok()?;
    // The VM's uid may write in this directory.
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut content = Vec::new();
    file.take(MAX_EXIT_FILE as u64 + 1).read_to_end(&mut content).ok()?;
    Exit::from_json(&content).ok()
}

fn names(dir: &Path) -> Result<Vec<String>, FileError> {
    let failed = |source| FileError::new("reading", dir, source);
    std::fs::read_dir(dir)
        .map_err(failed)?
        .map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned()))
        .collect()
}

//! The event monitor: one pretty-printed JSON object per event and an empty line, as cloud-hypervisor writes them.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde_json::json;

/// Where events go.
pub(crate) struct Events {
    monitor: Option<Mutex<File>>,
    start: Instant,
}

impl Events {
    /// Events to this descriptor, or to nobody.
    pub(crate) fn new(monitor: Option<OwnedFd>) -> Result<Self> {
        if let Some(fd) = &monitor {
            // A reader that does not read must not stop the VM.
            let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Self {
            monitor: monitor.map(|fd| Mutex::new(File::from(fd))),
            start: Instant::now(),
        })
    }

    /// Sends one event; one that the reader has no room for is lost.
    pub(crate) fn send(&self, source: &str, event: &str) {
        let Some(monitor) = &self.monitor else { return };
        let elapsed = self.start.elapsed();
        let timestamp = json!({ "secs": elapsed.as_secs(), "nanos": elapsed.subsec_nanos() });
        let object = json!({ "timestamp": timestamp, "source": source, "event": event, "properties": null });
        let text = format!("{object:#}\n\n");
        let written = monitor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(text.as_bytes());
        if let Err(error) = written
            && error.kind() != ErrorKind::WouldBlock
        {
            eprintln!("standin-vmm: event monitor: {error}");
        }
    }
}

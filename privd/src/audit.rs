//! One line per call: who, what, as part of what, with which arguments, how it ended, how long it took. At `info` whatever the outcome, so that
//! the journal of this daemon is the list of everything that was ever made by it; at `debug` what only looks, and was let.

use std::fmt::{self, Write as _};
use std::time::Duration;

use roost_common::privd::{EgressPolicy, Internet, PrivdError};

use tarpc::context::Context;

use crate::check::Peer;

/// A call, as its line shows it.
#[derive(Debug)]
pub(crate) struct Entry {
    /// The verb.
    pub(crate) op: &'static str,
    /// Whether it makes nothing.
    only_looks: bool,
    /// Its arguments, then what was made: `name=value` pairs.
    fields: String,
}

impl Entry {
    /// A call of `op`, of the trace that its context names.
    pub(crate) fn new(op: &'static str, context: &Context) -> Self {
        let entry = Self {
            op,
            only_looks: false,
            fields: String::new(),
        };
        let trace_id = context.trace_context.trace_id;
        if trace_id.is_none() {
            entry
        } else {
            entry.with("trace_id", format_args!("{:032x}", u128::from(trace_id)))
        }
    }

    /// A call of `op`, which makes nothing. The agent's own come every half minute.
    pub(crate) fn looking(op: &'static str, context: &Context) -> Self {
        Self {
            only_looks: true,
            ..Self::new(op, context)
        }
    }

    /// Adds a field. Values are numbers, ids and addresses, checked by their types, so they need no quoting.
    pub(crate) fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.add(name, value);
        self
    }

    /// Adds a field.
    pub(crate) fn add(&mut self, name: &str, value: impl fmt::Display) {
        let space = if self.fields.is_empty() { "" } else { " " };
        write!(self.fields, "{space}{name}={value}").expect("writing to a string does not fail");
    }

    /// Adds a policy's fields.
    pub(crate) fn with_policy(self, policy: &EgressPolicy) -> Self {
        let internet = match policy.internet {
            Internet::Open => "open",
            Internet::Listed => "listed",
            Internet::Closed => "closed",
        };
        let resolvers: Vec<_> = policy.resolvers.iter().map(ToString::to_string).collect();
        self.with("internet", internet)
            .with("resolvers", format_args!("[{}]", resolvers.join(",")))
            .with("allowed", policy.allowed.len())
            .with("denied", policy.denied.len())
            .with("proxied", policy.proxied)
    }

    /// Writes the line.
    pub(crate) fn write(&self, peer: Peer, outcome: Result<(), &PrivdError>, elapsed: Duration) {
        // Of microseconds, so that three digits follow the point and not fifteen.
        let micros = u32::try_from(elapsed.as_micros()).unwrap_or(u32::MAX);
        let elapsed_ms = f64::from(micros) / 1000.0;
        let Self { op, only_looks, fields } = self;
        let Peer { uid, pid } = peer;
        // A level is fixed where a line is written.
        macro_rules! done {
            ($level:ident) => {
                tracing::$level!(
                    peer_uid = uid,
                    peer_pid = pid,
                    op,
                    elapsed_ms,
                    result = "done",
                    "{fields}"
                )
            };
        }
        match outcome {
            Ok(()) if *only_looks => done!(debug),
            Ok(()) => done!(info),
            Err(error) => {
                tracing::info!(peer_uid = uid, peer_pid = pid, op, elapsed_ms, result = "refused", %error, "{fields}");
            }
        }
    }
}

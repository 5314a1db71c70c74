//! A task's part in what its sandbox may reach: the record, the network, and the listeners for connections by name keep to one policy.

use std::sync::Arc;
use std::time::Duration;

use roost_common::net::SlotAddresses;

use super::Driver;
use crate::egress::Egress;
use crate::egress::by_name::ByName;
use crate::errors::Chain;
use crate::host::counters;
use crate::sandbox::record::{Record, RecordError};
use crate::sandbox::{EgressFailure, Sandbox, Vm};

/// How long a record may take to be written; one that takes longer is written all the same.
const RECORD_LIMIT: Duration = Duration::from_secs(30);

impl Driver {
    /// Writes down what a sandbox may reach, and has its network keep to it.
    pub(super) async fn set_egress(&self, sandbox: &mut Sandbox<Vm>, egress: Egress) -> Result<(), EgressFailure> {
        let (host, id) = (self.host.clone(), self.handle.plan.id.clone());
        match sandbox {
            Sandbox::Running(state) => {
                let vm = &mut state.vm;
                let mut record = vm.record.clone();
                record.plan.egress = egress.clone();
                let (written, writes) = (record.clone(), vm.writes.clone());
                // A task of its own: it keeps its turn when it is given up.
                let written = self.start(async move { writes.run(move || written.write(&host.layout)).await });
                let written = tokio::time::timeout(RECORD_LIMIT, written).await;
                written
                    .map_err(|_| EgressFailure::Slow(RECORD_LIMIT))?
                    .expect("file work does not panic")?;
                vm.record = record;
                let policy = egress.policy(&self.host.resolvers());
                self.egress.send_replace(Arc::new(egress));
                // Only then: no network is ever narrower or wider for good than what is written down.
                Ok(counters::set_policy(&self.host, &id, policy).await?)
            }
            Sandbox::Paused(_) => {
                let changed = egress.clone();
                let written = tokio::task::spawn_blocking(move || {
                    let mut record = Record::read(&host.layout, &id)?;
                    record.plan.egress = changed;
                    record.write(&host.layout).map_err(RecordError::from)
                });
                written.await.expect("file work does not panic")?;
                self.egress.send_replace(Arc::new(egress));
                Ok(())
            }
            Sandbox::Creating(_)
            | Sandbox::Pausing(_)
            | Sandbox::Resuming(_)
            | Sandbox::Capturing(_)
            | Sandbox::Unreachable(_)
            | Sandbox::Destroying(_)
            | Sandbox::Gone => Err(EgressFailure::Refused(sandbox.name())),
        }
    }

    /// Has the network of a VM of an earlier agent keep to what is written down: that one may have ended between the two, or had other
    /// resolvers.
    pub(super) async fn restore_egress(&self, sandbox: &Sandbox<Vm>) {
        if !matches!(sandbox, Sandbox::Running(_)) {
            return;
        }
        let id = &self.handle.plan.id;
        let policy = self.handle.egress().policy(&self.host.resolvers());
        if let Err(error) = counters::set_policy(&self.host, id, policy).await {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "its network may not keep to its policy: say that again (UpdateSandboxPolicy)");
        }
    }

    /// Listens for connections by name where there may be a guest that makes some, and where its policy has names.
    pub(super) fn serve_by_name(&mut self, sandbox: &Sandbox<Vm>) {
        let has_guest = !matches!(sandbox, Sandbox::Paused(_) | Sandbox::Destroying(_) | Sandbox::Gone);
        if !has_guest || !self.egress.borrow().goes_by_name() {
            self.by_name = None;
        } else if self.by_name.is_none() {
            let (handle, id) = (&self.handle, self.handle.plan.id.clone());
            let addresses = SlotAddresses::of(handle.slot.slot());
            match ByName::start(id.clone(), &addresses, handle.egress.clone(), handle.by_name.clone()) {
                Ok(by_name) => self.by_name = Some(by_name),
                Err(error) => {
                    tracing::error!(sandbox_id = %id, error = %Chain(&error), "no connection by name is served: names lead nowhere");
                }
            }
        }
    }
}

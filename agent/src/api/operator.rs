//! The procedures of `roost.v1`.

use std::sync::Arc;

use connectrpc::{Encodable, RequestContext, Response, ServiceRequest, ServiceResult};
use roost_hostagent::roost::v1::*;

use super::errors::ApiError;
use super::service::Service;
use crate::drain::{Drained, drain};
use crate::tombstone::{self, Tombstone};

/// The service; the same state as [`Service`].
#[derive(Debug)]
pub struct Operator(pub Arc<Service>);

impl Operator {
    async fn find_tombstone(&self, id: &str) -> Result<Tombstone, ApiError> {
        let registry = self.0.ready()?;
        let id = id.parse().map_err(ApiError::BadId)?;
        if registry.find(&id).is_some() {
            return Err(ApiError::NotEnded { id });
        }
        let host = registry.host().clone();
        let found = tokio::task::spawn_blocking(move || tombstone::find(&host.layout, &id).ok_or(id));
        let found = found.await.expect("file work does not panic");
        found.map_err(|id| ApiError::NoSandbox { id, why: None })
    }
}

impl RoostService for Operator {
    async fn why<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, WhyRequest>,
    ) -> ServiceResult<impl Encodable<WhyResponse> + Send + use<'a>> {
        let found = self.find_tombstone(request.sandbox_id).await?;
        Response::ok(WhyResponse {
            summary: found.summary(),
            reason: found.reason.name().into(),
            sandbox_id: found.sandbox_id,
            exit_code: found.exit_code,
            signal: found.signal,
            created_at_unix: found.created_at_unix,
            ended_at_unix: found.ended_at_unix,
            console_tail: found.console_tail,
            vmm_log_tail: found.vmm_log_tail,
            ..WhyResponse::default()
        })
    }

    async fn drain<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, DrainRequest>,
    ) -> ServiceResult<impl Encodable<DrainResponse> + Send + use<'a>> {
        let registry = self.0.ready()?.clone();
        // Goes on when the caller does not wait; who asks again waits for the same sandboxes.
        let drained = tokio::spawn(async move { drain(&registry).await });
        let Drained {
            paused,
            destroyed,
            failed,
        } = drained.await.expect("a drain does not panic");
        let words = |ids: Vec<roost_common::ids::SandboxId>| ids.iter().map(ToString::to_string).collect();
        Response::ok(DrainResponse {
            paused_sandbox_ids: words(paused),
            destroyed_sandbox_ids: words(destroyed),
            failed_sandbox_ids: words(failed),
            ..DrainResponse::default()
        })
    }
}

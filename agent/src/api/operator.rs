//! The procedures of `roost.v1`.

use std::io;
use std::sync::Arc;

use connectrpc::{Encodable, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures::stream::Stream;
use roost_common::ring;
use roost_common::shim::{CONSOLE_FILE, LOG_FILE};
use roost_hostagent::hostagent::v1::EgressPolicy;
use roost_hostagent::roost::v1::*;

use super::errors::ApiError;
use super::service::{Service, streamed};
use super::{policy, process};
use crate::drain::{Drained, drain};
use crate::egress::Egress;
use crate::errors::FileError;
use crate::guest::process::{Channel, Command, Event, Input, Selector, What};
use crate::host::counters;
use crate::host::files::{blocking, open_of_vm};
use crate::sandbox::plan::{self, WishError};
use crate::sandbox::task::View;
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

    fn start_command(
        &self,
        request: StartRequest,
    ) -> Result<impl Stream<Item = Result<Event, ApiError>> + Send + use<>, ApiError> {
        let terminal = request.terminal.into_option();
        let input = match terminal {
            Some(_) if request.stdin => {
                return Err(ApiError::BadCommand("a terminal has no stdin beside it"));
            }
            Some(size) => Input::Terminal(process::size(size.cols, size.rows)?),
            None if request.stdin => Input::Pipe,
            None => Input::Empty,
        };
        let command = Command {
            program: process::program(request.cmd)?,
            args: request.args,
            env: process::environment(request.envs)?,
            cwd: Some(request.cwd).filter(|cwd| !cwd.is_empty()),
            user: plan::user(request.user)?,
            tag: process::tag(request.tag)?,
            input,
            limit: process::limit(request.timeout_sec)?,
        };
        self.0.start_process(&request.sandbox_id, command)
    }

    async fn type_in(&self, request: SendInputRequest) -> Result<(), ApiError> {
        let process = named(request.process.into_option())?;
        let channel = match (request.terminal, request.end) {
            (true, true) => return Err(ApiError::BadCommand("a terminal's input has no end: send it ^D")),
            (true, false) => Channel::Terminal,
            (false, _) => Channel::Stdout,
        };
        let sandbox = request.sandbox_id;
        if !request.data.is_empty() {
            self.0.send_input(&sandbox, &process, channel, request.data).await?;
        }
        if request.end {
            self.0.end_input(&sandbox, &process).await?;
        }
        Ok(())
    }

    async fn set_policy(&self, id: &str, wanted: Option<EgressPolicy>) -> Result<(), ApiError> {
        let handle = self.0.find_reachable(id)?;
        let egress = Egress::check(policy::wish(wanted));
        let egress = egress.map_err(|error| ApiError::Wish(WishError::Egress(error)))?;
        Ok(handle.set_egress(egress).await?)
    }

    async fn explain(&self, id: &str) -> Result<EgressResponse, ApiError> {
        let handle = self.0.find_reachable(id)?;
        let rules = if matches!(handle.view(), View::Running(..)) {
            let id = &handle.plan.id;
            let rules = counters::rules(self.0.ready()?.host(), id).await;
            rules.map_err(|source| ApiError::Counters { id: id.clone(), source })?
        } else {
            vec![]
        };
        Ok(policy::explained(&handle.egress(), rules, handle.by_name()))
    }

    /// What a VM's shim keeps of what it wrote; of a paused one, whose VM has gone, nothing.
    async fn log(&self, id: &str, is_vmm: bool) -> Result<Vec<u8>, ApiError> {
        let handle = self.0.find(id)?;
        let layout = &self.0.ready()?.host().layout;
        let name = if is_vmm { LOG_FILE } else { CONSOLE_FILE };
        let path = layout.vm_run(&handle.plan.id).join(name);
        let read = blocking(move || {
            let read = open_of_vm(&path).and_then(|file| ring::read(&file, usize::MAX));
            match read {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                other => other.map_err(|source| FileError::new("reading", &path, source)),
            }
        });
        Ok(read.await?)
    }
}

fn named(selector: Option<ProcessSelector>) -> Result<Selector, ApiError> {
    match selector
        .and_then(|selector| selector.selector)
        .ok_or(process::NO_SELECTOR)?
    {
        process_selector::Selector::Pid(pid) => Ok(Selector::Pid(pid)),
        process_selector::Selector::Tag(tag) => process::tagged(tag),
    }
}

fn message(event: Event) -> ProcessEvent {
    use process_output::Output;
    ProcessEvent {
        event: match event.what {
            What::Started { pid } => ProcessStarted {
                pid,
                ..ProcessStarted::default()
            }
            .into(),
            What::Output(channel, bytes) => ProcessOutput {
                output: Some(match channel {
                    Channel::Stdout => Output::Stdout(bytes),
                    Channel::Stderr => Output::Stderr(bytes),
                    Channel::Terminal => Output::Terminal(bytes),
                }),
                ..ProcessOutput::default()
            }
            .into(),
            What::Ended { exit_code, error } => ProcessEnded {
                exit_code,
                error: error.unwrap_or_default(),
                ..ProcessEnded::default()
            }
            .into(),
        },
        offset: event.offset,
        cut: event.cut,
        ..ProcessEvent::default()
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

    async fn ready<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ReadyRequest>,
    ) -> ServiceResult<impl Encodable<ReadyResponse> + Send + use<'a>> {
        let ready = &self.0.ready()?.host().ready;
        Response::ok(ReadyResponse {
            shims: u32::try_from(ready.shims()).unwrap_or(u32::MAX),
            host_ips: ready.addresses().iter().map(ToString::to_string).collect(),
            ..ReadyResponse::default()
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

    async fn start(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ProcessEvent> + Send + use<>>> {
        streamed(self.start_command(request.to_owned_message())?, message)
    }

    async fn attach(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, AttachRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ProcessEvent> + Send + use<>>> {
        let request = request.to_owned_message();
        let process = named(request.process.into_option())?;
        let events = self.0.attach_to(&request.sandbox_id, process, request.offset)?;
        streamed(events, message)
    }

    async fn send_input<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<impl Encodable<SendInputResponse> + Send + use<'a>> {
        self.type_in(request.to_owned_message()).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn resize<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ResizeRequest>,
    ) -> ServiceResult<impl Encodable<ResizeResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = named(request.process.into_option())?;
        let size = request.size.into_option().unwrap_or_default();
        let size = process::size(size.cols, size.rows)?;
        self.0.resize(&request.sandbox_id, &process, size).await?;
        Response::ok(ResizeResponse::default())
    }

    async fn signal<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SignalRequest>,
    ) -> ServiceResult<impl Encodable<SignalResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = named(request.process.into_option())?;
        let signal = process::signal(&request.signal)?;
        self.0.signal_process(&request.sandbox_id, &process, signal).await?;
        Response::ok(SignalResponse::default())
    }

    async fn update_sandbox_policy<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, UpdateSandboxPolicyRequest>,
    ) -> ServiceResult<impl Encodable<UpdateSandboxPolicyResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        self.set_policy(&request.sandbox_id, request.egress.into_option())
            .await?;
        Response::ok(UpdateSandboxPolicyResponse::default())
    }

    async fn egress<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, EgressRequest>,
    ) -> ServiceResult<impl Encodable<EgressResponse> + Send + use<'a>> {
        Response::ok(self.explain(request.sandbox_id).await?)
    }

    async fn logs<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, LogsRequest>,
    ) -> ServiceResult<impl Encodable<LogsResponse> + Send + use<'a>> {
        Response::ok(LogsResponse {
            content: self.log(request.sandbox_id, request.vmm).await?,
            ..LogsResponse::default()
        })
    }

    async fn import_template<'a>(
        &'a self,
        _: RequestContext,
        requests: InboundStream<ImportTemplateRequest>,
    ) -> ServiceResult<impl Encodable<ImportTemplateResponse> + Send + use<'a>> {
        Response::ok(self.0.import_template(requests).await?)
    }

    async fn list_templates<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListTemplatesRequest>,
    ) -> ServiceResult<impl Encodable<ListTemplatesResponse> + Send + use<'a>> {
        Response::ok(ListTemplatesResponse {
            templates: self.0.list_templates().await?,
            ..ListTemplatesResponse::default()
        })
    }

    async fn inspect_template<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, InspectTemplateRequest>,
    ) -> ServiceResult<impl Encodable<InspectTemplateResponse> + Send + use<'a>> {
        let found = self.0.inspect_template(request.team_id, request.template_id);
        Response::ok(found.await?)
    }

    async fn verify_template<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, VerifyTemplateRequest>,
    ) -> ServiceResult<impl Encodable<VerifyTemplateResponse> + Send + use<'a>> {
        let files = self.0.verify_template(request.team_id, request.template_id);
        Response::ok(VerifyTemplateResponse {
            files: files.await?,
            ..VerifyTemplateResponse::default()
        })
    }
}

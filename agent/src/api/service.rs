//! The procedures of `hostagent.v1`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{Encodable, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures::stream::{Stream, StreamExt as _};
use roost_common::ids::SandboxId;
use roost_common::net::SlotAddresses;

use super::errors::ApiError;
use super::templates::Places;
use super::{files, policy, process};
use crate::control::clock::Moment;
use crate::control::listing::{Connection, Shown};
use crate::drain::drain;
use crate::guest::Guest;
use crate::guest::process::{Channel, Signal};
use crate::metrics::{Point, Points, Range};
use crate::registry::Registry;
use crate::sandbox::build::fill_random;
use crate::sandbox::plan::{self, Plan, Wish};
use crate::sandbox::resume::From;
use crate::sandbox::task::{Handle, View};
use crate::sandbox::{Began, PauseReason, ResumeWish, Versions, unix_now};
use crate::templates::{self, CaptureKind, CaptureWish, Sweep};
use crate::tombstone;
use roost_hostagent::hostagent::v1::*;
use tokio::sync::{Notify, Semaphore, watch};

/// Time that an Exec has when its caller sets none.
const DEFAULT_EXEC_LIMIT: Duration = Duration::from_secs(30);
/// Longest time that an Exec may be given: control planes end a call after ten minutes.
const MAX_EXEC_SECONDS: i32 = 24 * 60 * 60;

/// How long an agent that is to end waits for its tunnels.
const ENDING_LIMIT: Duration = Duration::from_secs(2);

/// The service.
#[derive(Debug)]
pub struct Service {
    registry: Arc<Registry>,
    recovered: watch::Sender<bool>,
    /// Given once a Terminate has brought everything to rest.
    terminated: Arc<Notify>,
    /// Whether the agent ends. Whatever has to come to an end of its own before that holds a receiver.
    ending: watch::Sender<bool>,
    /// Whole files that are held.
    whole_files: Semaphore,
    /// Templates that are worked on.
    templates: Places,
}

impl Service {
    /// The service of a registry. Until [`Service::recovered`] is called, every call is answered with Unavailable.
    pub fn new(registry: Arc<Registry>) -> Arc<Self> {
        Arc::new(Self {
            registry,
            recovered: watch::Sender::new(false),
            terminated: Arc::default(),
            ending: watch::Sender::new(false),
            whole_files: files::places(),
            templates: Places::default(),
        })
    }

    /// Waits until a Terminate has brought everything to rest: then the agent is to end.
    pub async fn terminated(&self) {
        self.terminated.notified().await;
    }

    /// Ends the tunnels of all callers in an orderly way; returns when they have ended, or after [`ENDING_LIMIT`]. The agent is to end then:
    /// what is upgraded later ends at once.
    pub async fn end_tunnels(&self) {
        self.ending.send_replace(true);
        // A caller that takes no more bytes has its connection reset.
        drop(tokio::time::timeout(ENDING_LIMIT, self.ending.closed()).await);
    }

    /// Changes when the agent is about to end, which then waits until this is dropped.
    pub(crate) fn ending(&self) -> watch::Receiver<bool> {
        self.ending.subscribe()
    }

    /// Recovery is complete: calls are served from now on.
    pub fn recovered(&self) {
        self.recovered.send_replace(true);
    }

    /// Whether recovery is complete.
    pub fn is_recovered(&self) -> bool {
        *self.recovered.borrow()
    }

    /// Waits until recovery is complete.
    pub async fn until_recovered(&self) {
        let mut recovered = self.recovered.subscribe();
        recovered.wait_for(|is| *is).await.expect("this service has the sender");
    }

    /// Does what is asked of a sandbox, and notes how long that took.
    async fn timed<T, E>(&self, kind: &'static str, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        self.registry.host().operations.of(kind, work).await
    }

    /// Places for files that are held whole.
    pub(super) fn whole_files(&self) -> &Semaphore {
        &self.whole_files
    }

    /// Places for work on templates.
    pub(super) fn places(&self) -> &Places {
        &self.templates
    }

    /// The registry, once recovery is complete.
    pub(super) fn ready(&self) -> Result<&Arc<Registry>, ApiError> {
        if self.is_recovered() {
            Ok(&self.registry)
        } else {
            Err(ApiError::Recovering)
        }
    }

    /// The sandbox of an id, in whatever state.
    pub(super) fn find(&self, id: &str) -> Result<Handle, ApiError> {
        self.ready()?;
        let id: SandboxId = id.parse().map_err(ApiError::BadId)?;
        self.registry.find(&id).ok_or_else(|| {
            let why = tombstone::find(&self.registry.host().layout, &id).map(|tombstone| tombstone.summary());
            ApiError::NoSandbox { id, why }
        })
    }

    /// The sandbox of an id, unless nobody can say yet what it is doing.
    pub(super) fn find_reachable(&self, id: &str) -> Result<Handle, ApiError> {
        let handle = self.find(id)?;
        match handle.view() {
            View::Unreachable => Err(ApiError::Unreachable {
                id: handle.plan.id.clone(),
            }),
            _ => Ok(handle),
        }
    }

    /// The guest of a running sandbox. One that is held would leave its caller without an answer.
    pub(crate) fn running(&self, id: &str) -> Result<(Handle, Arc<Guest>), ApiError> {
        let handle = self.find_reachable(id)?;
        match handle.view() {
            View::Running(..) if handle.hold_state().is_held() => Err(ApiError::Held {
                id: handle.plan.id.clone(),
            }),
            View::Running(guest, _) => Ok((handle, guest)),
            other => Err(ApiError::NotRunning {
                id: handle.plan.id.clone(),
                state: other.name(),
            }),
        }
    }

    async fn create(&self, request: CreateSandboxRequest) -> Result<CreateSandboxResponse, ApiError> {
        self.ready()?;
        let wish = Wish {
            id: request.sandbox_id,
            template_name: request.template,
            team_id: request.team_id,
            template_id: request.template_id,
            vcpus: request.vcpus,
            memory_mb: request.memory_mb,
            disk_size_mb: request.disk_size_mb,
            timeout_sec: request.timeout_sec,
            default_user: request.default_user,
            default_env: request.default_env.into_iter().collect::<BTreeMap<_, _>>(),
            egress: policy::wish(request.egress.into_option()),
        };
        let host = self.registry.host().clone();
        let plan = tokio::task::spawn_blocking(move || {
            let images = host.layout.images();
            Plan::check(
                wish,
                &host.config(),
                |template| templates::size(&images, template),
                new_id,
            )
        });
        let plan = plan.await.expect("file work does not panic")?;
        let (handle, outcome) = self.registry.create(plan)?;
        // Dropping the receiver, as this call does when its caller goes away, stops the create. A sender that is dropped unsent
        // would be a driver that panicked.
        outcome.await.expect("a create is always answered")?;
        handle.touch();
        let view = handle.view();
        Ok(CreateSandboxResponse {
            sandbox_id: handle.plan.id.to_string(),
            status: view.name().into(),
            host_ip: host_ip(&handle),
            metadata: metadata(&view),
            ..CreateSandboxResponse::default()
        })
    }

    async fn resume(&self, request: ResumeSandboxRequest) -> Result<ResumeSandboxResponse, ApiError> {
        let handle = self.find_reachable(&request.sandbox_id)?;
        let env = request.default_env.into_iter().collect::<BTreeMap<_, _>>();
        let wish = ResumeWish {
            timeout_sec: plan::timeout(request.timeout_sec)?,
            user: plan::user(request.default_user)?,
            env: Some(plan::environment(env)?).filter(|env| !env.is_empty()),
            kernel_version: Some(request.kernel_version).filter(|version| !version.is_empty()),
            from: if request.disk_only { From::Disk } else { From::Memory },
        };
        handle.resume(wish).await.map_err(ApiError::Resume)?;
        let view = handle.view();
        Ok(ResumeSandboxResponse {
            sandbox_id: handle.plan.id.to_string(),
            status: view.name().into(),
            host_ip: host_ip(&handle),
            metadata: metadata(&view),
            ..ResumeSandboxResponse::default()
        })
    }

    async fn capture(
        &self,
        kind: CaptureKind,
        sandbox: &str,
        name: &str,
        team: &str,
        template: &str,
    ) -> Result<i64, ApiError> {
        let handle = self.find_reachable(sandbox)?;
        let wish = CaptureWish {
            kind,
            template: plan::template(team, template)?,
            name: plan::name(name.to_owned())?,
        };
        let _in_use = handle.begin_use();
        let size = handle.capture(wish).await.map_err(ApiError::Capture)?;
        Ok(i64::try_from(size.0).unwrap_or(i64::MAX))
    }

    async fn delete(&self, request: DeleteSnapshotRequest) -> Result<(), ApiError> {
        let registry = self.ready()?;
        let template = plan::template(&request.team_id, &request.template_id)?;
        let images = registry.host().layout.images();
        let deleted = tokio::task::spawn_blocking(move || templates::delete(&images, template));
        // One that is absent is as good as deleted.
        if deleted.await.expect("file work does not panic")? {
            registry.sweep_templates(Sweep::Deleted).await;
        }
        Ok(())
    }

    async fn exec_command(&self, request: ExecRequest) -> Result<ExecResponse, ApiError> {
        let (handle, guest) = self.running(&request.sandbox_id)?;
        if request.cmd.is_empty() {
            return Err(ApiError::BadCommand("cmd is empty"));
        }
        let limit = match request.timeout_sec {
            0 => DEFAULT_EXEC_LIMIT,
            seconds @ 1..=MAX_EXEC_SECONDS => Duration::from_secs(seconds.unsigned_abs().into()),
            _ => {
                return Err(ApiError::BadCommand(
                    "timeout_sec is out of range: 1 to 86400, or 0 for 30",
                ));
            }
        };
        let _in_use = handle.begin_use();
        let max_output = self.registry.host().config().max_exec_output;
        let finished = tokio::select! {
            finished = guest.exec(request.cmd, request.args, limit, max_output) => finished?,
            // A guest that has gone says nothing more, and its connection would be waited for in vain.
            () = handle.stopped_running(&guest) => {
                return Err(ApiError::NotRunning { id: handle.plan.id.clone(), state: handle.view().name() });
            }
        };
        Ok(ExecResponse {
            stdout: finished.stdout,
            stderr: finished.stderr,
            exit_code: finished.exit_code,
            ..ExecResponse::default()
        })
    }

    fn info(handle: &Handle) -> SandboxInfo {
        let plan = &handle.plan;
        let view = handle.view();
        SandboxInfo {
            sandbox_id: plan.id.to_string(),
            status: view.name().into(),
            template: plan.template_name.clone(),
            vcpus: plan.vcpus.0.into(),
            memory_mb: i32::try_from(plan.memory.0).unwrap_or(i32::MAX),
            host_ip: host_ip(handle),
            created_at_unix: handle.created_at_unix,
            last_active_at_unix: handle.last_active_at_unix(),
            timeout_sec: i32::try_from(handle.timeout_sec()).unwrap_or(i32::MAX),
            team_id: plan.template.team.to_string(),
            template_id: plan.template.template.to_string(),
            metadata: metadata(&view),
            ..SandboxInfo::default()
        }
    }
}

fn host_ip(handle: &Handle) -> String {
    SlotAddresses::of(handle.slot.slot()).host.to_string()
}

fn metadata<M: FromIterator<(String, String)>>(view: &View) -> M {
    let versions = match view {
        View::Running(_, versions) => versions.as_ref().clone(),
        View::Creating
        | View::Pausing
        | View::Paused(_)
        | View::Resuming
        | View::Unreachable
        | View::Destroying
        | View::Gone => Versions::default(),
    };
    let (restored, reason) = match versions.began {
        Began::Booted => ("", String::new()),
        Began::Restored => ("true", String::new()),
        Began::BootedInstead(why) => ("false", why),
    };
    [
        ("restored", restored.to_owned()),
        ("cold_boot_reason", reason),
        ("kernel_version", versions.kernel),
        ("vmm_version", versions.vmm),
        ("envd_version", versions.envd),
        ("agent_version", env!("CARGO_PKG_VERSION").to_owned()),
    ]
    .into_iter()
    .filter(|(_, value)| !value.is_empty())
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// An id of ours: `cl-` and 25 random letters of base 36.
fn new_id() -> SandboxId {
    let mut bytes = [0; 16];
    fill_random(&mut bytes);
    let digits = crate::host::images::base36(u128::from_le_bytes(bytes));
    format!("cl-{digits:0>25}").parse().expect("letters and digits")
}

fn metric_points(points: Vec<Point>) -> Vec<MetricPoint> {
    let message = |point: Point| MetricPoint {
        timestamp_unix: point.unix,
        cpu_pct: point.cpu_percent,
        mem_bytes: point.memory,
        disk_bytes: point.disk,
        ..MetricPoint::default()
    };
    points.into_iter().map(message).collect()
}

/// A stream of answers, made of what comes.
pub(super) fn streamed<T, M: Send + 'static>(
    events: impl Stream<Item = Result<T, ApiError>> + Send + 'static,
    message: impl Fn(T) -> M + Send + 'static,
) -> ServiceResult<ServiceStream<M>> {
    Response::stream_ok(events.map(move |event| Ok(message(event?))))
}

/// Time for the answer of a Terminate to reach its caller, on a host where nothing has to be paused first.
const ANSWER_GRACE: Duration = Duration::from_secs(1);

/// Empties the host, and then has the agent ended. Not where a sandbox could not be paused or reached: it would be left to run with
/// nobody to ask for it, and go with the host. Whoever calls again tries again.
async fn end_after_drain(registry: Arc<Registry>, terminated: Arc<Notify>) {
    let (drained, ()) = tokio::join!(drain(&registry), tokio::time::sleep(ANSWER_GRACE));
    let failed = drained.failed.len();
    if failed == 0 {
        terminated.notify_one();
    } else {
        tracing::error!(
            failed,
            "not terminated: sandboxes could not be paused; see to them and call again"
        );
    }
}

impl HostAgentService for Service {
    async fn create_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSandboxRequest>,
    ) -> ServiceResult<impl Encodable<CreateSandboxResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        Response::ok(self.timed("create", self.create(request)).await?)
    }

    async fn destroy_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DestroySandboxRequest>,
    ) -> ServiceResult<impl Encodable<DestroySandboxResponse> + Send + use<'a>> {
        let handle = self.find(request.sandbox_id)?;
        self.timed("destroy", handle.destroy())
            .await
            .map_err(ApiError::Destroy)?;
        Response::ok(DestroySandboxResponse::default())
    }

    async fn exec<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecRequest>,
    ) -> ServiceResult<impl Encodable<ExecResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        Response::ok(self.exec_command(request).await?)
    }

    async fn list_sandboxes<'a>(
        &'a self,
        context: RequestContext,
        _: ServiceRequest<'_, ListSandboxesRequest>,
    ) -> ServiceResult<impl Encodable<ListSandboxesResponse> + Send + use<'a>> {
        self.ready()?;
        // A control plane takes every id among the sandboxes for alive, and of those that are not, it takes the ones listed as
        // auto-paused for paused and the rest for stopped: so every paused one is listed so, whoever paused it, unless it may have
        // them for missing.
        let connection = context.extensions().get::<Connection>().copied();
        let shown = self.registry.host().listing.shown(connection, Moment::now());
        let (paused, alive): (Vec<Handle>, Vec<Handle>) = self
            .registry
            .list()
            .into_iter()
            .partition(|handle| shown == Shown::AsPaused && matches!(handle.view(), View::Paused(_)));
        Response::ok(ListSandboxesResponse {
            sandboxes: alive.iter().map(Self::info).collect(),
            auto_paused_sandbox_ids: paused.iter().map(|handle| handle.plan.id.to_string()).collect(),
            paused_sandboxes: paused.iter().map(Self::info).collect(),
            ..ListSandboxesResponse::default()
        })
    }

    async fn ping_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PingSandboxRequest>,
    ) -> ServiceResult<impl Encodable<PingSandboxResponse> + Send + use<'a>> {
        let (handle, _) = self.running(request.sandbox_id)?;
        handle.touch();
        Response::ok(PingSandboxResponse::default())
    }

    async fn pause_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PauseSandboxRequest>,
    ) -> ServiceResult<impl Encodable<PauseSandboxResponse> + Send + use<'a>> {
        let handle = self.find_reachable(request.sandbox_id)?;
        let paused = self.timed("pause", handle.pause(PauseReason::Requested)).await;
        paused.map_err(ApiError::Pause)?;
        Response::ok(PauseSandboxResponse::default())
    }

    async fn resume_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ResumeSandboxRequest>,
    ) -> ServiceResult<impl Encodable<ResumeSandboxResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        Response::ok(self.timed("resume", self.resume(request)).await?)
    }

    async fn create_snapshot<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CreateSnapshotRequest>,
    ) -> ServiceResult<impl Encodable<CreateSnapshotResponse> + Send + use<'a>> {
        let wish = request.to_owned_message();
        let (sandbox, team, template) = (&wish.sandbox_id, &wish.team_id, &wish.template_id);
        let captured = self.timed(
            "snapshot",
            self.capture(CaptureKind::Snapshot, sandbox, &wish.name, team, template),
        );
        Response::ok(CreateSnapshotResponse {
            size_bytes: captured.await?,
            name: wish.name,
            ..CreateSnapshotResponse::default()
        })
    }

    async fn flatten_rootfs<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, FlattenRootfsRequest>,
    ) -> ServiceResult<impl Encodable<FlattenRootfsResponse> + Send + use<'a>> {
        let wish = request.to_owned_message();
        let (sandbox, team, template) = (&wish.sandbox_id, &wish.team_id, &wish.template_id);
        let captured = self.timed(
            "flatten",
            self.capture(CaptureKind::Rootfs, sandbox, &wish.name, team, template),
        );
        Response::ok(FlattenRootfsResponse {
            size_bytes: captured.await?,
            ..FlattenRootfsResponse::default()
        })
    }

    async fn delete_snapshot<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, DeleteSnapshotRequest>,
    ) -> ServiceResult<impl Encodable<DeleteSnapshotResponse> + Send + use<'a>> {
        self.delete(request.to_owned_message()).await?;
        Response::ok(DeleteSnapshotResponse::default())
    }

    async fn terminate<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, TerminateRequest>,
    ) -> ServiceResult<impl Encodable<TerminateResponse> + Send + use<'a>> {
        let registry = self.ready()?.clone();
        // Not waited for: that is minutes, and whoever gives up a host does not stay to hear of it.
        tokio::spawn(end_after_drain(registry, self.terminated.clone()));
        Response::ok(TerminateResponse::default())
    }

    async fn exec_stream(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecStreamRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ExecStreamResponse> + Send + use<>>> {
        streamed(self.stream_exec(request.to_owned_message())?, process::exec_event)
    }

    async fn start_background<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, StartBackgroundRequest>,
    ) -> ServiceResult<impl Encodable<StartBackgroundResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        Response::ok(self.start_in_background(request).await?)
    }

    async fn list_processes<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListProcessesRequest>,
    ) -> ServiceResult<impl Encodable<ListProcessesResponse> + Send + use<'a>> {
        Response::ok(ListProcessesResponse {
            processes: self.processes(request.sandbox_id).await?,
            ..ListProcessesResponse::default()
        })
    }

    async fn kill_process<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, KillProcessRequest>,
    ) -> ServiceResult<impl Encodable<KillProcessResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let selector = process::killed(request.selector)?;
        let signal = process::signal(&request.signal)?;
        self.signal_process(&request.sandbox_id, &selector, signal).await?;
        Response::ok(KillProcessResponse::default())
    }

    async fn connect_process(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ConnectProcessRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ConnectProcessResponse> + Send + use<>>> {
        let request = request.to_owned_message();
        let selector = process::connected(request.selector)?;
        let events = self.attach_to(&request.sandbox_id, selector, request.offset)?;
        streamed(events, process::connect_event)
    }

    async fn pty_attach(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, PtyAttachRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<PtyAttachResponse> + Send + use<>>> {
        let (tag, events) = self.attach_terminal(request.to_owned_message())?;
        streamed(events, move |event| process::terminal_event(event, &tag))
    }

    async fn pty_send_input<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PtySendInputRequest>,
    ) -> ServiceResult<impl Encodable<PtySendInputResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let terminal = process::tagged(request.tag)?;
        self.send_input(&request.sandbox_id, &terminal, Channel::Terminal, request.data)
            .await?;
        Response::ok(PtySendInputResponse::default())
    }

    async fn pty_resize<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PtyResizeRequest>,
    ) -> ServiceResult<impl Encodable<PtyResizeResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let terminal = process::tagged(request.tag)?;
        let size = process::size(request.cols, request.rows)?;
        self.resize(&request.sandbox_id, &terminal, size).await?;
        Response::ok(PtyResizeResponse::default())
    }

    async fn pty_kill<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, PtyKillRequest>,
    ) -> ServiceResult<impl Encodable<PtyKillResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let terminal = process::tagged(request.tag)?;
        self.signal_process(&request.sandbox_id, &terminal, Signal::Kill)
            .await?;
        Response::ok(PtyKillResponse::default())
    }

    async fn write_file<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, WriteFileRequest>,
    ) -> ServiceResult<impl Encodable<WriteFileResponse> + Send + use<'a>> {
        self.write_whole(request.to_owned_message()).await?;
        Response::ok(WriteFileResponse::default())
    }

    async fn read_file<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ReadFileRequest>,
    ) -> ServiceResult<impl Encodable<ReadFileResponse> + Send + use<'a>> {
        Response::ok(ReadFileResponse {
            content: self.read_whole(request.sandbox_id, request.path).await?,
            ..ReadFileResponse::default()
        })
    }

    async fn write_file_stream<'a>(
        &'a self,
        _: RequestContext,
        requests: InboundStream<WriteFileStreamRequest>,
    ) -> ServiceResult<impl Encodable<WriteFileStreamResponse> + Send + use<'a>> {
        self.write_streamed(requests).await?;
        Response::ok(WriteFileStreamResponse::default())
    }

    async fn read_file_stream(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ReadFileStreamRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ReadFileStreamResponse> + Send + use<>>> {
        let chunks = self.stream_file(request.sandbox_id, request.path)?;
        streamed(chunks, |chunk| ReadFileStreamResponse {
            chunk,
            ..ReadFileStreamResponse::default()
        })
    }

    async fn list_dir<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<impl Encodable<ListDirResponse> + Send + use<'a>> {
        Response::ok(ListDirResponse {
            entries: self.list_dir_of(request.to_owned_message()).await?,
            ..ListDirResponse::default()
        })
    }

    async fn make_dir<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<impl Encodable<MakeDirResponse> + Send + use<'a>> {
        let entry = self.make_dir_in(request.sandbox_id, request.path).await?;
        Response::ok(MakeDirResponse {
            entry: entry.into(),
            ..MakeDirResponse::default()
        })
    }

    async fn remove_path<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, RemovePathRequest>,
    ) -> ServiceResult<impl Encodable<RemovePathResponse> + Send + use<'a>> {
        self.remove_in(request.sandbox_id, request.path).await?;
        Response::ok(RemovePathResponse::default())
    }

    async fn get_sandbox_metrics<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetSandboxMetricsRequest>,
    ) -> ServiceResult<impl Encodable<GetSandboxMetricsResponse> + Send + use<'a>> {
        let handle = self.find(request.sandbox_id)?;
        let range = Range::of_name(request.range).ok_or(ApiError::BadRange)?;
        Response::ok(GetSandboxMetricsResponse {
            points: metric_points(handle.metrics.range(range, unix_now())),
            ..GetSandboxMetricsResponse::default()
        })
    }

    async fn flush_sandbox_metrics<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, FlushSandboxMetricsRequest>,
    ) -> ServiceResult<impl Encodable<FlushSandboxMetricsResponse> + Send + use<'a>> {
        // Sampling goes on until a pause or a destroy ends the incarnation.
        let Points { minutes, hours, day } = self.find(request.sandbox_id)?.metrics.take();
        Response::ok(FlushSandboxMetricsResponse {
            points_10m: metric_points(minutes),
            points_2h: metric_points(hours),
            points_24h: metric_points(day),
            ..FlushSandboxMetricsResponse::default()
        })
    }
}

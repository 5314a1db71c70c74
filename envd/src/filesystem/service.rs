//! The Connect service `filesystem.Filesystem`: requests are checked here, and errors given their codes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use connectrpc::{ConnectError, ErrorCode, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures::stream;
use roost_common::guest::filesystem::watch_dir_response::{KeepAlive, StartEvent};
use roost_common::guest::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, Filesystem as Service, FilesystemEvent, GetWatcherEventsRequest,
    GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse, MoveRequest,
    MoveResponse, RemoveRequest, RemoveResponse, RemoveWatcherRequest, RemoveWatcherResponse, StatRequest,
    StatResponse, WatchDirRequest, WatchDirResponse,
};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::operations;
use super::path::resolve;
use super::watch::{Plan, Watch, WatchEnd, watch};
use super::{FileError, entry};
use crate::caller::{basic_user, keepalive};
use crate::guest::Guest;
use crate::users::{Names, User};

/// Changes in one answer to a fetch; the rest is for the next.
const MAX_FETCHED: usize = 8192;

/// Watches at a time, of either kind; each has a thread.
const MAX_WATCHES: usize = 256;

/// The service, and the guest whose files it touches.
pub(crate) struct FilesystemService {
    guest: Arc<Guest>,
    room: Arc<Semaphore>,
    watchers: Mutex<Watchers>,
}

/// Those whose changes are fetched.
#[derive(Default)]
struct Watchers {
    next: u64,
    by_id: BTreeMap<String, Watcher>,
}

struct Watcher {
    watch: Watch,
    /// Why no more changes come, once it was met.
    end: Option<WatchEnd>,
}

/// The user of a call, and where its relative paths start.
struct Caller {
    user: User,
    workdir: Option<String>,
}

impl Caller {
    fn resolve(&self, path: &str) -> Result<PathBuf, FileError> {
        resolve(path, &self.user, self.workdir.as_deref())
    }
}

#[allow(
    refining_impl_trait,
    reason = "the trait leaves the answers' types open; here they are the messages"
)]
impl Service for FilesystemService {
    async fn stat(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, StatRequest>,
    ) -> ServiceResult<StatResponse> {
        let caller = self.caller(&context)?;
        let path = caller.resolve(&request.to_owned_message().path)?;
        let root = self.guest.root.clone();
        let entry = self
            .run(&caller, move || entry::entry(&path, &Names::read(&root)))
            .await?;
        Response::ok(StatResponse {
            entry: entry.into(),
            ..Default::default()
        })
    }

    async fn make_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<MakeDirResponse> {
        let caller = self.caller(&context)?;
        let path = caller.resolve(&request.to_owned_message().path)?;
        let root = self.guest.root.clone();
        let made = self.change(&caller, move || {
            operations::make_dir(&path)?;
            entry::entry(&path, &Names::read(&root))
        });
        Response::ok(MakeDirResponse {
            entry: made.await?.into(),
            ..Default::default()
        })
    }

    async fn r#move(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, MoveRequest>,
    ) -> ServiceResult<MoveResponse> {
        let caller = self.caller(&context)?;
        let request = request.to_owned_message();
        let (from, to) = (caller.resolve(&request.source)?, caller.resolve(&request.destination)?);
        let root = self.guest.root.clone();
        let moved = self.change(&caller, move || {
            operations::move_to(&from, &to)?;
            entry::entry(&to, &Names::read(&root))
        });
        Response::ok(MoveResponse {
            entry: moved.await?.into(),
            ..Default::default()
        })
    }

    async fn list_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<ListDirResponse> {
        let caller = self.caller(&context)?;
        let request = request.to_owned_message();
        let path = caller.resolve(&request.path)?;
        let root = self.guest.root.clone();
        let entries = self
            .run(&caller, move || {
                operations::list(&path, request.depth.max(1), &Names::read(&root))
            })
            .await?;
        Response::ok(ListDirResponse {
            entries,
            ..Default::default()
        })
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, RemoveRequest>,
    ) -> ServiceResult<RemoveResponse> {
        let caller = self.caller(&context)?;
        let path = caller.resolve(&request.to_owned_message().path)?;
        self.change(&caller, move || operations::remove(&path)).await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<WatchDirResponse>> {
        let request = request.to_owned_message();
        let watch = self.watch(&context, &request.path, |plan| Plan {
            recursive: request.recursive,
            with_entry: request.include_entry,
            allow_network: request.allow_network_mounts,
            ..plan
        });
        let silence = keepalive(&context);
        let started = Next::Start(watch.await?);
        let events = stream::unfold(started, move |next| async move {
            let mut watch = match next {
                Next::Start(watch) => return Some((Ok(response(StartEvent::default())), Next::Change(watch))),
                Next::Change(watch) => watch,
                Next::Nothing => return None,
            };
            match tokio::time::timeout(silence, watch.changes.recv()).await {
                Err(_) => Some((Ok(response(KeepAlive::default())), Next::Change(watch))),
                Ok(Some(Ok(event))) => Some((Ok(response(event)), Next::Change(watch))),
                Ok(Some(Err(end))) => Some((Err(end_error(end)), Next::Nothing)),
                Ok(None) => None,
            }
        });
        Response::stream_ok(events)
    }

    async fn create_watcher(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<CreateWatcherResponse> {
        let request = request.to_owned_message();
        let watch = self.watch(&context, &request.path, |plan| Plan {
            recursive: request.recursive,
            with_entry: request.include_entry,
            allow_network: request.allow_network_mounts,
            ..plan
        });
        let watch = watch.await?;
        let mut watchers = self.watchers();
        // A name, not a secret: who may call at all may call for any.
        let watcher_id = format!("w{}", watchers.next);
        watchers.next += 1;
        watchers.by_id.insert(watcher_id.clone(), Watcher { watch, end: None });
        Response::ok(CreateWatcherResponse {
            watcher_id,
            ..Default::default()
        })
    }

    async fn get_watcher_events(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<GetWatcherEventsResponse> {
        let id = request.to_owned_message().watcher_id;
        let mut watchers = self.watchers();
        let watcher = watchers.by_id.get_mut(&id).ok_or_else(|| no_watcher(&id))?;
        Response::ok(GetWatcherEventsResponse {
            events: watcher.fetch()?,
            ..Default::default()
        })
    }

    async fn remove_watcher(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<RemoveWatcherResponse> {
        let id = request.to_owned_message().watcher_id;
        let removed = self.watchers().by_id.remove(&id);
        removed.ok_or_else(|| no_watcher(&id))?;
        Response::ok(RemoveWatcherResponse::default())
    }
}

impl FilesystemService {
    pub(crate) fn new(guest: Arc<Guest>) -> Self {
        Self {
            guest,
            room: Arc::new(Semaphore::new(MAX_WATCHES)),
            watchers: Mutex::default(),
        }
    }

    fn caller(&self, context: &RequestContext) -> Result<Caller, ConnectError> {
        let name = basic_user(context)?;
        let settings = self.guest.settings();
        let user = self.guest.user(name.as_deref(), &settings).map_err(FileError::User)?;
        Ok(Caller {
            user,
            workdir: settings.workdir,
        })
    }

    async fn run<T: Send + 'static>(
        &self,
        caller: &Caller,
        work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, FileError> {
        self.guest.threads.run(&caller.user, work).await
    }

    /// As [`FilesystemService::run`], for work that writes: while a snapshot is taken it waits, on no thread.
    async fn change<T: Send + 'static>(
        &self,
        caller: &Caller,
        work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, FileError> {
        self.guest.hold.released().await;
        self.run(caller, work).await
    }

    async fn watch(
        &self,
        context: &RequestContext,
        path: &str,
        options: impl FnOnce(Plan) -> Plan,
    ) -> Result<Watch, ConnectError> {
        let caller = self.caller(context)?;
        let plan = options(Plan {
            path: caller.resolve(path)?,
            recursive: false,
            with_entry: false,
            allow_network: false,
            root: self.guest.root.clone(),
        });
        Ok(watch(self.room()?, &caller.user, plan).await?)
    }

    fn room(&self) -> Result<OwnedSemaphorePermit, ConnectError> {
        Arc::clone(&self.room)
            .try_acquire_owned()
            .map_err(|_| ConnectError::resource_exhausted(format!("{MAX_WATCHES} directories are watched already")))
    }

    fn watchers(&self) -> MutexGuard<'_, Watchers> {
        self.watchers.lock().expect("no holder of the watchers panics")
    }
}

/// What a stream tells next.
enum Next {
    Start(Watch),
    Change(Watch),
    Nothing,
}

impl Watcher {
    /// What has changed since the last time. The end of the changes is told when those before it have been taken, and each
    /// time from then on.
    fn fetch(&mut self) -> Result<Vec<FilesystemEvent>, ConnectError> {
        let mut events = Vec::new();
        while self.end.is_none() && events.len() < MAX_FETCHED {
            match self.watch.changes.try_recv() {
                Ok(Ok(event)) => events.push(event),
                Ok(Err(end)) => self.end = Some(end),
                // The directory is gone, which was told.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        match &self.end {
            Some(end) if events.is_empty() => Err(end_error(end.clone())),
            _ => Ok(events),
        }
    }
}

fn response(event: impl Into<Option<roost_common::guest::filesystem::watch_dir_response::Event>>) -> WatchDirResponse {
    WatchDirResponse {
        event: event.into(),
        ..Default::default()
    }
}

fn no_watcher(id: &str) -> ConnectError {
    ConnectError::not_found(format!("there is no watcher {id:?}"))
}

fn end_error(end: WatchEnd) -> ConnectError {
    let code = match &end {
        WatchEnd::Lost => ErrorCode::DataLoss,
        WatchEnd::Failed(error) => error.code(),
    };
    ConnectError::new(code, end.to_string())
}

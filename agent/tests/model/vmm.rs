//! VMMs: a guest's memory, whether its processors run, and the REST API in a sandbox's run directory.

use std::convert::Infallible;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use roost_common::shim::WaitStatus;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::dice::Fault;
use crate::guest::Memory;
use crate::shim::{self, End};
use crate::world::{World, ended, listening};

/// What it says its version is.
pub(crate) const VERSION: &str = "53.0.0";

/// Bytes of memory that every guest has.
pub(crate) const MEMORY: u64 = 64 << 20;

/// What a VMM has.
pub(crate) struct Vmm {
    pub(crate) state: State,
    pub(crate) memory: Memory,
    /// A pause that was asked for and given up is done once somebody has been told that the VM runs.
    pub(crate) is_late: bool,
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// There is none yet: it is being restored.
    Loading,
    Paused,
    Running,
}

impl Vmm {
    pub(crate) fn boots() -> Self {
        Self {
            state: State::Running,
            memory: Memory::default(),
            is_late: false,
        }
    }

    /// `None` where there is no snapshot.
    pub(crate) fn restores(from: &Path) -> Option<Self> {
        Some(Self {
            state: State::Loading,
            memory: read_memory(from)?,
            is_late: false,
        })
    }
}

/// What a guest knew when its memory was written.
pub(crate) fn read_memory(from: &Path) -> Option<Memory> {
    let mut bytes = [0; 1024];
    File::open(from.join("memory-ranges"))
        .ok()?
        .read_exact_at(&mut bytes, 0)
        .ok()?;
    let end = bytes.iter().position(|byte| *byte == 0)?;
    serde_json::from_slice(&bytes[..end]).ok()
}

/// The connection ends without an answer.
#[derive(Debug)]
pub(crate) struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a test broke the connection")
    }
}

impl std::error::Error for Broken {}

pub(crate) type Answer = Response<Full<Bytes>>;

pub(crate) fn answered(status: StatusCode, body: &Value) -> Answer {
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let mut answer = Response::new(Full::from(body));
    *answer.status_mut() = status;
    answer
}

fn refused(why: &str) -> Answer {
    answered(StatusCode::INTERNAL_SERVER_ERROR, &json!(["Error from API", why]))
}

/// Serves HTTP on one connection.
pub(crate) async fn converse<S, F>(stream: S, answer: impl Fn(Request<Bytes>) -> F)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    F: Future<Output = Result<Answer, Broken>>,
{
    let service = service_fn(|request: Request<Incoming>| async {
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(|_| Broken)?.to_bytes();
        answer(Request::from_parts(head, body)).await
    });
    let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // How it ends is for its other end to say.
    drop(connection.await);
}

/// What a VMM does by itself, in the runtime that runs now.
pub(crate) fn go_on(world: &Arc<World>, number: u64) {
    let mut inner = world.lock();
    let takes = inner.dice.millis(500);
    let Some(mut end) = shim::end_of(&inner, number) else {
        return;
    };
    let Some(vm) = inner.shims.get(&number).and_then(|shim| shim.vm.as_ref()) else {
        return;
    };
    let listener = listening(&vm.api);
    drop(inner);
    let world = world.clone();
    tokio::spawn(async move {
        let accept = async {
            loop {
                let (stream, _) = listener.accept().await.expect("accepted");
                let (world, gone) = (world.clone(), shim::end_of(&world.lock(), number));
                let Some(mut gone) = gone else { return };
                tokio::spawn(async move {
                    tokio::select! {
                        _ = ended(&mut gone) => {}
                        () = converse(stream, |request| answer(&world, number, request)) => {}
                    }
                });
            }
        };
        let comes_up = async {
            tokio::time::sleep(takes).await;
            come_up(&world, number);
            std::future::pending::<Infallible>().await
        };
        tokio::select! {
            _ = ended(&mut end) => {}
            () = accept => {}
            never = comes_up => match never {},
        }
    });
}

/// What was being loaded is there, and what was booting is up.
fn come_up(world: &World, number: u64) {
    let mut inner = world.lock();
    with(&mut inner, number, |vm, disk| match vm.vmm.state {
        State::Loading => vm.vmm.state = State::Paused,
        State::Running if !vm.vmm.memory.is_up => {
            vm.vmm.memory.is_up = true;
            // Its filesystem is mounted.
            vm.vmm.memory.moment = disk.write();
        }
        State::Running | State::Paused => {}
    });
}

/// Does something with a VM and its disk, where it has not ended.
pub(crate) fn with<T>(
    inner: &mut crate::world::Inner,
    number: u64,
    work: impl FnOnce(&mut shim::Vm, &crate::world::Disk) -> T,
) -> Option<T> {
    let mut vm = inner.shims.get_mut(&number)?.vm.take()?;
    let done = inner.disk_of(&vm.disk).map(|disk| work(&mut vm, disk));
    inner.shims.get_mut(&number).expect("seen above").vm = Some(vm);
    Some(done.expect("a VM has a disk for as long as it holds it"))
}

async fn answer(world: &Arc<World>, number: u64, request: Request<Bytes>) -> Result<Answer, Broken> {
    let mut fault = world.called().await;
    if request.uri().path().ends_with("vm.resume") {
        fault = world.decisive(fault);
    }
    match fault {
        Fault::None | Fault::DoAndHang | Fault::Lose => {}
        Fault::Refuse => {
            if request.uri().path().ends_with("vm.snapshot") {
                // The disk was full in the middle of it.
                let half = directory(&request).map(|directory| std::fs::write(directory.join("memory-ranges"), "half"));
                drop(half);
            }
            return Ok(refused("a test wants it so"));
        }
        Fault::Hang => {
            if request.uri().path().ends_with("vm.pause") && world.dice(|dice| dice.chance(500)) {
                // As a VMM does that stood still for longer than it was waited for.
                with(&mut world.lock(), number, |vm, _| vm.vmm.is_late = true);
            }
            std::future::pending().await
        }
        Fault::Die => {
            // In the middle of what it was asked for, or after it.
            if world.dice(|dice| dice.chance(500)) {
                act(world, number, &request);
            }
            shim::end(world, number, shim::report(WaitStatus::Exited(1)));
            return Err(Broken);
        }
    }
    if request.uri().path().ends_with("vm.snapshot") {
        let takes = world.dice(|dice| dice.millis(1000));
        tokio::time::sleep(takes).await;
    }
    let answer = act(world, number, &request);
    match fault {
        Fault::DoAndHang => std::future::pending().await,
        Fault::Lose => Err(Broken),
        _ => answer.ok_or(Broken),
    }
}

/// The directory that a snapshot is to be written to.
fn directory(request: &Request<Bytes>) -> Option<PathBuf> {
    let body: Value = serde_json::from_slice(request.body()).ok()?;
    Some(body.get("destination_url")?.as_str()?.strip_prefix("file://")?.into())
}

/// Follows a call; `None` where the VMM has ended meanwhile.
fn act(world: &World, number: u64, request: &Request<Bytes>) -> Option<Answer> {
    let mut inner = world.lock();
    let mut wrong = None;
    let path = request.uri().path();
    let action = path.strip_prefix("/api/v1/").unwrap_or(path);
    let done = StatusCode::NO_CONTENT;
    let answer = with(&mut inner, number, |vm, disk| {
        let (id, vmm) = (&vm.spec.sandbox, &mut vm.vmm);
        match (request.method(), action, vmm.state) {
            (&Method::GET, "vmm.ping", _) => answered(StatusCode::OK, &json!({ "version": VERSION })),
            (_, _, State::Loading) => answered(StatusCode::NOT_FOUND, &json!(["VM is not created"])),
            (&Method::GET, "vm.info", state) => {
                if std::mem::take(&mut vmm.is_late) && state == State::Running {
                    vmm.state = State::Paused;
                }
                answered(StatusCode::OK, &json!({ "state": format!("{state:?}") }))
            }
            (&Method::PUT, "vm.pause", State::Running) => {
                vmm.state = State::Paused;
                answered(done, &Value::Null)
            }
            (&Method::PUT, "vm.resume", State::Paused) => {
                if vmm.memory.moment != disk.moment() {
                    let moments = (vmm.memory.moment, disk.moment());
                    wrong = Some(format!(
                        "{id} runs with memory and disk of different moments: {moments:?}"
                    ));
                }
                vmm.state = State::Running;
                answered(done, &Value::Null)
            }
            (&Method::PUT, "vm.snapshot", State::Paused) => {
                if !vmm.memory.is_frozen {
                    wrong = Some(format!("{id} is written while its filesystems are not frozen"));
                }
                match directory(request).map(|directory| write(&vmm.memory, &directory)) {
                    Some(Ok(())) => answered(done, &Value::Null),
                    Some(Err(_)) | None => refused("The VM could not be snapshotted"),
                }
            }
            _ => refused("the VM's state does not allow it"),
        }
    });
    inner.wrong.extend(wrong);
    answer
}

/// Writes a snapshot as cloud-hypervisor does.
fn write(memory: &Memory, directory: &Path) -> std::io::Result<()> {
    let manager = json!({
        "memory_ranges": { "data": [{ "gpa": 0, "length": MEMORY }] },
        "guest_ram_mappings": [{ "gpa": 0, "size": MEMORY }],
    });
    let state = json!({
        "snapshots": { "memory-manager": { "snapshots": {}, "snapshot_data": { "state": manager.to_string() } } },
        "snapshot_data": null,
    });
    std::fs::write(directory.join("config.json"), "{}")?;
    std::fs::write(directory.join("state.json"), state.to_string())?;
    let file = File::create(directory.join("memory-ranges"))?;
    file.set_len(MEMORY)?;
    file.write_all_at(&serde_json::to_vec(memory)?, 0)
}

/// The VMM ends, as after a panic of its guest.
pub(crate) fn dies() -> End {
    shim::report(WaitStatus::Exited(1))
}

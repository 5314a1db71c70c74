//! Guests: what each knows, and the part of envd that the agent asks while a sandbox begins, is paused and resumed.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use roost_common::guest::{
    ACCESS_TOKEN_HEADER, FSFREEZE_PATH, FSTHAW_PATH, HEALTH_PATH, HELD_HEADER, Held, INIT_PATH, InitRequest,
    NONCE_HEADER, SNAPSHOT_PREPARE_PATH, VERSION_HEADER,
};
use roost_common::ids::Slot;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dice::Fault;
use crate::shim;
use crate::vmm::{self, Answer, Broken, State, answered};
use crate::world::{Inner, World};

/// What a guest has in its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Memory {
    /// envd answers.
    pub(crate) is_up: bool,
    pub(crate) is_frozen: bool,
    /// Which moment its disk was of when it last wrote to it.
    pub(crate) moment: u64,
    token: Option<String>,
    /// Who it was told it is.
    sandbox: Option<String>,
}

/// Answers for the guest in a slot, whichever that is.
pub(crate) async fn serve(world: Arc<World>, slot: Slot, listener: TcpListener) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("registered");
    loop {
        let (stream, _) = listener.accept().await.expect("accepted");
        let world = world.clone();
        tokio::spawn(async move {
            vmm::converse(stream, |request| answer(&world, slot, request)).await;
        });
    }
}

/// The guest in a slot, where there is one whose envd can answer.
fn number_of(inner: &Inner, slot: Slot) -> Option<u64> {
    let found = inner.shims.iter().find(|(_, shim)| {
        let vm = shim.vm.as_ref().filter(|vm| vm.slot == slot);
        vm.is_some_and(|vm| vm.vmm.state == State::Running && vm.vmm.memory.is_up)
    });
    found.map(|(number, _)| *number)
}

async fn answer(world: &Arc<World>, slot: Slot, request: Request<Bytes>) -> Result<Answer, Broken> {
    let mut fault = world.called().await;
    if request.uri().path() == FSTHAW_PATH {
        fault = world.decisive(fault);
    }
    // A packet to nobody is lost, and sent again by the caller's kernel.
    let number = loop {
        if let Some(number) = number_of(&world.lock(), slot) {
            break number;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    match fault {
        Fault::None | Fault::DoAndHang | Fault::Lose => {}
        Fault::Refuse => return Ok(answered(StatusCode::INTERNAL_SERVER_ERROR, &Value::Null)),
        Fault::Hang => std::future::pending().await,
        Fault::Die => {
            // In the middle of what it was asked for, or after it.
            if world.dice(|dice| dice.chance(500)) {
                act(world, number, &request);
            }
            shim::end(world, number, vmm::dies());
            return Err(Broken);
        }
    }
    let answer = act(world, number, &request);
    match fault {
        Fault::DoAndHang => std::future::pending().await,
        Fault::Lose => Err(Broken),
        _ => answer.ok_or(Broken),
    }
}

fn act(world: &World, number: u64, request: &Request<Bytes>) -> Option<Answer> {
    let mut inner = world.lock();
    // What is not written when it thaws is written some time later, or never.
    let writes = inner.dice.chance(500);
    let mut wrong = None;
    let path = request.uri().path();
    let answer = vmm::with(&mut inner, number, |vm, disk| {
        let (id, memory) = (vm.spec.sandbox.as_str(), &mut vm.vmm.memory);
        let said = request.headers().get(ACCESS_TOKEN_HEADER).map(HeaderValue::as_bytes);
        let knows = memory.token.as_ref().is_none_or(|token| said == Some(token.as_bytes()));
        if path != HEALTH_PATH && !knows {
            wrong = Some(format!("{path} of {id} is asked without its token"));
            return answered(StatusCode::UNAUTHORIZED, &Value::Null);
        }
        let mut answer = answered(StatusCode::NO_CONTENT, &Value::Null);
        match path {
            HEALTH_PATH => put(answer.headers_mut(), VERSION_HEADER, "1.0"),
            INIT_PATH => {
                let Ok(init) = serde_json::from_slice::<InitRequest>(request.body()) else {
                    return answered(StatusCode::BAD_REQUEST, &Value::Null);
                };
                memory.token = init.access_token;
                // Without a nonce it is told the time once more, and nothing else.
                let Some(nonce) = init.nonce else { return answer };
                if init.sandbox_id.as_deref() != Some(id) {
                    wrong = Some(format!("{id} is told that it is {:?}", init.sandbox_id));
                }
                memory.sandbox = init.sandbox_id;
                put(answer.headers_mut(), NONCE_HEADER, &nonce);
            }
            SNAPSHOT_PREPARE_PATH if !memory.is_frozen => memory.moment = disk.write(),
            SNAPSHOT_PREPARE_PATH => {}
            FSFREEZE_PATH => {
                memory.is_frozen = true;
                put(answer.headers_mut(), HELD_HEADER, Held::All.word());
            }
            FSTHAW_PATH => {
                memory.is_frozen = false;
                if writes {
                    memory.moment = disk.write();
                }
            }
            _ => return answered(StatusCode::NOT_FOUND, &Value::Null),
        }
        answer
    });
    inner.wrong.extend(wrong);
    answer
}

fn put(headers: &mut HeaderMap, name: &'static str, value: &str) {
    headers.insert(name, HeaderValue::from_str(value).expect("printable"));
}

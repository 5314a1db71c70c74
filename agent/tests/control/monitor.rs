//! A control plane's monitor, by its rules: every 15 s, one host after the other, so one thing after the other.
//!
//! - A host whose heartbeat is older than 90 s: its running sandboxes become missing.
//! - A host that is there is asked for its list. Missing and alive is running; missing and not alive is stopped, for good. Running and
//!   alive stays; running, not alive and auto-paused is paused; running, not alive and not auto-paused is stopped.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};

use crate::plane::{Belief, State};
use crate::property::Chance;

const TICK: Duration = Duration::from_secs(15);
const UNREACHABLE_AFTER: Duration = Duration::from_secs(90);
/// To the headers of an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(45);
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// Lists in a row that it may read and fail to act on, of which the agent cannot know.
const UNWRITTEN: u32 = 2;

/// What ListSandboxes says, as far as it is used.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct List {
    pub(crate) alive: BTreeSet<String>,
    pub(crate) auto_paused: BTreeSet<String>,
}

type Connection = SendRequest<Empty<Bytes>>;

pub(crate) struct Monitor {
    pub(crate) plane: Arc<Mutex<State>>,
    /// Where the agent listens, while there is one.
    pub(crate) agent: Arc<Mutex<Option<SocketAddr>>>,
    pub(crate) chance: Arc<Chance>,
}

impl Monitor {
    /// Goes on until it is dropped.
    pub(crate) async fn run(self) {
        let (mut idle, mut unwritten) = (Vec::new(), 0);
        let mut next = Instant::now() + self.chance.time(TICK);
        loop {
            sleep_until(next).await;
            next = next.max(Instant::now() - TICK) + TICK;
            if self.chance.happens(5) {
                // It is started anew, and its connections end with it.
                idle.clear();
                sleep_until(Instant::now() + self.chance.time(Duration::from_secs(120))).await;
                next = Instant::now();
                continue;
            }
            if !self.mark() {
                continue;
            }
            let known = self.known();
            let Some(list) = self.poll(&mut idle).await else {
                continue;
            };
            if unwritten < UNWRITTEN && self.chance.happens(30) {
                unwritten += 1;
                continue;
            }
            unwritten = 0;
            self.act(&known, &list);
        }
    }

    /// Whether the host is there.
    fn mark(&self) -> bool {
        let mut state = self.plane.lock().expect("not poisoned");
        let is_there = state.heard.is_some_and(|heard| heard.elapsed() <= UNREACHABLE_AFTER);
        if !is_there {
            for belief in state.sandboxes.values_mut() {
                if *belief == Belief::Running {
                    *belief = Belief::Missing;
                }
            }
        }
        is_there
    }

    fn known(&self) -> BTreeSet<String> {
        let state = self.plane.lock().expect("not poisoned");
        state.sandboxes.keys().cloned().collect()
    }

    /// Of a sandbox that was made after the question the answer says nothing; one that took it to would be beyond any agent's help.
    fn act(&self, known: &BTreeSet<String>, list: &List) {
        let mut state = self.plane.lock().expect("not poisoned");
        for (id, belief) in state.sandboxes.iter_mut().filter(|(id, _)| known.contains(*id)) {
            let (alive, auto_paused) = (list.alive.contains(id), list.auto_paused.contains(id));
            *belief = match (*belief, alive) {
                (Belief::Missing, true) => Belief::Running,
                (Belief::Missing, false) => Belief::Stopped,
                (Belief::Running, true) => Belief::Running,
                (Belief::Running, false) if auto_paused => Belief::Paused,
                (Belief::Running, false) => Belief::Stopped,
                (other, _) => other,
            };
        }
    }

    async fn poll(&self, idle: &mut Vec<Connection>) -> Option<List> {
        let kept = if self.chance.happens(150) { None } else { idle.pop() };
        let mut connection = match kept.filter(|connection| !connection.is_closed()) {
            Some(connection) => connection,
            None => self.dial().await?,
        };
        connection.ready().await.ok()?;
        let request = Request::post("/list")
            .header("host", "agent")
            .body(Empty::new())
            .expect("a request");
        let answer = timeout(ANSWER_LIMIT, connection.send_request(request))
            .await
            .ok()?
            .ok()?;
        let body = answer.into_body().collect().await.ok()?.to_bytes();
        idle.truncate(3);
        idle.push(connection);
        serde_json::from_slice(&body).ok()
    }

    async fn dial(&self) -> Option<Connection> {
        let address = (*self.agent.lock().expect("not poisoned"))?;
        let stream = timeout(DIAL_LIMIT, TcpStream::connect(address)).await.ok()?.ok()?;
        stream.set_nodelay(true).expect("set");
        let (sender, connection) = handshake(TokioIo::new(stream)).await.ok()?;
        // Its end is told by its answers.
        tokio::spawn(connection);
        Some(sender)
    }
}

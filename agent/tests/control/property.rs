//! Histories by chance: outages of either direction, answers that are lost or late, restarts of agent and control plane, tokens that
//! end, sandboxes that are made, paused, resumed and that end. In none of them does a control plane that goes by its rules have a
//! sandbox for stopped that runs or is paused; and once nothing goes wrong any more it has them for what they are.
//!
//! Not here: a control plane that three times in a row reads a list and fails to act on it; a registration that is lost.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use roost_agent::control::clock::Moment;
use roost_agent::control::events::Events;
use roost_agent::control::heartbeat;
use roost_agent::control::listing::{Connection, Listing, Shown};
use roost_agent::outbox::{self, Event, EventKind, Limits, Outbox, OutboxError};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::monitor::{List, Monitor};
use crate::plane::{Belief, Fate, OnAutoPaused, Plane, REFRESH, TOKEN};

/// Histories of an ordinary run.
const HISTORIES: u64 = 48;
/// Most sandboxes that are alive at a time.
const SANDBOXES: usize = 6;
/// How long nothing goes wrong at the end: more than the longest pause of anything that is tried again, and some polls.
const CALM: Duration = Duration::from_secs(1200);

/// What a sandbox really does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    Running,
    Paused,
    Ended,
}

/// Chance from a seed, and what goes wrong by it.
pub(crate) struct Chance(Mutex<Odds>);

struct Odds {
    dice: fastrand::Rng,
    /// Of a thousand calls.
    faults: u64,
    /// Until when the agent's calls do not arrive, and those to it.
    out_until: Instant,
    in_until: Instant,
    is_calm: bool,
}

impl Odds {
    fn below(&mut self, end: u64) -> u64 {
        self.dice.u64(..end)
    }

    fn fate(&mut self, is_out: bool, slowest: u64) -> Fate {
        if self.is_calm {
            return Fate::Answered;
        }
        if is_out {
            let ways = [
                Fate::Lost,
                Fate::Hangs,
                Fate::Proxy(502),
                Fate::Proxy(404),
                Fate::Proxy(403),
            ];
            return ways[usize::try_from(self.below(5)).expect("an index")];
        }
        if self.below(1000) >= self.faults {
            return Fate::Answered;
        }
        match self.below(6) {
            0 => Fate::Lost,
            1 => Fate::AnswerLost,
            2 => Fate::Hangs,
            3 => Fate::Proxy(503),
            _ => Fate::Slow(Duration::from_millis(self.below(slowest * 1000))),
        }
    }
}

impl Chance {
    fn new(seed: u64) -> Arc<Self> {
        let now = Instant::now();
        let mut odds = Odds {
            dice: fastrand::Rng::with_seed(seed),
            faults: 0,
            out_until: now,
            in_until: now,
            is_calm: false,
        };
        odds.faults = [0, 20, 100, 300][usize::try_from(odds.below(4)).expect("an index")];
        Arc::new(Self(Mutex::new(odds)))
    }

    fn lock(&self) -> MutexGuard<'_, Odds> {
        self.0.lock().expect("not poisoned")
    }

    fn below(&self, end: u64) -> u64 {
        self.lock().below(end)
    }

    /// True so many times in a thousand, until nothing goes wrong any more.
    pub(crate) fn happens(&self, in_a_thousand: u64) -> bool {
        let mut odds = self.lock();
        odds.below(1000) < in_a_thousand && !odds.is_calm
    }

    pub(crate) fn time(&self, below: Duration) -> Duration {
        Duration::from_millis(self.below(u64::try_from(below.as_millis()).expect("fits")))
    }

    /// What becomes of a call of the agent.
    fn call(&self, path: &str) -> Fate {
        let mut odds = self.lock();
        let is_out = Instant::now() < odds.out_until;
        match odds.fate(is_out, 15) {
            // That is for each history to say: whoever loses the answer to a refresh may be locked out.
            Fate::AnswerLost if path == REFRESH && odds.below(4) > 0 => Fate::Lost,
            fate => fate,
        }
    }

    /// What becomes of a call to the agent.
    fn poll(&self) -> Fate {
        let mut odds = self.lock();
        let is_out = Instant::now() < odds.in_until;
        odds.fate(is_out, 60)
    }
}

/// The host: what outlives an agent.
struct Host {
    dir: tempfile::TempDir,
    plane: Plane,
    chance: Arc<Chance>,
    truth: Mutex<BTreeMap<String, Truth>>,
    /// What the control plane is still to be told, as records say.
    untold: Mutex<Vec<Event>>,
    news: Notify,
    agent: Arc<Mutex<Option<SocketAddr>>>,
}

impl Host {
    fn truth(&self) -> MutexGuard<'_, BTreeMap<String, Truth>> {
        self.truth.lock().expect("not poisoned")
    }

    fn believe(&self, id: &str, belief: Belief) {
        // What is stopped stays so.
        let mut state = self.plane.lock();
        let was = state.sandboxes.entry(id.to_owned()).or_insert(belief);
        if *was != Belief::Stopped {
            *was = belief;
        }
    }

    fn one_that(&self, is: Truth) -> Option<String> {
        let ids: Vec<String> = self
            .truth()
            .iter()
            .filter(|(_, truth)| **truth == is)
            .map(|(id, _)| id.clone())
            .collect();
        let number = usize::try_from(self.chance.below(ids.len().max(1) as u64)).expect("an index");
        ids.get(number).cloned()
    }

    fn tell(&self, kind: EventKind, id: &str) {
        let event = Event::new(kind, id.parse().expect("an id"), 0);
        self.untold.lock().expect("not poisoned").push(event);
        self.news.notify_one();
    }

    /// What is believed that must not be.
    fn wrong(&self) -> Vec<String> {
        let (state, truth) = (self.plane.lock(), self.truth());
        let stopped = state.sandboxes.iter().filter(|(_, belief)| **belief == Belief::Stopped);
        stopped
            .filter(|(id, _)| truth[*id] != Truth::Ended)
            .map(|(id, _)| format!("{id} is {:?} and believed to be stopped", truth[id]))
            .collect()
    }

    /// What is not believed that should be, once nothing has gone wrong for long.
    fn unsettled(&self) -> Vec<String> {
        let (state, truth) = (self.plane.lock(), self.truth());
        let right = |id: &str, belief: Belief| match truth[id] {
            // A pause that it is told of late, or a resume of which it did not hear: whoever asks for it gets it.
            Truth::Running => matches!(belief, Belief::Running | Belief::Paused),
            Truth::Paused => belief == Belief::Paused,
            Truth::Ended => belief == Belief::Stopped,
        };
        let odd = state.sandboxes.iter().filter(|(id, belief)| !right(id, **belief));
        odd.map(|(id, belief)| format!("{id} is {:?} and believed to be {belief:?}", truth[id]))
            .collect()
    }
}

/// One life of an agent; dropping it is its end, wherever it is.
async fn live(host: &Arc<Host>) -> JoinSet<()> {
    let mut life = JoinSet::new();
    let listing = Arc::new(Listing::under_control_plane());
    let session = host.plane.session(host.dir.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    *host.agent.lock().expect("not poisoned") = Some(listener.local_addr().expect("an address"));
    let outbox = open_outbox(host.dir.path()).await;
    life.spawn({
        let (host, listing) = (host.clone(), listing.clone());
        async move { match serve(listener, host, listing).await {} }
    });
    life.spawn({
        let session = session.clone();
        async move {
            heartbeat::run(&session, &listing).await;
            panic!("nobody has deleted this host");
        }
    });
    life.spawn({
        let outbox = outbox.clone();
        async move { match outbox::run(outbox, Events(session)).await {} }
    });
    let host = host.clone();
    life.spawn(async move {
        loop {
            let next = host.untold.lock().expect("not poisoned").first().cloned();
            match next {
                Some(event) => {
                    outbox.put(event).await.expect("kept");
                    host.untold.lock().expect("not poisoned").remove(0);
                }
                None => host.news.notified().await,
            }
        }
    });
    life
}

/// The one before has let go of it once it has written what it had to.
async fn open_outbox(dir: &Path) -> Outbox {
    loop {
        match Outbox::open(&dir.join("outbox"), Limits::default()) {
            Err(OutboxError::InUse { .. }) => sleep(Duration::from_millis(10)).await,
            outcome => return outcome.expect("opened"),
        }
    }
}

async fn serve(listener: TcpListener, host: Arc<Host>, listing: Arc<Listing>) -> Infallible {
    let mut connections = JoinSet::new();
    for number in 0.. {
        let (stream, _) = listener.accept().await.expect("accepted");
        stream.set_nodelay(true).expect("set");
        let (host, listing) = (host.clone(), listing.clone());
        connections.spawn(async move {
            let service =
                service_fn(move |_: Request<Incoming>| list(host.clone(), listing.clone(), Connection(number)));
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // One that was broken off is meant to be.
            drop(connection.await);
        });
        while connections.try_join_next().is_some() {}
    }
    unreachable!("there are more numbers than connections")
}

async fn list(host: Arc<Host>, listing: Arc<Listing>, connection: Connection) -> io::Result<Response<Full<Bytes>>> {
    let broken = || io::Error::from(io::ErrorKind::ConnectionReset);
    let fate = host.chance.poll();
    match fate {
        Fate::Lost | Fate::Proxy(_) | Fate::Refused(_) => return Err(broken()),
        Fate::Hangs => std::future::pending().await,
        Fate::Answered | Fate::Slow(_) | Fate::AnswerLost => {}
    }
    let mut list = List::default();
    let shown = listing.shown(Some(connection), Moment::now());
    for (id, truth) in &*host.truth() {
        let into = match truth {
            Truth::Running => &mut list.alive,
            Truth::Paused if shown == Shown::AsAlive => &mut list.alive,
            Truth::Paused => &mut list.auto_paused,
            Truth::Ended => continue,
        };
        into.insert(id.clone());
    }
    match fate {
        Fate::AnswerLost => return Err(broken()),
        Fate::Slow(time) => sleep(time).await,
        _ => {}
    }
    let body = serde_json::to_vec(&list).expect("serialised");
    Ok(Response::new(Full::from(body)))
}

/// A call of the control plane that pauses or resumes, and whose answer may be lost.
async fn call(host: Arc<Host>, id: String, to: Truth) {
    let (before, meanwhile, after) = match to {
        Truth::Paused => (Belief::Running, Belief::Pausing, Belief::Paused),
        Truth::Running => (Belief::Paused, Belief::Resuming, Belief::Running),
        Truth::Ended => unreachable!("that is no call of these"),
    };
    {
        let mut state = host.plane.lock();
        let belief = state.sandboxes.get_mut(&id).expect("made");
        if *belief != before {
            return;
        }
        *belief = meanwhile;
    }
    sleep(host.chance.time(Duration::from_secs(20))).await;
    let arrives = !host.chance.happens(200);
    if arrives && let Some(truth) = host.truth().get_mut(&id).filter(|truth| **truth != Truth::Ended) {
        *truth = to;
    }
    sleep(host.chance.time(Duration::from_secs(30))).await;
    let is_answered = arrives && !host.chance.happens(300);
    host.believe(&id, if is_answered { after } else { before });
}

/// Plays a history; what was wrong.
async fn history(seed: u64) -> Vec<String> {
    let chance = Chance::new(seed);
    let plane = Plane::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    plane.register(dir.path(), TOKEN).await.expect("registered");
    {
        let ways = [
            OnAutoPaused::Ignored,
            OnAutoPaused::IfRunning,
            OnAutoPaused::IfRunningOrMissing,
        ];
        let mut state = plane.lock();
        state.on_auto_paused = ways[usize::try_from(chance.below(3)).expect("an index")];
        state.keeps_grace = chance.below(4) > 0;
        state.is_old = chance.below(3) == 0;
    }
    plane.judge({
        let chance = chance.clone();
        move |path| chance.call(path)
    });
    let host = Arc::new(Host {
        dir,
        plane,
        chance: chance.clone(),
        truth: Mutex::default(),
        untold: Mutex::default(),
        news: Notify::new(),
        agent: Arc::default(),
    });
    let monitor = Monitor {
        plane: host.plane.state(),
        agent: host.agent.clone(),
        chance: chance.clone(),
    };
    let mut others = JoinSet::new();
    others.spawn(monitor.run());
    let mut life = live(&host).await;
    let end = Instant::now() + Duration::from_secs(1200 + chance.below(6000));
    let mut made = 0;
    while Instant::now() < end {
        sleep(chance.time(Duration::from_secs(40))).await;
        match chance.below(100) {
            0..20 => {
                let alive = host.truth().values().filter(|truth| **truth != Truth::Ended).count();
                // A control plane creates where a host is there.
                if alive < SANDBOXES
                    && host
                        .plane
                        .lock()
                        .heard
                        .is_some_and(|heard| heard.elapsed().as_secs() < 90)
                {
                    made += 1;
                    let id = format!("s{made}");
                    host.truth().insert(id.clone(), Truth::Running);
                    host.believe(&id, Belief::Running);
                }
            }
            20..45 => {
                if let Some(id) = host.one_that(Truth::Running) {
                    host.truth().insert(id.clone(), Truth::Paused);
                    host.tell(EventKind::AutoPaused, &id);
                }
            }
            45..55 => {
                if let Some(id) = host.one_that(Truth::Running) {
                    others.spawn(call(host.clone(), id, Truth::Paused));
                }
            }
            55..70 => {
                if let Some(id) = host.one_that(Truth::Paused) {
                    others.spawn(call(host.clone(), id, Truth::Running));
                }
            }
            70..73 => {
                if let Some(id) = host.one_that(Truth::Running) {
                    host.truth().insert(id.clone(), Truth::Ended);
                    host.tell(EventKind::Error, &id);
                }
            }
            73..76 => {
                if let Some(id) = host.one_that(Truth::Paused) {
                    host.truth().insert(id.clone(), Truth::Ended);
                    host.believe(&id, Belief::Stopped);
                }
            }
            76..82 => {
                // The agent ends, and is away for no time or for some.
                life.shutdown().await;
                *host.agent.lock().expect("not poisoned") = None;
                let away = [0, 5, 60, 200][usize::try_from(chance.below(4)).expect("an index")];
                sleep(Duration::from_secs(away)).await;
                life = live(&host).await;
            }
            82..89 => chance.lock().out_until = Instant::now() + chance.time(Duration::from_secs(300)),
            89..94 => chance.lock().in_until = Instant::now() + chance.time(Duration::from_secs(300)),
            94..97 => {
                let until = Instant::now() + chance.time(Duration::from_secs(300));
                let mut odds = chance.lock();
                (odds.out_until, odds.in_until) = (until, until);
            }
            _ => host.plane.lock().is_expired = true,
        }
        let wrong = host.wrong();
        if !wrong.is_empty() {
            return wrong;
        }
    }
    chance.lock().is_calm = true;
    sleep(CALM).await;
    let mut wrong = host.wrong();
    // A host that has lost the answer to a refresh is locked out, and nothing worse.
    if host
        .plane
        .lock()
        .heard
        .is_some_and(|heard| heard.elapsed().as_secs() < 60)
    {
        wrong.extend(host.unsettled());
    }
    life.shutdown().await;
    wrong
}

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {text}")),
    )
}

#[test]
fn no_history_has_a_control_plane_believe_that_a_sandbox_stopped_that_did_not() {
    let one = from_environment("ROOST_CONTROL_SEED");
    let histories = from_environment("ROOST_CONTROL_HISTORIES").unwrap_or(if one.is_some() { 1 } else { HISTORIES });
    let next = AtomicU64::new(1);
    let play = || loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number > histories {
            return;
        }
        let seed = one.unwrap_or(number);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .max_blocking_threads(1)
            .build()
            .expect("a runtime");
        let wrong = runtime.block_on(history(seed));
        if !wrong.is_empty() {
            next.store(histories + 1, Ordering::Relaxed);
            panic!(
                "history {seed} (ROOST_CONTROL_SEED={seed} plays it again):\n{}",
                wrong.join("\n")
            );
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(play);
        play();
    });
}

//! The status page: what runs on this host and how it is, for a browser on this machine.
//!
//! Its listener asks nobody who they are, so the page is off until an operator switches it on (`status_page`): with it every local user may
//! learn ids, states and figures of sandboxes. Never more: no address, no command, no name of a team or a template, nothing that a guest wrote.
//!
//! Holds: nothing here changes anything. Every list has a bound. The browser is told to load and to reach nothing else, and who calls the
//! listener by another name than this machine's own is refused, so a web page of somebody else's cannot read it through a name of theirs that
//! leads here.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Mutex;

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::Full;
use roost_common::ids::SandboxId;
use serde::Serialize;

use crate::doctor::Finding;
use crate::metrics::{Point, Range};
use crate::registry::Registry;
use crate::sandbox::task::{Handle, View};
use crate::sandbox::unix_now;

/// Changes that are kept.
const MAX_CHANGES: usize = 200;
/// Sandboxes that are shown.
const MAX_SANDBOXES: usize = 200;
/// Points of a line, and the seconds of each: ten minutes.
const POINTS: usize = 40;
const SECONDS_A_POINT: i64 = 15;

/// What the browser is let do: load script and style of ours, ask for the figures. No form, no frame, no text that becomes HTML.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// A sandbox that went from one state to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// When, in seconds since 1970.
    pub unix: i64,
    /// Which sandbox.
    pub id: String,
    /// From where.
    pub from: &'static str,
    /// To where.
    pub to: &'static str,
}

/// The last changes of an agent, in memory.
#[derive(Debug, Default)]
pub struct Changes(Mutex<VecDeque<Change>>);

impl Changes {
    /// Notes one.
    pub fn add(&self, id: &SandboxId, from: &'static str, to: &'static str) {
        let mut changes = self.0.lock().expect("nothing panics while it holds this");
        changes.truncate(MAX_CHANGES - 1);
        changes.push_front(Change {
            unix: unix_now(),
            id: id.to_string(),
            from,
            to,
        });
    }

    /// The newest first.
    fn all(&self) -> Vec<Change> {
        let changes = self.0.lock().expect("nothing panics while it holds this");
        changes.iter().cloned().collect()
    }
}

/// All that the page shows.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Now, in seconds since 1970.
    pub unix: i64,
    /// Of the agent.
    pub version: &'static str,
    /// Whether what ran before the agent was started has been taken over.
    pub ready: bool,
    /// The machine.
    pub host: Figures,
    /// At most [`MAX_SANDBOXES`], those that are not paused first.
    pub sandboxes: Vec<Sandbox>,
    /// How many there are besides.
    pub more: usize,
    /// The newest first.
    pub changes: Vec<Change>,
    /// What the agent sees of its host.
    pub findings: Vec<Finding>,
}

/// The machine.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// How many there are, paused ones too.
    pub sandboxes: usize,
    /// How many there may be.
    pub max_sandboxes: u32,
    /// Of the data directory's file system; `None` until it has been looked at.
    pub disk: Option<Disk>,
    /// Of the machine.
    pub memory: Option<Memory>,
    /// Over a minute.
    pub load: Option<f64>,
    /// Of the machine.
    pub processors: usize,
    /// That nobody has taken yet.
    pub outbox_events: usize,
}

/// Room on a file system, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Disk {
    /// What is free.
    pub free: u64,
    /// What is kept free, below which work is refused.
    pub reserve: u64,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// What may be used.
    pub available: u64,
    /// All.
    pub total: u64,
}

/// A sandbox.
#[derive(Debug, Clone, Serialize)]
pub struct Sandbox {
    /// Its id.
    pub id: String,
    /// In the words of the API.
    pub state: &'static str,
    /// Whether its processors are held, for want of room.
    pub held: bool,
    /// How many it has.
    pub vcpus: u8,
    /// In seconds since 1970.
    pub created_at_unix: i64,
    /// Of all its processors; a point is the highest of 15 s, the oldest first, `None` where nothing is known.
    pub cpu_percent: Vec<Option<u64>>,
    /// In use, in MiB.
    pub memory_mb: Vec<Option<u64>>,
    /// In MiB.
    pub memory_limit_mb: u32,
    /// In use on its root file system, in MiB.
    pub disk_mb: Vec<Option<u64>>,
}

impl Sandbox {
    fn new(handle: &Handle, now: i64) -> Self {
        let plan = &handle.plan;
        let range = Range::of_name("10m").expect("a range of the protocol");
        let points = handle.metrics.range(range, now);
        let mebibytes = |bytes: i64| u64::try_from(bytes).unwrap_or(0) >> 20;
        Self {
            id: plan.id.to_string(),
            state: handle.view().name(),
            held: handle.hold_state().is_held(),
            vcpus: plan.vcpus.0,
            created_at_unix: handle.created_at_unix,
            cpu_percent: line(&points, now, |point| point.cpu_percent.round() as u64),
            memory_mb: line(&points, now, |point| mebibytes(point.memory)),
            memory_limit_mb: plan.memory.0,
            disk_mb: line(&points, now, |point| mebibytes(point.disk)),
        }
    }
}

/// The highest of each 15 s of the last ten minutes.
fn line(points: &[Point], now: i64, of: impl Fn(&Point) -> u64) -> Vec<Option<u64>> {
    let mut line = vec![None; POINTS];
    for point in points {
        let ago = usize::try_from((now - point.unix) / SECONDS_A_POINT);
        // A clock that was set back has points in the future.
        if let Ok(ago) = ago
            && ago < POINTS
        {
            let highest = &mut line[POINTS - 1 - ago];
            *highest = Some(of(point)).max(*highest);
        }
    }
    line
}

impl Status {
    /// As it is now.
    pub fn look(registry: &Registry, is_ready: bool, findings: Vec<Finding>) -> Self {
        let (now, host, handles) = (unix_now(), registry.host(), registry.list());
        let paused = |handle: &&Handle| matches!(handle.view(), View::Paused(_));
        let shown = handles.iter().filter(|handle| !paused(handle));
        let shown = shown.chain(handles.iter().filter(paused)).take(MAX_SANDBOXES);
        let sandboxes: Vec<_> = shown.map(|handle| Sandbox::new(handle, now)).collect();
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            unix: now,
            version: env!("CARGO_PKG_VERSION"),
            ready: is_ready,
            host: Figures {
                sandboxes: handles.len(),
                max_sandboxes: host.config().max_sandboxes,
                disk: registry.space().map(|space| Disk {
                    free: space.free,
                    reserve: space.reserve,
                }),
                memory: memory(&read("/proc/meminfo")),
                load: read("/proc/loadavg")
                    .split(' ')
                    .next()
                    .and_then(|load| load.parse().ok()),
                processors: std::thread::available_parallelism().map_or(1, usize::from),
                outbox_events: host.outbox().map_or(0, crate::outbox::Outbox::depth),
            },
            more: handles.len().saturating_sub(sandboxes.len()),
            sandboxes,
            changes: host.changes.all(),
            findings,
        }
    }
}

/// The machine's memory, of `/proc/meminfo`.
fn memory(text: &str) -> Option<Memory> {
    let kibibytes = |name: &str| -> Option<u64> {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some(Memory {
        available: kibibytes("MemAvailable")? << 10,
        total: kibibytes("MemTotal")? << 10,
    })
}

/// Whether a request is to this machine by a name of its own, whatever the port: one that was forwarded has another.
fn is_local(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let Some(authority) = host.and_then(|host| host.parse::<http::uri::Authority>().ok()) else {
        return false;
    };
    let name = authority.host();
    let v6 = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let is_loopback = match v6 {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback()),
        None => name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback()),
    };
    !authority.as_str().contains('@') && (is_loopback || name.eq_ignore_ascii_case("localhost"))
}

/// The answer to a request of the page's, `None` for what is not the page's. Whether it is switched on is the caller's to know.
pub fn answer(path: &str, headers: &HeaderMap, status: impl FnOnce() -> Status) -> Option<Response<Full<Bytes>>> {
    let (kind, text) = match path {
        "/" => ("text/html; charset=utf-8", include_str!("index.html")),
        "/page.css" => ("text/css; charset=utf-8", include_str!("page.css")),
        "/page.js" => ("text/javascript; charset=utf-8", include_str!("page.js")),
        "/status.json" => ("application/json", ""),
        _ => return None,
    };
    if !is_local(headers) {
        let text = "call this machine by its own name: localhost, 127.0.0.1 or [::1]\n";
        return Some(reply(StatusCode::FORBIDDEN, "text/plain; charset=utf-8", text.into()));
    }
    let body = if path == "/status.json" {
        serde_json::to_vec(&status()).expect("texts and numbers").into()
    } else {
        Bytes::from_static(text.as_bytes())
    };
    Some(reply(StatusCode::OK, kind, body))
}

fn reply(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, kind)
        .header(header::CONTENT_SECURITY_POLICY, POLICY)
        .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
        .header(header::REFERRER_POLICY, "no-referrer")
        .header(header::CACHE_CONTROL, "no-store")
        .header("cross-origin-resource-policy", "same-origin")
        .header("cross-origin-opener-policy", "same-origin")
        .body(Full::new(body))
        .expect("constant parts")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::Config;
    use crate::host::Host;

    fn headers(host: &str) -> HeaderMap {
        let host = host.parse().expect("a header");
        HeaderMap::from_iter([(header::HOST, host)])
    }

    fn status() -> Status {
        let registry = Registry::new(Arc::new(Host::new(Config::default())));
        Status::look(&registry, true, Vec::new())
    }

    #[test]
    fn only_this_machine_by_its_own_name_is_answered() {
        for (host, is) in [
            ("127.0.0.1:50052", true),
            ("127.0.0.2", true),
            ("[::1]:8080", true),
            ("localhost:1", true),
            ("LOCALHOST", true),
            ("evil.example:50052", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("127.0.0.1@evil.example", false),
            ("evil@127.0.0.1", false),
            ("10.0.0.1:50052", false),
            ("[::2]", false),
            ("", false),
        ] {
            let answer = answer("/status.json", &headers(host), status).expect("the page's");
            assert_eq!(answer.status() == StatusCode::OK, is, "{host:?}");
        }
        let without = answer("/", &HeaderMap::new(), status).expect("the page's");
        assert_eq!(without.status(), StatusCode::FORBIDDEN);
        assert!(answer("/status.json/", &headers("localhost"), status).is_none());
    }

    #[test]
    fn every_answer_has_the_browser_do_nothing_else() {
        for path in ["/", "/page.css", "/page.js", "/status.json"] {
            let answer = answer(path, &headers("localhost"), status).expect("the page's");
            assert_eq!(answer.headers()[header::CONTENT_SECURITY_POLICY], POLICY, "{path}");
            assert_eq!(answer.headers()[header::X_CONTENT_TYPE_OPTIONS], "nosniff", "{path}");
        }
        let (html, script) = (include_str!("index.html"), include_str!("page.js"));
        for forbidden in ["<style", "style=", "onclick", "onload", "http://", "https://"] {
            assert!(!html.contains(forbidden), "{forbidden}");
        }
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "https://",
            ".style",
        ] {
            assert!(!script.contains(forbidden), "{forbidden}");
        }
    }

    #[test]
    fn a_line_has_the_highest_of_each_time_and_gaps_where_nothing_is_known() {
        let point = |unix, cpu_percent| Point {
            unix,
            cpu_percent,
            memory: 0,
            disk: 0,
        };
        let points = [
            point(400, 1.0),
            point(401, 99.0),
            point(985, 7.4),
            point(1_000, 8.6),
            point(1_100, 50.0),
        ];
        let line = line(&points, 1_000, |point| point.cpu_percent.round() as u64);
        assert_eq!(line.len(), POINTS);
        let known: Vec<_> = line
            .iter()
            .enumerate()
            .filter_map(|(at, value)| Some((at, (*value)?)))
            .collect();
        assert_eq!(known, [(0, 99), (38, 7), (39, 9)]);
    }

    #[test]
    fn changes_are_the_newest_first_and_so_many() {
        let changes = Changes::default();
        for number in 0..MAX_CHANGES + 5 {
            changes.add(&format!("s{number}").parse().expect("an id"), "running", "paused");
        }
        let all = changes.all();
        assert_eq!(
            (all.len(), &*all[0].id, &*all[MAX_CHANGES - 1].id),
            (MAX_CHANGES, "s204", "s5")
        );
    }

    #[test]
    fn memory_is_read_as_the_kernel_writes_it() {
        let text = "MemTotal:        2048 kB\nMemFree:  1 kB\nMemAvailable:    1024 kB\n";
        let memory_of = Memory {
            available: 1 << 20,
            total: 2 << 20,
        };
        assert_eq!(memory(text), Some(memory_of));
        assert_eq!(memory("MemTotal: many\n"), None);
        let status = serde_json::to_value(status()).expect("JSON");
        assert_eq!(
            (&status["sandboxes"], &status["more"]),
            (&serde_json::json!([]), &serde_json::json!(0))
        );
        assert!(
            status["host"]["memory"]["total"]
                .as_u64()
                .is_some_and(|total| total > 0)
        );
    }
}

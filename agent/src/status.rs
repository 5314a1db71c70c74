//! What the agent knows of itself, for those who watch it: Prometheus metrics and health on a listener of this machine alone.
//!
//! Holds: no metric names a sandbox, a team or a template, so that the number of time series does not grow with them and whoever may
//! look learns of none; the status page ([`page`]) does, where it is switched on. The listener speaks plain HTTP to anybody on this machine; it
//! changes nothing.

use std::convert::Infallible;
use std::fmt::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry as Metrics;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::config::Sources;
use crate::doctor::{self, Finding};
use crate::host::files::blocking;
use crate::page::{self, Status};
use crate::registry::Registry;
use crate::sandbox::task::View;
use crate::serve;

/// Most connections at a time; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 16;
/// Time for the headers of a request, and so how long a connection may be idle.
const IDLE_LIMIT: Duration = Duration::from_secs(75);
/// Between two looks at the host.
const LOOK_PAUSE: Duration = Duration::from_secs(60);
/// The format of the metrics.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Bounds of the histograms, in seconds: from a call of privd to a large memory that is written.
const SECONDS: [f64; 15] = [
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0,
];

/// Names and values of labels.
type Labels = [(&'static str, &'static str); 2];

/// How long things take, and how they end.
#[derive(Debug, Clone)]
pub struct Timings(Family<Labels, Histogram, fn() -> Histogram>);

impl Default for Timings {
    fn default() -> Self {
        Self(Family::new_with_constructor(|| Histogram::new(SECONDS)))
    }
}

impl Timings {
    /// Does `work`, and notes how long that took. `kind` is the name of what it is.
    pub async fn of<T, E>(&self, kind: &'static str, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let began = Instant::now();
        let outcome = work.await;
        let word = if outcome.is_ok() { "ok" } else { "error" };
        let labels = [("kind", kind), ("outcome", word)];
        self.0.get_or_create(&labels).observe(began.elapsed().as_secs_f64());
        outcome
    }
}

/// What is counted anew each time that somebody looks.
#[derive(Debug)]
struct Seen(Arc<Registry>);

/// The states in which sandboxes are listed, in the words of the API.
const STATES: [&str; 7] = [
    "starting",
    "running",
    "pausing",
    "paused",
    "resuming",
    "unreachable",
    "stopping",
];

impl Collector for Seen {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let registry = &self.0;
        let views: Vec<View> = registry.list().iter().map(|handle| handle.view()).collect();
        let one = ConstGauge::new(0_u64);
        let mut states = encoder.encode_descriptor("roost_sandboxes", "Sandboxes", None, one.metric_type())?;
        for state in STATES {
            let count = views.iter().filter(|view| view.name() == state).count();
            let labels = [("state", state)];
            ConstGauge::new(count as u64).encode(states.encode_family(&labels)?)?;
        }
        let host = registry.host();
        let room = registry.space();
        for (name, help, value) in [
            (
                "roost_sandboxes_limit",
                "Most sandboxes at a time",
                u64::from(host.config().max_sandboxes),
            ),
            (
                "roost_ready_shims",
                "Shims that were made ahead",
                host.ready.shims() as u64,
            ),
            (
                "roost_ready_networks",
                "Networks that were made ahead",
                host.ready.addresses().len() as u64,
            ),
            (
                "roost_disk_free_bytes",
                "Free on the filesystem of the data directory",
                room.map_or(0, |room| room.free),
            ),
            (
                "roost_disk_reserve_bytes",
                "Kept free, for the memory of running sandboxes among it",
                room.map_or(0, |room| room.reserve),
            ),
            (
                "roost_outbox_events",
                "Lifecycle events that nobody has taken yet",
                host.outbox().map_or(0, |outbox| outbox.depth() as u64),
            ),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        for (name, help, value) in [
            (
                "roost_outbox_dropped_events",
                "Lifecycle events that were dropped for want of room",
                host.outbox().map_or(0, |outbox| outbox.dropped()),
            ),
            (
                "roost_outbox_refused_events",
                "Lifecycle events that the control plane refused",
                host.outbox().map_or(0, |outbox| outbox.refused()),
            ),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}

/// All metrics of an agent.
fn metrics(registry: &Arc<Registry>) -> Metrics {
    let mut metrics = Metrics::default();
    let host = registry.host();
    metrics.register(
        "roost_operation_seconds",
        "Creates, pauses, resumes, captures and destroys, as their callers see them",
        host.operations.0.clone(),
    );
    metrics.register(
        "roost_privd_call_seconds",
        "Calls of privd, its answer included",
        host.privd.timings().0.clone(),
    );
    metrics.register_collector(Box::new(Seen(registry.clone())));
    metrics
}

/// What is answered from.
struct Pages {
    metrics: Metrics,
    registry: Arc<Registry>,
    /// What was wrong with the host at the last look, for the status page.
    findings: ArcSwap<Vec<Finding>>,
}

impl Pages {
    fn new(registry: Arc<Registry>) -> Self {
        Self {
            metrics: metrics(&registry),
            registry,
            findings: ArcSwap::default(),
        }
    }

    /// Looks at the host now and then for as long as there is a page to show it.
    async fn look(&self, sources: Sources) -> Infallible {
        loop {
            if self.registry.host().config().status_page {
                let sources = sources.clone();
                let look = move || doctor::examine_own(&doctor::Host::of_agent(&sources));
                self.findings.store(Arc::new(blocking(look).await));
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }
}

/// Serves until the process ends. `sources` are those of the configuration, `is_ready` says whether recovery is complete.
pub async fn serve(
    listener: TcpListener,
    registry: Arc<Registry>,
    sources: Sources,
    is_ready: impl Fn() -> bool + Clone + Send + 'static,
) -> Infallible {
    let pages = Arc::new(Pages::new(registry));
    let looking = pages.clone();
    tokio::spawn(async move { looking.look(sources).await });
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let place = places.clone().acquire_owned().await.expect("never closed");
        let (stream, _) = serve::accept(&listener).await;
        let (pages, is_ready) = (pages.clone(), is_ready.clone());
        tokio::spawn(async move {
            let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                let answer = answer(&request, &pages, is_ready());
                async move { Ok::<_, Infallible>(answer) }
            });
            let mut server = hyper::server::conn::http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(IDLE_LIMIT);
            if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a status connection ended");
            }
            drop(place);
        });
    }
}

fn answer<B>(request: &Request<B>, pages: &Pages, is_ready: bool) -> Response<Full<Bytes>> {
    let text = |status, text: &'static str| reply(status, "text/plain; charset=utf-8", text.into());
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(StatusCode::METHOD_NOT_ALLOWED, "GET only\n");
    }
    let path = request.uri().path();
    match path {
        "/health" if is_ready => text(StatusCode::OK, "serving\n"),
        "/health" => text(StatusCode::SERVICE_UNAVAILABLE, "recovering\n"),
        "/metrics" => {
            let mut page = String::new();
            match encode(&mut page, &pages.metrics) {
                Ok(()) => reply(StatusCode::OK, OPEN_METRICS, page.into()),
                Err(Error) => text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written\n"),
            }
        }
        _ if pages.registry.host().config().status_page => {
            let status = || Status::look(&pages.registry, is_ready, pages.findings.load().to_vec());
            page::answer(path, request.headers(), status)
                .unwrap_or_else(|| text(StatusCode::NOT_FOUND, "there are /, /metrics and /health\n"))
        }
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /metrics and /health, and a page for browsers with status_page = true in agent.toml\n",
        ),
    }
}

fn reply(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, kind)
        .body(Full::new(body))
        .expect("constant parts")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::host::Host;

    fn asked(method: Method, path: &str) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = path.parse().expect("a path");
        request
    }

    fn page(metrics: &Metrics) -> String {
        let mut page = String::new();
        encode(&mut page, metrics).expect("written");
        page
    }

    #[tokio::test]
    async fn what_is_done_is_counted_by_kind_and_outcome() {
        let registry = Registry::new(Arc::new(Host::new(Config::default())));
        let metrics = metrics(&registry);
        let operations = &registry.host().operations;
        operations.of("create", async { Ok::<_, ()>(1) }).await.expect("done");
        operations
            .of("create", async { Err::<(), _>(2) })
            .await
            .expect_err("not done");
        operations.of("create", async { Ok::<_, ()>(1) }).await.expect("done");
        let page = page(&metrics);
        for line in [
            "roost_operation_seconds_count{kind=\"create\",outcome=\"ok\"} 2",
            "roost_operation_seconds_count{kind=\"create\",outcome=\"error\"} 1",
            "roost_sandboxes{state=\"running\"} 0",
            "roost_sandboxes_limit 4096",
            "roost_outbox_events 0",
            "roost_outbox_dropped_events_total 0",
        ] {
            assert!(page.lines().any(|has| has == line), "{line:?} is not in\n{page}");
        }
        assert!(page.ends_with("# EOF\n"));
    }

    #[tokio::test]
    async fn the_dashboard_and_the_alerts_ask_for_metrics_that_there_are() {
        let registry = Registry::new(Arc::new(Host::new(Config::default())));
        let host = registry.host();
        host.operations
            .of("create", async { Ok::<_, ()>(()) })
            .await
            .expect("done");
        let calls = host.privd.timings();
        calls.of("open_disk", async { Ok::<_, ()>(()) }).await.expect("done");
        let page = page(&metrics(&registry));
        let there = |name: &str| {
            let mut lines = page.lines();
            lines.any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        };
        for file in ["grafana.json", "alerts.yml"] {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/monitoring/");
            let text = std::fs::read_to_string(format!("{path}{file}")).expect(file);
            let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let names = text.split(|c| !is_of_name(c)).filter(|word| word.starts_with("roost_"));
            let names: std::collections::BTreeSet<_> = names.collect();
            assert!(names.len() > 5, "{file} asks for hardly anything: {names:?}");
            for name in names {
                assert!(there(name), "{file} asks for {name}, which is not in\n{page}");
            }
        }
        let dashboard = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/monitoring/grafana.json");
        let dashboard = std::fs::read(dashboard).expect("read");
        let dashboard: serde_json::Value = serde_json::from_slice(&dashboard).expect("JSON");
        assert!(dashboard["panels"].as_array().is_some_and(|panels| panels.len() > 8));
    }

    #[tokio::test]
    async fn there_are_two_pages_to_be_read_and_a_third_where_it_is_switched_on() {
        let registry = Registry::new(Arc::new(Host::new(Config::default())));
        let pages = Pages::new(registry.clone());
        for (method, path, is_ready, status) in [
            (Method::GET, "/health", true, 200),
            (Method::GET, "/health", false, 503),
            (Method::GET, "/metrics", false, 200),
            (Method::HEAD, "/metrics", true, 200),
            (Method::POST, "/metrics", true, 405),
            (Method::GET, "/", true, 404),
            (Method::GET, "/metrics/", true, 404),
        ] {
            let answer = answer(&asked(method.clone(), path), &pages, is_ready);
            assert_eq!(answer.status().as_u16(), status, "{method} {path}");
        }
        registry.host().reconfigure(Config {
            status_page: true,
            ..Config::default()
        });
        for (method, path, status) in [
            (Method::GET, "/", 200),
            (Method::HEAD, "/status.json", 200),
            (Method::POST, "/status.json", 405),
            (Method::GET, "/metrics", 200),
            (Method::GET, "/page.html", 404),
        ] {
            let mut request = asked(method.clone(), path);
            let host = "localhost:50052".parse().expect("a header");
            request.headers_mut().insert(header::HOST, host);
            let answer = answer(&request, &pages, true);
            assert_eq!(answer.status().as_u16(), status, "{method} {path}");
        }
    }
}

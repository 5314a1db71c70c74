//! What is written about the agent's work: log lines, and traces.
//!
//! Holds: every call of the API is a span, part of its caller's trace where that sent a W3C `traceparent`. What the call causes is told
//! under its trace id: by each log line here, and by privd's line of each call that was made for it. A task that works for a call runs in
//! the call's span ([`crate::sandbox::task`] carries it there).

use std::io;
use std::time::Instant;

use http::{HeaderMap, Request};
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use serde::Deserialize;
use tracing::{Instrument as _, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::config::Config;

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Target of steps, which are told at level `debug` alone: `log_filter = "info,roost_agent::step=debug"` has a line for each.
const STEP: &str = "roost_agent::step";
/// Longest name of a call in a log line; ours are shorter.
const MAX_OPERATION: usize = 64;

/// Which log lines there are, while they are written.
#[derive(Debug, Clone)]
pub struct Lines(reload::Handle<EnvFilter, Registry>);

impl Lines {
    /// Goes by another configuration from now on.
    pub fn reconfigure(&self, config: &Config) {
        self.0
            .reload(filter(config))
            .expect("what it filters lives as long as the process");
    }
}

/// Whether a text says which log lines there are.
pub(crate) fn is_filter(text: &str) -> bool {
    !text.is_empty() && EnvFilter::builder().parse(text).is_ok()
}

/// A step of what a call causes: a span in the call's trace, and a line of the log with how long it took, in microseconds.
pub(crate) async fn step<T>(name: &'static str, work: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let span = tracing::debug_span!(target: STEP, "step", step = name, otel.name = name);
    let outcome = work.instrument(span).await;
    let elapsed_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    tracing::debug!(target: STEP, step = name, elapsed_us, "step ended");
    outcome
}

/// As `RUST_LOG` wants it, else the configuration.
fn filter(config: &Config) -> EnvFilter {
    EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(&config.log_filter))
}

/// Starts writing log lines to standard error, and keeping traces. Ends with the provider that it returns: an exporter has its last spans
/// then.
///
/// # Errors
/// When an exporter is asked for and cannot be made.
pub fn start(config: &Config) -> anyhow::Result<(SdkTracerProvider, Lines)> {
    let provider = provider()?;
    let (filter, handle) = reload::Layer::new(filter(config));
    Registry::default()
        .with(filter)
        .with(ids_of(&provider))
        .with(lines(config.log_format, io::stderr))
        .init();
    Ok((provider, Lines(handle)))
}

/// Gives spans their ids. Whether they are kept is the caller's wish, as its `traceparent` has it, or the exporter's.
fn ids_of<S>(provider: &SdkTracerProvider) -> impl Layer<S> + use<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("roost-agent"))
        // Nothing here asks OpenTelemetry which span is the current one.
        .with_context_activation(false)
}

fn lines<S, W>(format: LogFormat, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
    }
}

/// Where spans end: nowhere, so none is kept.
#[cfg(not(feature = "otlp"))]
#[expect(clippy::unnecessary_wraps, reason = "with an exporter it can fail")]
fn provider() -> anyhow::Result<SdkTracerProvider> {
    Ok(without_exporter())
}

/// Where spans end: at the collector that `OTEL_EXPORTER_OTLP_ENDPOINT` names, or nowhere.
#[cfg(feature = "otlp")]
fn provider() -> anyhow::Result<SdkTracerProvider> {
    use anyhow::Context as _;
    use opentelemetry_otlp::SpanExporter;
    use opentelemetry_sdk::Resource;

    let names = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
    if names.iter().all(|name| std::env::var_os(name).is_none()) {
        return Ok(without_exporter());
    }
    let exporter = SpanExporter::builder()
        .with_tonic()
        .build()
        .context("no exporter of traces (OTEL_EXPORTER_OTLP_ENDPOINT)")?;
    // Which traces are kept is `OTEL_TRACES_SAMPLER`'s to say: the library's default is what callers wish, and all of ours.
    Ok(SdkTracerProvider::builder()
        .with_resource(Resource::builder().with_service_name("roost-agent").build())
        .with_batch_exporter(exporter)
        .build())
}

fn without_exporter() -> SdkTracerProvider {
    SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOff).build()
}

/// The headers of a request, for who looks for a trace in them.
struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

/// The span of a call of the API. `operation` is its name, `None` that of a procedure in the request's path.
pub(crate) fn of_call<B>(request: &Request<B>, operation: Option<&'static str>) -> Span {
    let operation = operation.unwrap_or_else(|| {
        let path = request.uri().path();
        path.rsplit('/').next().unwrap_or(path)
    });
    // Callers choose paths.
    let operation: String = operation.chars().take(MAX_OPERATION).collect();
    // At the one level that every filter lets through: a call has its trace id whatever is logged of it.
    let span = tracing::error_span!("call", op = operation, trace_id = tracing::field::Empty);
    // Refused where no exporter or ids are there, as in a test; there is no trace then.
    drop(span.set_parent(TraceContextPropagator::new().extract(&Headers(request.headers()))));
    let context = span.context();
    let trace_id = context.span().span_context().trace_id();
    if trace_id != opentelemetry::TraceId::INVALID {
        span.record("trace_id", tracing::field::display(trace_id));
    }
    span
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tarpc::trace::Context as OfTarpc;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic").write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn request(parent: Option<&str>, path: &str) -> Request<()> {
        let request = Request::builder().uri(path);
        let request = match parent {
            Some(parent) => request.header("traceparent", parent),
            None => request,
        };
        request.body(()).expect("a request")
    }

    /// What is written while `work` runs.
    fn written(format: LogFormat, filter: &str, work: impl FnOnce()) -> String {
        let kept = Kept::default();
        let writer = kept.clone();
        let provider = without_exporter();
        let subscriber = Registry::default()
            .with(EnvFilter::new(filter))
            .with(ids_of(&provider))
            .with(lines(format, move || writer.clone()));
        tracing::subscriber::with_default(subscriber, work);
        let bytes = kept.0.lock().expect("no panic").clone();
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn a_line_of_a_call_has_its_callers_trace_id_and_so_has_what_privd_is_asked() {
        let call = || {
            let span = of_call(
                &request(Some(PARENT), "/hostagent.v1.HostAgentService/CreateSandbox"),
                None,
            );
            span.in_scope(|| {
                tracing::info!(answer = 42, "done");
                let context = tarpc::context::current();
                let asked = OfTarpc::try_from(&Span::current()).expect("a trace");
                for context in [context.trace_context, asked] {
                    assert_eq!(format!("{:032x}", u128::from(context.trace_id)), TRACE_ID);
                    assert_ne!(u64::from(context.span_id), 0xb7ad_6b71_6920_3331, "a span of ours");
                }
            });
        };
        let line: serde_json::Value = serde_json::from_str(&written(LogFormat::Json, "info", call)).expect("JSON");
        assert_eq!(line["message"], "done");
        assert_eq!(line["answer"], 42);
        assert_eq!(line["span"]["op"], "CreateSandbox");
        assert_eq!(line["span"]["trace_id"], TRACE_ID);
        let text = written(LogFormat::Text, "info", call);
        assert!(text.contains(&format!("trace_id={TRACE_ID}")), "{text}");
        // Without a line, but not without a trace.
        assert_eq!(written(LogFormat::Text, "error", call), "");
    }

    #[test]
    fn a_call_without_a_usable_parent_has_a_trace_of_its_own() {
        let bad = [
            None,
            Some(""),
            Some("00-00000000000000000000000000000000-b7ad6b7169203331-01"),
            Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333x-01"),
            Some("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ];
        for parent in bad {
            let mut ids = Vec::new();
            for _ in 0..2 {
                let line = written(LogFormat::Json, "info", || {
                    of_call(&request(parent, "/a/B"), Some("proxy")).in_scope(|| tracing::info!("x"));
                });
                let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
                assert_eq!(line["span"]["op"], "proxy");
                ids.push(line["span"]["trace_id"].as_str().expect("an id").to_owned());
            }
            assert_eq!(ids[0].len(), 32, "{parent:?}");
            assert_ne!(ids[0], ids[1], "{parent:?}");
        }
    }

    #[test]
    fn a_path_of_any_length_is_an_operation_of_few_characters() {
        let path = format!("/{}", "x".repeat(5000));
        let line = written(LogFormat::Text, "info", || {
            of_call(&request(None, &path), None).in_scope(|| tracing::info!("y"));
        });
        assert!(line.contains(&"x".repeat(MAX_OPERATION)));
        assert!(line.len() < 400, "{line}");
    }
}

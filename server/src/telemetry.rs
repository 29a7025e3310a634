//! Logs on standard error, and traces and metrics to a collector where one is named.
//!
//! A trace has what a request waited for and how long; never what it said or showed: spans carry counts and names of phases
//! only, and no event of the log enters them.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanContext, TraceContextExt, TracerProvider};
use opentelemetry::{Context, KeyValue, global};
use opentelemetry_otlp::{MetricExporter, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider};
use tonic::metadata::{KeyRef, MetadataMap};
use tracing::{Metadata, Span, field};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::{EnvFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// How long ended spans wait for others to travel with.
const EXPORT_DELAY: Duration = Duration::from_secs(1);
/// Spans that wait for a collector; more are dropped.
const MAX_QUEUED_SPANS: usize = 2_048;
/// How long an ending process waits for a collector to take its last spans and metrics.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// Spans of requests have this target, and nothing else is traced.
const TARGET: &str = "lockstep::request";

/// Who is heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// `lockstep serve`, and whatever else is no shard.
    Server,
    /// `lockstep shard`.
    Shard,
}

impl Service {
    fn name(self) -> &'static str {
        match self {
            Self::Server => "lockstep",
            Self::Shard => "lockstep-shard",
        }
    }
}

/// Where traces and metrics go. Dropping it sends what waits.
pub struct Telemetry {
    tracers: Option<SdkTracerProvider>,
    meters: Option<SdkMeterProvider>,
}

impl Telemetry {
    /// Starts logging what `log` lets through, and, if `otlp` names a collector's address (`http://HOST:PORT`), tracing and, for the
    /// server, metrics: what shards do is counted there. Must be called once, in a runtime.
    ///
    /// # Errors
    /// If the address is none.
    pub fn start(log: EnvFilter, otlp: Option<&str>, service: Service) -> anyhow::Result<Self> {
        let tracers = otlp.map(|address| tracers(address, service)).transpose()?;
        let metered = otlp.filter(|_| service == Service::Server);
        let meters = metered.map(|address| meters(address, service)).transpose()?;
        if let Some(meters) = &meters {
            global::set_meter_provider(meters.clone());
        }
        let traced = tracers.as_ref().map(|tracers| {
            global::set_tracer_provider(tracers.clone());
            let layer = tracing_opentelemetry::layer().with_tracer(tracers.tracer(service.name()));
            let layer = layer.with_location(false).with_threads(false).with_tracked_inactivity(false);
            let is_request = |metadata: &Metadata<'_>| metadata.is_span() && metadata.target() == TARGET;
            layer.with_target(false).with_level(false).with_filter(filter_fn(is_request))
        });
        let logged = fmt::layer().with_writer(std::io::stderr).with_target(false).with_filter(log);
        tracing_subscriber::registry().with(logged).with(traced).init();
        Ok(Self { tracers, meters })
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        let metrics = self.meters.take().map(|meters| {
            let (tell, taken) = mpsc::channel();
            // By itself, because it may take five seconds, whatever it is told.
            thread::spawn(move || tell.send(meters.shutdown()));
            taken
        });
        if let Some(tracers) = &self.tracers
            && let Err(error) = tracers.shutdown_with_timeout(FLUSH_TIMEOUT)
        {
            tracing::warn!(%error, "the last traces were not taken");
        }
        if let Some(taken) = metrics {
            let taken = taken.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            if let Err(error) = taken.unwrap_or(Err(OTelSdkError::Timeout(FLUSH_TIMEOUT))) {
                tracing::warn!(%error, "the last metrics were not taken");
            }
        }
    }
}

fn tracers(address: &str, service: Service) -> anyhow::Result<SdkTracerProvider> {
    let exporter = SpanExporter::builder().with_tonic().with_endpoint(address).build();
    let exporter = exporter.with_context(|| format!("--otlp {address}"))?;
    let config = BatchConfigBuilder::default()
        .with_max_queue_size(MAX_QUEUED_SPANS)
        .with_scheduled_delay(EXPORT_DELAY)
        .build();
    let processor = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
    Ok(SdkTracerProvider::builder().with_span_processor(processor).with_resource(resource(service)).build())
}

/// Metrics that are sent every `OTEL_METRIC_EXPORT_INTERVAL` milliseconds, or every minute.
fn meters(address: &str, service: Service) -> anyhow::Result<SdkMeterProvider> {
    let exporter = MetricExporter::builder().with_tonic().with_endpoint(address).build();
    let exporter = exporter.with_context(|| format!("--otlp {address}"))?;
    let builder = SdkMeterProvider::builder().with_periodic_exporter(exporter);
    Ok(builder.with_resource(resource(service)).build())
}

fn resource(service: Service) -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    Resource::builder().with_service_name(service.name()).with_attribute(version).build()
}

/// The trace of one request: a span from its arrival to its end, in it one for each phase, one after the other.
#[derive(Debug)]
pub struct Trace {
    request: Span,
    phase: Span,
}

impl Trace {
    /// The trace of a call of `method`; part of its caller's trace where `metadata` names one (W3C Trace Context).
    pub fn of_call(method: &'static str, metadata: &MetadataMap) -> Self {
        let request = tracing::info_span!(
            target: TARGET, parent: None, "request",
            otel.name = method, otel.kind = "server", rpc.system = "grpc", rpc.method = method,
            prompt_tokens = field::Empty, cached_tokens = field::Empty, media = field::Empty, completion_tokens = field::Empty, ending = field::Empty,
        );
        if !request.is_disabled() {
            let caller =
                TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(metadata));
            // It fails only for a span that has begun.
            let _ = request.set_parent(caller);
        }
        Self { request, phase: Span::none() }
    }

    /// A trace that goes nowhere.
    pub fn none() -> Self {
        Self { request: Span::none(), phase: Span::none() }
    }

    /// Ends the phase before, and begins the next.
    pub fn begin(&mut self, phase: &'static str) {
        self.phase = Span::none();
        if self.request.is_disabled() {
            // It would begin a trace of its own.
            return;
        }
        self.phase = tracing::info_span!(target: TARGET, parent: &self.request, "phase", otel.name = phase);
    }

    /// Ends the phase.
    pub fn end_phase(&mut self) {
        self.phase = Span::none();
    }

    /// Notes a number of the whole request: one of `prompt_tokens`, `cached_tokens`, `media`, `completion_tokens`.
    pub fn note(&self, name: &'static str, value: usize) {
        // Unsigned numbers would travel as texts.
        self.request.record(name, value as i64);
    }

    /// Notes how the request ended.
    pub fn ended(&mut self, how: &'static str) {
        self.end_phase();
        self.request.record("ending", how);
    }

    /// What shards need to know to add to the trace; nothing if nobody will see it.
    pub fn context(&self) -> Option<SpanContext> {
        if self.request.is_disabled() {
            return None;
        }
        let context = self.request.context().span().span_context().clone();
        (context.is_valid() && context.is_sampled()).then_some(context)
    }
}

struct Headers<'a>(&'a MetadataMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        let ascii = |key| match key {
            KeyRef::Ascii(key) => Some(key.as_str()),
            KeyRef::Binary(_) => None,
        };
        self.0.keys().filter_map(ascii).collect()
    }
}

//! One trace shows a request over the server and every shard, and nothing that was said in it. Metrics say what answers say.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_tests::golden::root;
use lockstep_tests::server::{Server, signal};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::metrics::v1::{NumberDataPoint, ResourceMetrics, metric, number_data_point};
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span};
use prost::Message;
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

/// How long spans and metrics may take to the collector.
const PATIENCE: Duration = Duration::from_secs(20);
const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT_ID: &str = "b7ad6b7169203331";
/// What nobody but the model may read.
const SECRET: &str = "xylophone";

/// A collector that keeps what it gets.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<ResourceSpans>>>,
    metrics: Arc<Mutex<Vec<ResourceMetrics>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.spans.lock().unwrap().extend(request.into_inner().resource_spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.metrics.lock().unwrap().extend(request.into_inner().resource_metrics);
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

impl Collector {
    /// Starts one; the address is its URL.
    async fn start() -> anyhow::Result<(Self, String)> {
        let collector = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let traces = TraceServiceServer::new(collector.clone());
        let metrics = MetricsServiceServer::new(collector.clone());
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        let server = tonic::transport::Server::builder().add_service(traces).add_service(metrics);
        tokio::spawn(server.serve_with_incoming(incoming));
        Ok((collector, address))
    }

    fn spans(&self) -> Vec<Span> {
        let spans = self.spans.lock().unwrap();
        spans
            .iter()
            .flat_map(|resource| &resource.scope_spans)
            .flat_map(|scope| scope.spans.clone())
            .collect()
    }

    /// The spans, when as many have come.
    async fn wait_for(&self, count: usize) -> Vec<Span> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let spans = self.spans();
            if spans.len() >= count || Instant::now() > deadline {
                return spans;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// The numbers of all metrics at one time, by name and state.
type Numbers = BTreeMap<String, i64>;

impl Collector {
    fn numbers(&self) -> Vec<Numbers> {
        self.metrics.lock().unwrap().iter().map(numbers).collect()
    }

    /// Numbers that are no older than this call.
    async fn next_numbers(&self) -> Numbers {
        // The next may have been on their way.
        let enough = self.numbers().len() + 2;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut numbers = self.numbers();
            if numbers.len() >= enough {
                return numbers.pop().expect("there are some");
            }
            assert!(Instant::now() < deadline, "no metrics come");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn numbers(metrics: &ResourceMetrics) -> Numbers {
    let mut numbers = Numbers::new();
    for metric in metrics.scope_metrics.iter().flat_map(|scope| &scope.metrics) {
        let points = match metric.data.as_ref() {
            Some(metric::Data::Sum(sum)) => &sum.data_points,
            Some(metric::Data::Gauge(gauge)) => &gauge.data_points,
            other => panic!("{} is {other:?}", metric.name),
        };
        for point in points {
            let Some(number_data_point::Value::AsInt(value)) = point.value else { panic!("{point:?}") };
            numbers.insert(format!("{}{}", metric.name, state(point)), value);
        }
    }
    numbers
}

fn state(point: &NumberDataPoint) -> String {
    let values = point.attributes.iter().filter_map(|attribute| attribute.value.as_ref()?.value.as_ref());
    let texts = values.map(|value| match value {
        Value::StringValue(text) => format!(" {text}"),
        other => panic!("{other:?} is no state"),
    });
    texts.collect()
}

fn number(span: &Span, key: &str) -> Option<i64> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key == key)?;
    match attribute.value.as_ref()?.value {
        Some(Value::IntValue(number)) => Some(number),
        _ => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_secret(bytes: &[u8]) -> bool {
    bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes())
}

fn question() -> anyhow::Result<v1::GenerateRequest> {
    let data = std::fs::read(root().join("tests/pictures/scene_112x140.png"))?;
    let image = v1::Image { source: Some(v1::image::Source::Data(data.into())), ..Default::default() };
    let parts = [v1::part::Part::Image(image), v1::part::Part::Text(format!("Is there a {SECRET}?"))];
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    let message = v1::Message { role: v1::Role::User.into(), parts };
    Ok(v1::GenerateRequest {
        chat: Some(v1::Chat { messages: vec![message], tools: vec![] }),
        stopping: Some(v1::Stopping {
            max_tokens: Some(5),
            ignore_eos: Some(true),
            stop: vec![SECRET.repeat(2)],
            ..Default::default()
        }),
        cache_salt: Some(SECRET.to_owned()),
        ..Default::default()
    })
}

#[tokio::test]
async fn one_trace_shows_a_request_over_the_server_and_every_shard() -> anyhow::Result<()> {
    let (collector, otlp) = Collector::start().await?;
    let checkpoint = root().join("tests/checkpoints/a");
    let server = Server::start(&checkpoint, &["--world-size", "2", "--otlp", &otlp])?;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    let mut request = Request::new(question()?);
    let parent = format!("00-{TRACE_ID}-{PARENT_ID}-01");
    request.metadata_mut().insert("traceparent", parent.parse()?);
    request.metadata_mut().insert("authorization", format!("Bearer {SECRET}").parse()?);
    let answer = client.generate(request).await?.into_inner();

    // The shards learn of a sequence's end with the next step.
    client.generate(question()?).await?;
    let is_ours = |span: &Span| hex(&span.trace_id) == TRACE_ID;
    let (server_spans, rank_spans) = (7, 3);
    let deadline = Instant::now() + PATIENCE;
    while collector.spans().iter().filter(|span| is_ours(span)).count() < server_spans + 2 * rank_spans
        && Instant::now() < deadline
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let spans: Vec<Span> = collector.spans().into_iter().filter(is_ours).collect();

    let called = |name: &str, rank: Option<i64>| {
        let found: Vec<_> =
            spans.iter().filter(|span| span.name == name && number(span, "rank") == rank).collect();
        assert_eq!(found.len(), 1, "{name} of rank {rank:?} in {spans:#?}");
        found[0].clone()
    };
    let request = called("Generate", None);
    assert_eq!(hex(&request.parent_span_id), PARENT_ID);
    let started = answer.started.unwrap();
    assert_eq!(number(&request, "prompt_tokens"), Some(started.prompt_tokens.into()));
    assert_eq!((number(&request, "media"), number(&request, "completion_tokens")), (Some(1), Some(5)));
    let within = |span: &Span| {
        assert_eq!(span.parent_span_id, request.span_id, "{}", span.name);
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
        assert!(span.start_time_unix_nano >= request.start_time_unix_nano, "{}", span.name);
    };
    let phases =
        ["headers", "prompt", "media", "queue", "prefill", "decode"].map(|phase| called(phase, None));
    phases.iter().for_each(within);
    for pair in phases.windows(2) {
        assert!(pair[0].end_time_unix_nano <= pair[1].start_time_unix_nano, "{} ends first", pair[0].name);
    }
    for rank in 0..2 {
        let [vision, prefill, decode] =
            ["vision", "prefill", "decode"].map(|phase| called(phase, Some(rank)));
        [&vision, &prefill, &decode].into_iter().for_each(within);
        assert_eq!(number(&prefill, "tokens"), Some(started.prompt_tokens.into()));
        // The last token is drawn, and never computed.
        assert_eq!(number(&decode, "tokens"), Some(4));
        assert!(prefill.end_time_unix_nano <= decode.start_time_unix_nano);
        assert!(vision.start_time_unix_nano <= prefill.end_time_unix_nano);
    }

    let told = collector.spans.lock().unwrap().iter().map(ResourceSpans::encode_to_vec).collect::<Vec<_>>();
    assert!(!told.iter().any(|spans| is_secret(spans)), "a span tells what was said");
    Ok(())
}

#[tokio::test]
async fn a_call_without_a_trace_begins_one() -> anyhow::Result<()> {
    let (collector, otlp) = Collector::start().await?;
    let checkpoint = root().join("tests/checkpoints/a");
    let server = Server::start(&checkpoint, &["--otlp", &otlp])?;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    let mut unsampled = Request::new(v1::CountTokensRequest { chat: question()?.chat, cache_salt: None });
    unsampled.metadata_mut().insert("traceparent", format!("00-{TRACE_ID}-{PARENT_ID}-00").parse()?);
    client.count_tokens(unsampled).await?;
    for _ in 0..2 {
        client.count_tokens(v1::CountTokensRequest { chat: question()?.chat, cache_salt: None }).await?;
    }
    let spans = collector.wait_for(6).await;
    let ids: BTreeSet<_> = spans.iter().map(|span| hex(&span.trace_id)).collect();
    assert_eq!((spans.len(), ids.len()), (6, 2), "{spans:#?}");
    assert!(!ids.contains(TRACE_ID), "its caller does not want it");
    Ok(())
}

#[tokio::test]
async fn a_collector_that_is_not_there_disturbs_nobody() -> anyhow::Result<()> {
    let checkpoint = root().join("tests/checkpoints/a");
    let server = Server::start(&checkpoint, &["--otlp", "http://127.0.0.1:1"])?;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    client.generate(question()?).await?;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    client.generate(question()?).await?;
    let ended = server.stop()?;
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    Ok(())
}

/// A server that sends metrics every 50 milliseconds.
fn metered(otlp: &str) -> anyhow::Result<Server> {
    let checkpoint = root().join("tests/checkpoints/a");
    let often = [("OTEL_METRIC_EXPORT_INTERVAL", "50")];
    Server::start_in(&often, &checkpoint, &["--world-size", "2", "--otlp", otlp])
}

#[tokio::test]
async fn what_metrics_say_of_the_prefix_cache_is_what_answers_say() -> anyhow::Result<()> {
    let (collector, otlp) = Collector::start().await?;
    let server = metered(&otlp)?;
    let before = collector.next_numbers().await;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    // With the picture after the question the prompt is another one, for which the picture is encoded already.
    let mut other = question()?;
    other.chat.as_mut().unwrap().messages[0].parts.reverse();
    let mut usages = vec![];
    for request in [question()?, question()?, other] {
        usages.push(client.generate(request).await?.into_inner().usage.unwrap());
    }
    let cached = usages.iter().map(|usage| usage.cached_tokens > 0).collect::<Vec<_>>();
    assert_eq!(cached, [false, true, false], "{usages:?}");
    let after = collector.next_numbers().await;
    let grown = |name: &str| after[name] - before[name];
    let sum = |of: fn(&v1::Usage) -> u32| usages.iter().map(|usage| i64::from(of(usage))).sum::<i64>();
    assert_eq!(grown("lockstep.prefix_cache.tokens.found"), sum(|usage| usage.cached_tokens));
    assert_eq!(grown("lockstep.prefix_cache.tokens.looked_up"), sum(|usage| usage.prompt_tokens));
    assert_eq!(grown("lockstep.tokens.generated"), sum(|usage| usage.completion_tokens));
    // The second prompt finds the picture among its tokens.
    let media = ["looked_up", "found"].map(|which| grown(&format!("lockstep.feature_cache.media.{which}")));
    assert_eq!(media, [2, 1]);
    assert!(grown("lockstep.steps") >= sum(|usage| usage.completion_tokens), "{after:?}");
    for cache in ["kv_cache", "feature_cache"] {
        let states = ["free", "cached", "held"].map(|state| format!("lockstep.{cache}.blocks {state}"));
        let all = |numbers: &Numbers| states.iter().map(|state| numbers[state]).sum::<i64>();
        assert_eq!(all(&before), all(&after));
        assert!(after[&states[1]] > before[&states[1]], "nothing is kept: {after:?}");
    }
    assert_eq!((after["lockstep.shards.moving"], after["lockstep.shards.restarts"]), (1, 0));

    let told: Vec<_> = collector.metrics.lock().unwrap().iter().map(ResourceMetrics::encode_to_vec).collect();
    assert!(!told.iter().any(|metrics| is_secret(metrics)), "a metric tells what was said");
    Ok(())
}

#[tokio::test]
async fn a_fault_shows_in_metrics() -> anyhow::Result<()> {
    let (collector, otlp) = Collector::start().await?;
    let server = metered(&otlp)?;
    signal(server.shard_pids()[0], "KILL")?;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    client.generate(question()?).await?;
    let after = collector.next_numbers().await;
    assert_eq!((after["lockstep.shards.moving"], after["lockstep.shards.restarts"]), (1, 1));
    let stood = collector.numbers().iter().any(|numbers| numbers["lockstep.shards.moving"] == 0);
    assert!(stood, "steps moved while a shard was gone");
    Ok(())
}

#[tokio::test]
async fn a_server_that_stops_tells_what_it_counted_last() -> anyhow::Result<()> {
    let (collector, otlp) = Collector::start().await?;
    let checkpoint = root().join("tests/checkpoints/a");
    let server = Server::start(&checkpoint, &["--otlp", &otlp])?;
    let mut client = InferenceServiceClient::connect(format!("http://{}", server.address())).await?;
    client.generate(question()?).await?;
    drop(client);
    // The collector goes on meanwhile.
    let ended = tokio::task::spawn_blocking(|| server.stop()).await??;
    assert_eq!(ended.code, Some(0), "{}", ended.output);
    let numbers = collector.numbers().pop().expect("metrics at the end");
    assert!(numbers["lockstep.tokens.generated"] >= 5, "{numbers:?}");
    let sequences = ["running", "waiting"].map(|state| numbers[&format!("lockstep.sequences {state}")]);
    assert_eq!((sequences, numbers["lockstep.kv_cache.blocks held"]), ([0, 0], 0));
    assert_eq!(numbers["lockstep.shards.moving"], 0);
    Ok(())
}

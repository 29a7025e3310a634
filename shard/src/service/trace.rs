//! What a rank adds to the traces of requests: when it encoded their media, computed their prompts and drew their tokens.
//!
//! Steps are shared by many requests and far too many for spans of their own. A sequence whose admission names a trace
//! gets three: from the first to the last step that worked on its media, on its prompt, and on its answer.

use std::{borrow::Cow, collections::HashMap, time::SystemTime};

use bytes::Bytes;
use lockstep_proto::shard as pb;
use opentelemetry::{
    Context, KeyValue,
    global::{self, BoxedTracer},
    trace::{Span, SpanBuilder, SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};

/// Follows the steps of a rank for those sequences that are traced.
pub struct StepTracer {
    rank: i64,
    tracer: BoxedTracer,
    sequences: HashMap<u64, Traced>,
}

/// A sequence that is traced.
struct Traced {
    request: Context,
    media: Vec<Bytes>,
    vision: Work,
    prefill: Work,
    decode: Work,
    answers: bool,
}

/// The steps of a phase.
#[derive(Clone, Copy, Default)]
struct Work {
    when: Option<(SystemTime, SystemTime)>,
    steps: u32,
    tokens: u32,
}

impl Work {
    fn add(&mut self, (start, end): (SystemTime, SystemTime), tokens: u32) {
        let start = self.when.map_or(start, |(first, _)| first);
        *self = Self { when: Some((start, end)), steps: self.steps + 1, tokens: self.tokens + tokens };
    }
}

/// What a step does for traced sequences.
#[derive(Default)]
pub struct Watched {
    encodes: Vec<Bytes>,
    chunks: Vec<(u64, u32, bool)>,
}

impl StepTracer {
    /// A tracer for a rank. Spans go where the process's tracer provider sends them.
    pub fn new(rank: usize) -> Self {
        Self { rank: rank as i64, tracer: global::tracer("lockstep-shard"), sequences: HashMap::new() }
    }

    /// Looks at a step before it runs. Nothing is to be told after it where nobody is traced.
    pub fn before(&mut self, step: &pb::RunRequest) -> Option<Watched> {
        for id in &step.releases {
            if let Some(traced) = self.sequences.remove(id) {
                self.end(traced);
            }
        }
        for admission in &step.admissions {
            if let Some(request) = admission.trace.as_ref().and_then(context) {
                let media = admission.media.iter().map(|medium| medium.hash.clone()).collect();
                let [vision, prefill, decode] = [Work::default(); 3];
                let traced = Traced { request, media, vision, prefill, decode, answers: false };
                self.sequences.insert(admission.sequence_id, traced);
            }
        }
        if self.sequences.is_empty() {
            return None;
        }
        let chunks = step.chunks.iter().filter(|chunk| self.sequences.contains_key(&chunk.sequence_id));
        let chunk = |chunk: &pb::Chunk| (chunk.sequence_id, chunk.length, chunk.max_new_tokens > 0);
        let encodes = step.encodes.iter().map(|encode| encode.hash.clone()).collect();
        Some(Watched { encodes, chunks: chunks.map(chunk).collect() })
    }

    /// Takes note of a step that has run.
    pub fn after(&mut self, watched: Watched, start: SystemTime, end: SystemTime) {
        let when = (start, end);
        for traced in self.sequences.values_mut().filter(|traced| !traced.answers) {
            if watched.encodes.iter().any(|hash| traced.media.contains(hash)) {
                traced.vision.add(when, 0);
            }
        }
        for (id, length, draws) in watched.chunks {
            let Some(traced) = self.sequences.get_mut(&id) else { continue };
            let phase = if traced.answers { &mut traced.decode } else { &mut traced.prefill };
            phase.add(when, length);
            if draws && !traced.answers {
                traced.answers = true;
                let Traced { request, vision, prefill, .. } = traced;
                let (request, vision, prefill) = (request.clone(), *vision, *prefill);
                self.span("vision", &request, vision);
                self.span("prefill", &request, prefill);
            }
        }
    }

    /// Ends what is followed, for there are no more sequences.
    pub fn forget(&mut self) {
        for traced in std::mem::take(&mut self.sequences).into_values() {
            self.end(traced);
        }
    }

    fn end(&self, traced: Traced) {
        if !traced.answers {
            self.span("vision", &traced.request, traced.vision);
            self.span("prefill", &traced.request, traced.prefill);
        }
        self.span("decode", &traced.request, traced.decode);
    }

    fn span(&self, name: &'static str, request: &Context, work: Work) {
        let Work { when: Some((start, end)), steps, tokens } = work else { return };
        let attributes = [
            KeyValue::new("rank", self.rank),
            KeyValue::new("steps", i64::from(steps)),
            KeyValue::new("tokens", i64::from(tokens)),
        ];
        let span =
            SpanBuilder::from_name(Cow::Borrowed(name)).with_start_time(start).with_attributes(attributes);
        span.start_with_context(&self.tracer, request).end_with_timestamp(end);
    }
}

fn context(trace: &pb::TraceContext) -> Option<Context> {
    let trace_id = TraceId::from_bytes(trace.trace_id.as_ref().try_into().ok()?);
    let span_id = SpanId::from_bytes(trace.span_id.as_ref().try_into().ok()?);
    let span = SpanContext::new(trace_id, span_id, TraceFlags::SAMPLED, true, TraceState::default());
    span.is_valid().then(|| Context::new().with_remote_span_context(span))
}

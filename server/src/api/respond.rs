//! From domain answers to protobuf.

use lockstep_proto::v1;
use lockstep_proto::v1::stream_generate_response::Event;
use tonic::Status;

use super::expired;
use crate::generation::{Ending, Generation, Output, Times, Usage};
use crate::media::{MediaKind, MediumInfo};
use crate::prompt::Vocabulary;
use crate::request::PartIndex;
use crate::scheduler::SampledToken;

/// What was understood of a request.
pub fn started(generation: &Generation) -> v1::Started {
    let prepared = &generation.prepared;
    let Usage { prompt_tokens, cached_tokens, .. } = generation.usage();
    v1::Started {
        prompt_tokens,
        cached_tokens,
        media: prepared.media.iter().map(|prepared| medium(prepared.place, &prepared.medium.info)).collect(),
        seed: generation.seed,
        prompt_token_ids: prepared.token_ids.clone(),
    }
}

/// What a medium became, or would become.
pub fn medium(place: PartIndex, info: &MediumInfo) -> v1::MediaInfo {
    let kind = match info.kind {
        MediaKind::Image => v1::MediaKind::Image,
        MediaKind::Video => v1::MediaKind::Video,
    };
    v1::MediaInfo {
        kind: kind.into(),
        message_index: place.message as u32,
        part_index: place.part as u32,
        source_width: info.source.0,
        source_height: info.source.1,
        resized_width: info.size.0,
        resized_height: info.size.1,
        tokens: info.num_tokens as u32,
        timestamps_s: info.timestamps_s.clone(),
    }
}

/// The messages of one output, and the status that ends a stream before its time.
pub fn events(
    output: Output,
    generation: &Generation,
    vocabulary: &Vocabulary,
) -> Vec<Result<v1::StreamGenerateResponse, Status>> {
    let completed = |used: &Usage, times: &Times| v1::Completed {
        usage: Some(usage(used)),
        timings: Some(timings(times)),
    };
    let rest = |choice: usize, text: String| {
        let is_empty = text.is_empty();
        let delta = Event::Delta(v1::Delta { choice: choice as u32, text, ..Default::default() });
        (!is_empty).then(|| Ok(event(delta)))
    };
    match output {
        Output::Begun => vec![Ok(event(Event::Started(started(generation))))],
        Output::Token { choice, text, token } => vec![Ok(event(Event::Delta(v1::Delta {
            choice: choice as u32,
            text,
            token_ids: vec![token.token_id],
            logprobs: logprobs(&token, vocabulary).into_iter().collect(),
        })))],
        Output::Finished { choice, text, ending } => {
            let finished = Event::Finished(finished(choice, &ending));
            rest(choice, text).into_iter().chain([Ok(event(finished))]).collect()
        }
        Output::Completed { usage, times } => {
            vec![Ok(event(Event::Completed(completed(&usage, &times))))]
        }
        Output::Expired { texts, phase, usage, times } => {
            let status = expired::with_completed(phase, &completed(&usage, &times));
            let rests = texts.into_iter().enumerate().filter_map(|(choice, text)| rest(choice, text));
            rests.chain([Err(status)]).collect()
        }
    }
}

/// Wraps an event.
pub fn event(event: Event) -> v1::StreamGenerateResponse {
    v1::StreamGenerateResponse { event: Some(event) }
}

/// The log-probabilities of a token, if it has any.
pub fn logprobs(token: &SampledToken, vocabulary: &Vocabulary) -> Option<v1::PositionLogprobs> {
    let one = |token_id: u32, logprob: f32| v1::TokenLogprob {
        token_id,
        logprob,
        token: vocabulary.token_bytes(token_id).to_vec().into(),
    };
    let chosen = one(token.token_id, token.logprob?);
    let top = token.top.iter().map(|top| one(top.token_id, top.logprob)).collect();
    Some(v1::PositionLogprobs { chosen: Some(chosen), top })
}

/// How an answer ended.
pub fn finished(choice: usize, ending: &Ending) -> v1::Finished {
    let mut finished = v1::Finished { choice: choice as u32, ..Default::default() };
    finished.reason = match ending {
        Ending::StopToken(id) => {
            finished.stop_token_id = Some(*id);
            v1::FinishReason::StopToken
        }
        Ending::StopString(stop) => {
            finished.stop_string = Some(stop.clone());
            v1::FinishReason::StopString
        }
        Ending::Length => v1::FinishReason::Length,
    }
    .into();
    finished
}

/// What a request used.
pub fn usage(usage: &Usage) -> v1::Usage {
    let Usage { prompt_tokens, cached_tokens, completion_tokens } = *usage;
    v1::Usage { prompt_tokens, cached_tokens, completion_tokens }
}

/// Where the time went.
pub fn timings(times: &Times) -> v1::Timings {
    let ms = |time: std::time::Duration| time.as_secs_f64() * 1e3;
    v1::Timings {
        queue_ms: ms(times.queue),
        media_ms: ms(times.media),
        vision_ms: ms(times.vision),
        prefill_ms: ms(times.prefill),
        decode_ms: ms(times.decode),
        total_ms: ms(times.total),
    }
}

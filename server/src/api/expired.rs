//! The status of a request whose deadline passed. Its details hold what there was to hold: a `google.rpc.ErrorInfo` with the
//! phase, and what was produced.

use lockstep_proto::v1;
use prost::Message;
use tonic::{Code, Status};
use tonic_types::pb;

use crate::deadline::{Expired, Phase};
use crate::limits::MAX_DETAILS_BYTES;

/// Bytes of the details beside what was produced.
const ENVELOPE_BYTES: usize = 512;

/// The status of a request that has produced nothing.
pub fn status(expired: Expired) -> Status {
    with_details(expired, &[], None)
}

/// The status of an answer in one piece. As much of it as fits is in the details.
pub fn with_answer(phase: Phase, mut answer: v1::GenerateResponse) -> Status {
    let lacks = shorten(&mut answer, MAX_DETAILS_BYTES - ENVELOPE_BYTES);
    with_details(Expired(phase), &lacks, Some(("lockstep.v1.GenerateResponse", answer.encode_to_vec())))
}

/// The status of a stream, whose tokens were sent already.
pub fn with_completed(phase: Phase, completed: &v1::Completed) -> Status {
    with_details(Expired(phase), &[], Some(("lockstep.v1.Completed", completed.encode_to_vec())))
}

fn with_details(expired: Expired, lacks: &[&str], produced: Option<(&str, Vec<u8>)>) -> Status {
    let mut message = expired.to_string();
    if !lacks.is_empty() {
        message.push_str("; the answer in the details lacks ");
        message.push_str(&lacks.join(", "));
    }
    let info = pb::ErrorInfo {
        reason: "DEADLINE_EXCEEDED".to_owned(),
        domain: "lockstep.v1".to_owned(),
        metadata: [("phase".to_owned(), expired.0.name().to_owned())].into(),
    };
    let code = Code::DeadlineExceeded;
    let mut status = pb::Status { code: code.into(), message: message.clone(), details: Vec::new() };
    for (name, value) in [("google.rpc.ErrorInfo", info.encode_to_vec())].into_iter().chain(produced) {
        status.details.push(Default::default());
        let any = status.details.last_mut().expect("it was just pushed");
        any.type_url = format!("type.googleapis.com/{name}");
        any.value = value;
    }
    Status::with_details(code, message, status.encode_to_vec().into())
}

/// Shortens an answer to at most `max_bytes`, what a reader misses least first, and tells what it lacks then.
fn shorten(answer: &mut v1::GenerateResponse, max_bytes: usize) -> Vec<&'static str> {
    type Clear = fn(&mut v1::GenerateResponse);
    const FIELDS: [(&str, Clear); 4] = [
        ("started.prompt_token_ids", |answer| {
            answer.started.iter_mut().for_each(|started| started.prompt_token_ids.clear());
        }),
        ("choices.logprobs", |answer| answer.choices.iter_mut().for_each(|choice| choice.logprobs.clear())),
        ("choices.token_ids", |answer| answer.choices.iter_mut().for_each(|choice| choice.token_ids.clear())),
        ("started.media", |answer| answer.started.iter_mut().for_each(|started| started.media.clear())),
    ];
    let mut lacks = Vec::new();
    for (field, clear) in FIELDS {
        let bytes = answer.encoded_len();
        if bytes <= max_bytes {
            return lacks;
        }
        clear(answer);
        if answer.encoded_len() < bytes {
            lacks.push(field);
        }
    }
    let mut is_cut = false;
    for index in (0..answer.choices.len()).rev() {
        let excess = answer.encoded_len().saturating_sub(max_bytes);
        if excess > 0 {
            let text = &mut answer.choices[index].text;
            text.truncate(text.floor_char_boundary(text.len().saturating_sub(excess)));
            is_cut = true;
        }
    }
    if is_cut {
        lacks.push("the end of choices.text");
    }
    lacks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(prompt_tokens: u32, tokens: usize, text: String, with_logprobs: bool) -> v1::GenerateResponse {
        let logprob = |token_id| v1::TokenLogprob { token_id, logprob: -1.5, token: b"word".to_vec().into() };
        let position = || v1::PositionLogprobs { chosen: Some(logprob(7)), top: vec![logprob(7); 5] };
        v1::GenerateResponse {
            started: Some(v1::Started {
                prompt_tokens,
                prompt_token_ids: (0..prompt_tokens).collect(),
                media: vec![v1::MediaInfo { tokens: 64, ..Default::default() }],
                ..Default::default()
            }),
            choices: vec![v1::Choice {
                text,
                token_ids: vec![100_000; tokens],
                logprobs: if with_logprobs { vec![position(); tokens] } else { Vec::new() },
                finished: None,
            }],
            usage: Some(v1::Usage { prompt_tokens, cached_tokens: 0, completion_tokens: tokens as u32 }),
            timings: Some(v1::Timings { decode_ms: 1.5, ..Default::default() }),
        }
    }

    fn details(status: &Status) -> (pb::ErrorInfo, v1::GenerateResponse) {
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert!(status.details().len() <= MAX_DETAILS_BYTES, "{} bytes", status.details().len());
        let details = pb::Status::decode(status.details()).unwrap();
        assert_eq!((details.code, details.message.as_str()), (4, status.message()));
        let [info, answer] = &details.details[..] else { panic!("{details:?}") };
        assert_eq!(info.type_url, "type.googleapis.com/google.rpc.ErrorInfo");
        assert_eq!(answer.type_url, "type.googleapis.com/lockstep.v1.GenerateResponse");
        (
            pb::ErrorInfo::decode(&info.value[..]).unwrap(),
            v1::GenerateResponse::decode(&answer.value[..]).unwrap(),
        )
    }

    #[test]
    fn a_short_answer_is_whole() {
        let whole = answer(20, 8, "eight words".to_owned(), true);
        let status = with_answer(Phase::Generation, whole.clone());
        let (info, found) = details(&status);
        assert_eq!(found, whole);
        assert_eq!(info.metadata["phase"], "generation");
        assert_eq!(status.message(), "deadline exceeded while generating the answer");
    }

    #[test]
    fn what_a_reader_misses_least_goes_first() {
        let status = with_answer(Phase::Generation, answer(5_000, 300, "word ".repeat(300), true));
        let (_, found) = details(&status);
        let choice = &found.choices[0];
        assert_eq!(choice.text, "word ".repeat(300));
        assert_eq!((choice.token_ids.len(), choice.logprobs.len()), (300, 0));
        assert_eq!(found.started.unwrap().media.len(), 1);
        let lacks = "; the answer in the details lacks started.prompt_token_ids, choices.logprobs";
        assert!(status.message().ends_with(lacks), "{status}");
    }

    #[test]
    fn a_long_text_is_cut_between_two_characters() {
        for shift in 0..3 {
            let text = "x".repeat(shift) + &"é€".repeat(20_000);
            let whole = answer(5_000, 20_000, text.clone(), true);
            let usage = whole.usage;
            let status = with_answer(Phase::Generation, whole);
            let (_, found) = details(&status);
            let kept = &found.choices[0].text;
            assert!(text.starts_with(kept) && kept.len() > 3_000, "{} bytes are kept", kept.len());
            assert!(found.choices[0].token_ids.is_empty());
            assert_eq!(found.usage, usage);
            assert!(status.message().ends_with("the end of choices.text"), "{status}");
        }
    }

    #[test]
    fn a_stream_is_told_what_it_used() {
        let usage = Some(v1::Usage { prompt_tokens: 9, cached_tokens: 0, completion_tokens: 4 });
        let completed = v1::Completed { usage, timings: None };
        let status = with_completed(Phase::Prefill, &completed);
        let details = pb::Status::decode(status.details()).unwrap();
        assert_eq!(details.details[1].type_url, "type.googleapis.com/lockstep.v1.Completed");
        assert_eq!(v1::Completed::decode(&details.details[1].value[..]).unwrap(), completed);
    }
}

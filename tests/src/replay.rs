//! Requests of all kinds whose answers are the same every time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lockstep_proto::v1;
use lockstep_proto::v1::stream_generate_response::Event;

use crate::beside::{Service, Token};
use crate::golden;

/// Tokens of each answer.
pub const ANSWER_TOKENS: u32 = 60;

/// Conversations of the goldens, with pictures and videos, drawn with seeds; and one that takes many steps to compute.
///
/// # Errors
/// When a golden cannot be read.
pub fn requests() -> anyhow::Result<Vec<v1::GenerateRequest>> {
    let mut chats = vec![];
    for name in ["a", "a_videos"] {
        for case in golden::read(name)?.cases {
            chats.push(golden::chat(&case.messages)?);
        }
    }
    let mut long = chats[0].clone();
    let text = "All work and no play makes Jack a dull boy. ".repeat(60);
    long.messages[0].parts.push(v1::Part { part: Some(v1::part::Part::Text(text)) });
    chats.push(long);
    let request = |(index, chat)| v1::GenerateRequest {
        chat: Some(chat),
        sampling: Some(v1::Sampling {
            temperature: Some(if index % 3 == 0 { 0.0 } else { 0.9 }),
            repetition_penalty: Some(1.1),
            seed: Some(index),
            ..Default::default()
        }),
        stopping: Some(v1::Stopping {
            max_tokens: Some(ANSWER_TOKENS),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        logprobs: Some(0),
        ..Default::default()
    };
    Ok((0..).zip(chats).map(request).collect())
}

/// The tokens of an answer, and the longest gap between two messages.
///
/// # Errors
/// When it breaks off.
pub async fn answer(
    service: &mut Service,
    request: &v1::GenerateRequest,
) -> anyhow::Result<(Vec<Token>, Duration)> {
    answer_counted(service, request, &AtomicU64::new(0)).await
}

/// The same, adding up messages with tokens as they come.
///
/// # Errors
/// When it breaks off.
pub async fn answer_counted(
    service: &mut Service,
    request: &v1::GenerateRequest,
    count: &AtomicU64,
) -> anyhow::Result<(Vec<Token>, Duration)> {
    let request = v1::StreamGenerateRequest { request: Some(request.clone()) };
    let mut stream = service.stream_generate(request).await?.into_inner();
    let (mut tokens, mut last, mut gap) = (vec![], Instant::now(), Duration::ZERO);
    while let Some(message) = stream.message().await? {
        gap = gap.max(last.elapsed());
        last = Instant::now();
        if let Some(Event::Delta(delta)) = message.event {
            let logprobs = delta.logprobs.iter().filter_map(|position| position.chosen.as_ref());
            let bits = logprobs.map(|chosen| chosen.logprob.to_bits());
            tokens.extend(delta.token_ids.iter().copied().zip(bits));
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok((tokens, gap))
}

//! An answer as `ask` prints it: a JSON object, or a table of log-probabilities for people.

use std::io::{self, Write};

use serde::Serialize;

use crate::{Answer, Choice, Media, MediaKind, PositionLogprobs, TokenLogprob};

/// What `ask --json` prints. What is said of an answer is said of the first one, and in `choices` of every one of several.
#[derive(Debug, Serialize)]
pub(crate) struct Summary<'a> {
    #[serde(flatten)]
    first: ChoiceSummary<'a>,
    prompt_tokens: u32,
    prompt_token_ids: &'a [u32],
    media: Vec<Medium>,
    usage: Usage,
    timings_ms: Timings,
    seed: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    choices: Vec<ChoiceSummary<'a>>,
}

#[derive(Debug, Serialize)]
struct ChoiceSummary<'a> {
    text: &'a str,
    token_ids: &'a [u32],
    /// Null unless asked for.
    logprobs: Option<Vec<Position>>,
    finish_reason: &'static str,
    stop_string: Option<&'a str>,
}

/// What `ask --json` prints of answers that were cut, by their deadline for example.
#[derive(Debug, Serialize)]
pub(crate) struct CutSummary<'a> {
    #[serde(flatten)]
    first: CutChoice<'a>,
    error: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    choices: Vec<CutChoice<'a>>,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
struct CutChoice<'a> {
    text: &'a str,
    token_ids: &'a [u32],
}

impl<'a> CutSummary<'a> {
    /// The summary of text and tokens of one answer, or of `several`, before `error`.
    pub(crate) fn new(
        so_far: impl Iterator<Item = (&'a str, &'a [u32])>,
        several: bool,
        error: &crate::Error,
    ) -> Self {
        let choices: Vec<_> = so_far.map(|(text, token_ids)| CutChoice { text, token_ids }).collect();
        CutSummary {
            first: choices.first().copied().unwrap_or_default(),
            error: error.to_string(),
            choices: if several { choices } else { Vec::new() },
        }
    }
}

#[derive(Debug, Serialize)]
struct Position {
    id: u32,
    logprob: f32,
    top: Vec<Alternative>,
}

#[derive(Debug, Serialize)]
struct Alternative {
    id: u32,
    logprob: f32,
}

#[derive(Debug, Serialize)]
struct Medium {
    kind: &'static str,
    message_index: u32,
    part_index: u32,
    source_width: u32,
    source_height: u32,
    resized_width: u32,
    resized_height: u32,
    tokens: u32,
    /// Of the frames of a video; empty for a picture.
    timestamps_s: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Usage {
    prompt_tokens: u32,
    cached_tokens: u32,
    completion_tokens: u32,
}

#[derive(Debug, Serialize)]
struct Timings {
    queue: f64,
    media: f64,
    vision: f64,
    prefill: f64,
    decode: f64,
    total: f64,
}

impl<'a> Summary<'a> {
    /// The summary of `answer`; `with_logprobs` if they were asked for.
    pub(crate) fn new(answer: &'a Answer, with_logprobs: bool) -> Self {
        let of = |choice| ChoiceSummary::new(choice, with_logprobs);
        let several = if answer.choices.len() > 1 { &answer.choices[..] } else { &[] };
        Summary {
            first: of(answer.first()),
            prompt_tokens: answer.started.prompt_tokens,
            prompt_token_ids: &answer.started.prompt_token_ids,
            media: answer.started.media.iter().map(Medium::from).collect(),
            usage: Usage {
                prompt_tokens: answer.usage.prompt_tokens,
                cached_tokens: answer.usage.cached_tokens,
                completion_tokens: answer.usage.completion_tokens,
            },
            timings_ms: Timings {
                queue: answer.timings.queue_ms,
                media: answer.timings.media_ms,
                vision: answer.timings.vision_ms,
                prefill: answer.timings.prefill_ms,
                decode: answer.timings.decode_ms,
                total: answer.timings.total_ms,
            },
            seed: answer.started.seed,
            choices: several.iter().map(of).collect(),
        }
    }
}

impl<'a> ChoiceSummary<'a> {
    fn new(choice: &'a Choice, with_logprobs: bool) -> Self {
        ChoiceSummary {
            text: &choice.text,
            token_ids: &choice.token_ids,
            logprobs: with_logprobs.then(|| choice.logprobs.iter().map(Position::from).collect()),
            finish_reason: choice.finished.reason.name(),
            stop_string: choice.finished.stop_string.as_deref(),
        }
    }
}

impl From<&PositionLogprobs> for Position {
    fn from(position: &PositionLogprobs) -> Self {
        let top = position.top.iter();
        Position {
            id: position.chosen.token_id,
            logprob: position.chosen.logprob,
            top: top.map(|token| Alternative { id: token.token_id, logprob: token.logprob }).collect(),
        }
    }
}

impl From<&Media> for Medium {
    fn from(media: &Media) -> Self {
        Medium {
            kind: match media.kind {
                MediaKind::Image => "image",
                MediaKind::Video => "video",
            },
            message_index: media.message_index,
            part_index: media.part_index,
            source_width: media.source_width,
            source_height: media.source_height,
            resized_width: media.resized_width,
            resized_height: media.resized_height,
            tokens: media.tokens,
            timestamps_s: media.timestamps_s.clone(),
        }
    }
}

/// One line for each token: its text, its log-probability, and the alternatives.
pub(crate) fn write_logprobs(out: &mut impl Write, positions: &[PositionLogprobs]) -> io::Result<()> {
    for position in positions {
        write!(out, "{}", shown(&position.chosen))?;
        let mut separator = "  |";
        for token in &position.top {
            write!(out, "{separator} {}", shown(token))?;
            separator = ",";
        }
        writeln!(out)?;
    }
    Ok(())
}

fn shown(token: &TokenLogprob) -> String {
    format!("{:?} ({}) {:.4}", String::from_utf8_lossy(&token.token), token.token_id, token.logprob)
}

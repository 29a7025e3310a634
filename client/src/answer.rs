//! What comes back: the events of an answer, and whole answers.

use bytes::Bytes;
use lockstep_proto::v1;
use prost::Message as _;
use tonic::Status;

use crate::Error;

/// One event of an answer that is being written.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// First: what was understood.
    Started(Started),
    /// More of an answer.
    Delta(Delta),
    /// One of the answers is complete.
    Finished(Finished),
    /// Last: the request is complete.
    Completed(Completed),
}

/// What was understood of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Started {
    /// Tokens of the prompt, media included.
    pub prompt_tokens: u32,
    /// Of these, tokens whose computation was found in the cache.
    pub cached_tokens: u32,
    /// One for each picture and video, in order.
    pub media: Vec<Media>,
    /// The seed in use.
    pub seed: u64,
    /// The tokens of the prompt, media expanded to their runs of pad tokens.
    pub prompt_token_ids: Vec<u32>,
}

/// Picture or video.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MediaKind {
    /// A picture.
    Image,
    /// A video.
    Video,
}

/// What a medium became: what a caller needs to map boxes back to its own picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Media {
    /// Picture or video.
    pub kind: MediaKind,
    /// Index of its message.
    pub message_index: u32,
    /// Index of its part in that message.
    pub part_index: u32,
    /// Width in pixels of what was sent, after its orientation was applied.
    pub source_width: u32,
    /// Height in pixels of what was sent, after its orientation was applied.
    pub source_height: u32,
    /// Width in pixels as the model sees it.
    pub resized_width: u32,
    /// Height in pixels as the model sees it.
    pub resized_height: u32,
    /// Tokens in the prompt, without the two that enclose them.
    pub tokens: u32,
    /// Times of the sampled frames of a video in seconds.
    pub timestamps_s: Vec<f64>,
}

/// More of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// Which of the `n` answers.
    pub choice: u32,
    /// The text that became certain; may be empty while a character or a stop string is incomplete.
    pub text: String,
    /// The new tokens.
    pub token_ids: Vec<u32>,
    /// Their log-probabilities, if asked for.
    pub logprobs: Vec<PositionLogprobs>,
}

/// The log-probabilities at one position of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct PositionLogprobs {
    /// The token that was drawn.
    pub chosen: TokenLogprob,
    /// The most probable tokens, best first.
    pub top: Vec<TokenLogprob>,
}

/// A token and its log-probability.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token_id: u32,
    /// Natural logarithm of its probability, before penalties and temperature.
    pub logprob: f32,
    /// The token's bytes: not always valid UTF-8 on their own.
    pub token: Bytes,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended it with an end token or one of the request's stop tokens.
    StopToken,
    /// One of the request's stop strings appeared.
    StopString,
    /// The tokens asked for, or the context, are used up.
    Length,
}

impl FinishReason {
    /// The reason in lower case, as `ask --json` prints it.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::StopToken => "stop_token",
            FinishReason::StopString => "stop_string",
            FinishReason::Length => "length",
        }
    }
}

/// The end of one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Which of the `n` answers.
    pub choice: u32,
    /// Why.
    pub reason: FinishReason,
    /// The stop string that appeared.
    pub stop_string: Option<String>,
    /// The token that ended it.
    pub stop_token_id: Option<u32>,
}

/// What a request used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, found in the cache.
    pub cached_tokens: u32,
    /// Tokens generated, end token included.
    pub completion_tokens: u32,
}

/// Where the time went on the server, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timings {
    /// Waiting for a place.
    pub queue_ms: f64,
    /// Decoding and resizing pictures and videos.
    pub media_ms: f64,
    /// Vision encoding.
    pub vision_ms: f64,
    /// Computing the prompt, up to the first token.
    pub prefill_ms: f64,
    /// Generating the tokens after the first.
    pub decode_ms: f64,
    /// From arrival to the last token.
    pub total_ms: f64,
}

/// The end of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Completed {
    /// What it used.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

/// One complete answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The text.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// Their log-probabilities, if asked for.
    pub logprobs: Vec<PositionLogprobs>,
    /// How it ended.
    pub finished: Finished,
}

/// A whole answer: `n` choices, one unless more were asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// What was understood.
    pub started: Started,
    /// The answers, by their index. Never empty.
    pub choices: Vec<Choice>,
    /// What the request used.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

/// What there was of an answer, the first if several were asked for, when its deadline passed, as far as it fits into a status.
#[derive(Debug, Clone, PartialEq)]
pub struct Partial {
    /// The text; empty for a stream, which has given it out before.
    pub text: String,
    /// Its tokens; empty for a stream, and where they are too many for a status.
    pub token_ids: Vec<u32>,
    /// What the request used: all tokens of all answers are counted here.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
}

impl Partial {
    /// Finds it in the details of a status.
    pub(crate) fn find(status: &Status) -> Option<Self> {
        let details = tonic_types::pb::Status::decode(status.details()).ok()?.details;
        details.iter().find_map(|any| match any.type_url.rsplit('/').next()? {
            "lockstep.v1.GenerateResponse" => {
                let answer = v1::GenerateResponse::decode(&any.value[..]).ok()?;
                let choice = answer.choices.into_iter().next().unwrap_or_default();
                Self::new(choice.text, choice.token_ids, answer.usage, answer.timings)
            }
            "lockstep.v1.Completed" => {
                let completed = v1::Completed::decode(&any.value[..]).ok()?;
                Self::new(String::new(), Vec::new(), completed.usage, completed.timings)
            }
            _ => None,
        })
    }

    fn new(
        text: String,
        token_ids: Vec<u32>,
        usage: Option<v1::Usage>,
        timings: Option<v1::Timings>,
    ) -> Option<Self> {
        Some(Partial { text, token_ids, usage: usage?.into(), timings: timings?.into() })
    }
}

impl Answer {
    /// The text of the first choice.
    pub fn text(&self) -> &str {
        &self.first().text
    }

    /// The first choice.
    pub fn first(&self) -> &Choice {
        &self.choices[0]
    }
}

fn lacks(field: &str) -> Error {
    Error::Protocol(format!("it lacks `{field}`"))
}

impl TryFrom<v1::StreamGenerateResponse> for Event {
    type Error = Error;

    fn try_from(response: v1::StreamGenerateResponse) -> Result<Self, Error> {
        use v1::stream_generate_response::Event as Wire;
        Ok(match response.event.ok_or_else(|| lacks("event"))? {
            Wire::Started(started) => Event::Started(started.try_into()?),
            Wire::Delta(delta) => Event::Delta(delta.try_into()?),
            Wire::Finished(finished) => Event::Finished(finished.try_into()?),
            Wire::Completed(completed) => Event::Completed(Completed {
                usage: completed.usage.ok_or_else(|| lacks("completed.usage"))?.into(),
                timings: completed.timings.ok_or_else(|| lacks("completed.timings"))?.into(),
            }),
        })
    }
}

impl TryFrom<v1::GenerateResponse> for Answer {
    type Error = Error;

    fn try_from(response: v1::GenerateResponse) -> Result<Self, Error> {
        if response.choices.is_empty() {
            return Err(lacks("choices"));
        }
        Ok(Answer {
            started: response.started.ok_or_else(|| lacks("started"))?.try_into()?,
            choices: response.choices.into_iter().map(Choice::try_from).collect::<Result<_, _>>()?,
            usage: response.usage.ok_or_else(|| lacks("usage"))?.into(),
            timings: response.timings.ok_or_else(|| lacks("timings"))?.into(),
        })
    }
}

impl TryFrom<v1::Choice> for Choice {
    type Error = Error;

    fn try_from(choice: v1::Choice) -> Result<Self, Error> {
        Ok(Choice {
            text: choice.text,
            token_ids: choice.token_ids,
            logprobs: positions(choice.logprobs)?,
            finished: choice.finished.ok_or_else(|| lacks("choices.finished"))?.try_into()?,
        })
    }
}

impl TryFrom<v1::Started> for Started {
    type Error = Error;

    fn try_from(started: v1::Started) -> Result<Self, Error> {
        Ok(Started {
            prompt_tokens: started.prompt_tokens,
            cached_tokens: started.cached_tokens,
            media: started.media.into_iter().map(Media::try_from).collect::<Result<_, _>>()?,
            seed: started.seed,
            prompt_token_ids: started.prompt_token_ids,
        })
    }
}

impl TryFrom<v1::MediaInfo> for Media {
    type Error = Error;

    fn try_from(info: v1::MediaInfo) -> Result<Self, Error> {
        let kind = match info.kind() {
            v1::MediaKind::Image => MediaKind::Image,
            v1::MediaKind::Video => MediaKind::Video,
            v1::MediaKind::Unspecified => return Err(lacks("media.kind")),
        };
        Ok(Media {
            kind,
            message_index: info.message_index,
            part_index: info.part_index,
            source_width: info.source_width,
            source_height: info.source_height,
            resized_width: info.resized_width,
            resized_height: info.resized_height,
            tokens: info.tokens,
            timestamps_s: info.timestamps_s,
        })
    }
}

impl TryFrom<v1::Delta> for Delta {
    type Error = Error;

    fn try_from(delta: v1::Delta) -> Result<Self, Error> {
        Ok(Delta {
            choice: delta.choice,
            text: delta.text,
            token_ids: delta.token_ids,
            logprobs: positions(delta.logprobs)?,
        })
    }
}

fn positions(wire: Vec<v1::PositionLogprobs>) -> Result<Vec<PositionLogprobs>, Error> {
    wire.into_iter()
        .map(|position| {
            Ok(PositionLogprobs {
                chosen: position.chosen.ok_or_else(|| lacks("logprobs.chosen"))?.into(),
                top: position.top.into_iter().map(TokenLogprob::from).collect(),
            })
        })
        .collect()
}

impl From<v1::TokenLogprob> for TokenLogprob {
    fn from(token: v1::TokenLogprob) -> Self {
        TokenLogprob { token_id: token.token_id, logprob: token.logprob, token: token.token }
    }
}

impl TryFrom<v1::Finished> for Finished {
    type Error = Error;

    fn try_from(finished: v1::Finished) -> Result<Self, Error> {
        let reason = match finished.reason() {
            v1::FinishReason::StopToken => FinishReason::StopToken,
            v1::FinishReason::StopString => FinishReason::StopString,
            v1::FinishReason::Length => FinishReason::Length,
            v1::FinishReason::Unspecified => return Err(lacks("finished.reason")),
        };
        Ok(Finished {
            choice: finished.choice,
            reason,
            stop_string: finished.stop_string,
            stop_token_id: finished.stop_token_id,
        })
    }
}

impl From<v1::Usage> for Usage {
    fn from(usage: v1::Usage) -> Self {
        Usage {
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
        }
    }
}

impl From<v1::Timings> for Timings {
    fn from(timings: v1::Timings) -> Self {
        Timings {
            queue_ms: timings.queue_ms,
            media_ms: timings.media_ms,
            vision_ms: timings.vision_ms,
            prefill_ms: timings.prefill_ms,
            decode_ms: timings.decode_ms,
            total_ms: timings.total_ms,
        }
    }
}

//! A request as the rest of the server knows it: checked, and free of protobuf.

use bytes::Bytes;

use crate::checkpoint::GenerationDefaults;
use crate::deadline::Deadline;
use crate::media::PictureOptions;
use crate::media::video::VideoInput;
use crate::output::StopStrings;
use crate::prompt::Role;
use crate::scheduler::SamplingParams;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said and shown, in order.
    pub parts: Vec<Part>,
}

/// A piece of a message.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Plain text.
    Text(String),
    /// A picture.
    Image(Image),
    /// A video.
    Video(VideoInput),
}

/// A picture as it was sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// The picture's file.
    pub data: Bytes,
    /// How large the model shall see it.
    pub options: PictureOptions,
}

/// How tokens are drawn; what is left out comes from the checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Temperature; under 1e-5 is greedy.
    pub temperature: Option<f32>,
    /// Draw from this many most probable tokens; 0 is all.
    pub top_k: Option<u32>,
    /// Draw from the fewest tokens that have this part of the probability, in (0, 1].
    pub top_p: Option<f32>,
    /// Draw from tokens at least this fraction as probable as the most probable, in [0, 1].
    pub min_p: Option<f32>,
    /// Repetition penalty; 1 is none.
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens of the answer; 0 is none.
    pub presence_penalty: Option<f32>,
    /// Subtracted from the logits of tokens of the answer, times their count; 0 is none.
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of single tokens, `(token, bias)`, by token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the noise; drawn by the server when left out.
    pub seed: Option<u64>,
}

impl Sampling {
    /// With what is left out: the checkpoint's `defaults`, or else no truncation and no penalty, and a drawn seed.
    pub fn with_defaults(self, defaults: &GenerationDefaults, logprobs: Option<u32>) -> SamplingParams {
        let neutral = SamplingParams::default();
        SamplingParams {
            temperature: self.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_k: self.top_k.or(defaults.top_k).unwrap_or(neutral.top_k),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(neutral.top_p),
            min_p: self.min_p.unwrap_or(neutral.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(defaults.repetition_penalty)
                .unwrap_or(neutral.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(neutral.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(neutral.frequency_penalty),
            logit_bias: self.logit_bias,
            seed: self.seed.unwrap_or_else(rand::random),
            branch: 0,
            logprobs,
        }
    }
}

/// When an answer ends.
#[derive(Clone, Debug, Default)]
pub struct Stopping {
    /// The most tokens to generate.
    pub max_tokens: Option<u32>,
    /// Texts that end the answer.
    pub stop: StopStrings,
    /// Tokens that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the checkpoint's end tokens.
    pub ignore_eos: bool,
}

/// Whom media and caches belong to: what is of one namespace is not there for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Namespace(pub [u8; 32]);

impl Namespace {
    /// The namespace of a caller's key and a request's salt.
    pub fn new(key: Option<&[u8]>, salt: Option<&str>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("lockstep 2026-11-23 namespace of media and caches");
        for part in [key, salt.map(str::as_bytes)] {
            // Lengths, so that no two pairs are the same bytes; none is not empty.
            hasher.update(&part.map_or(u64::MAX, |part| part.len() as u64).to_le_bytes());
            hasher.update(part.unwrap_or_default());
        }
        Self(hasher.finalize().into())
    }
}

/// A conversation to answer.
#[derive(Clone, Debug)]
pub struct Request {
    /// The turns, oldest first.
    pub messages: Vec<Message>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// When the answer ends.
    pub stopping: Stopping,
    /// How many answers, at least one.
    pub num_choices: u32,
    /// Log-probabilities: none, or of the chosen token and this many alternatives.
    pub logprobs: Option<u32>,
    /// Higher goes first.
    pub priority: i32,
    /// Requests of different namespaces share nothing in the caches.
    pub namespace: Namespace,
    /// When it must be answered.
    pub deadline: Deadline,
}

/// Where a picture or video stands in a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartIndex {
    /// Index of the message.
    pub message: usize,
    /// Index of the part in the message.
    pub part: usize,
}

/// A picture or a video of a conversation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MediumPart<'a> {
    /// A picture.
    Image(&'a Image),
    /// A video.
    Video(&'a VideoInput),
}

/// The pictures and videos of a conversation, in order, with their places.
pub fn media(messages: &[Message]) -> impl Iterator<Item = (PartIndex, MediumPart<'_>)> {
    messages.iter().enumerate().flat_map(|(message, m)| {
        m.parts.iter().enumerate().filter_map(move |(part, p)| {
            let medium = match p {
                Part::Image(image) => MediumPart::Image(image),
                Part::Video(video) => MediumPart::Video(video),
                Part::Text(_) => return None,
            };
            Some((PartIndex { message, part }, medium))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_leaves_out_comes_from_the_checkpoint() {
        let defaults = GenerationDefaults {
            eos_token_ids: vec![2],
            temperature: Some(0.5),
            top_p: Some(0.001),
            top_k: Some(1),
            repetition_penalty: Some(1.05),
        };
        let expected = SamplingParams {
            temperature: 0.5,
            top_p: 0.001,
            top_k: 1,
            repetition_penalty: 1.05,
            seed: 3,
            logprobs: Some(2),
            ..SamplingParams::default()
        };
        let silent = Sampling { seed: Some(3), ..Sampling::default() };
        assert_eq!(silent.clone().with_defaults(&defaults, Some(2)), expected);
        let nothing_said = GenerationDefaults::default();
        let plain = SamplingParams { temperature: 1.0, seed: 3, ..SamplingParams::default() };
        assert_eq!(silent.with_defaults(&nothing_said, None), plain);
    }

    #[test]
    fn what_a_request_says_counts_also_where_it_is_zero() {
        let defaults = GenerationDefaults {
            temperature: Some(0.5),
            top_p: Some(0.001),
            top_k: Some(1),
            repetition_penalty: Some(1.05),
            ..GenerationDefaults::default()
        };
        let asked = Sampling {
            temperature: Some(0.0),
            top_k: Some(0),
            top_p: Some(1.0),
            min_p: Some(0.0),
            repetition_penalty: Some(1.0),
            presence_penalty: Some(-2.0),
            frequency_penalty: Some(0.25),
            logit_bias: vec![(5, 1.5)],
            seed: Some(0),
        };
        let expected = SamplingParams {
            presence_penalty: -2.0,
            frequency_penalty: 0.25,
            logit_bias: vec![(5, 1.5)],
            ..SamplingParams::default()
        };
        assert_eq!(asked.with_defaults(&defaults, None), expected);
    }
}

//! A request as the rest of the server knows it: checked, and free of protobuf.

use bytes::Bytes;

use crate::deadline::Deadline;
use crate::media::PictureOptions;
use crate::output::StopStrings;
use crate::prompt::Role;

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
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Temperature; under 1e-5 is greedy.
    pub temperature: Option<f32>,
    /// Repetition penalty; 1 is none.
    pub repetition_penalty: Option<f32>,
    /// Key of the noise; drawn by the server when left out.
    pub seed: Option<u64>,
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

/// A conversation to answer.
#[derive(Clone, Debug)]
pub struct Request {
    /// The turns, oldest first.
    pub messages: Vec<Message>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// When the answer ends.
    pub stopping: Stopping,
    /// Log-probabilities: none, or of the chosen token and this many alternatives.
    pub logprobs: Option<u32>,
    /// Higher goes first.
    pub priority: i32,
    /// Requests with different salts share nothing in the caches.
    pub cache_salt: Option<String>,
    /// When it must be answered.
    pub deadline: Deadline,
}

/// Where a picture stands in a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartIndex {
    /// Index of the message.
    pub message: usize,
    /// Index of the part in the message.
    pub part: usize,
}

/// The pictures of a conversation, in order, with their places.
pub fn images(messages: &[Message]) -> impl Iterator<Item = (PartIndex, &Image)> {
    messages.iter().enumerate().flat_map(|(message, m)| {
        m.parts.iter().enumerate().filter_map(move |(part, p)| match p {
            Part::Image(image) => Some((PartIndex { message, part }, image)),
            Part::Text(_) => None,
        })
    })
}

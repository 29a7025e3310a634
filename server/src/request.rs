//! A request as the rest of the server knows it: checked, and free of protobuf.

use bytes::Bytes;

/// Who speaks in a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions to the model.
    System,
    /// The person or program that asks.
    User,
    /// An earlier answer of the model.
    Assistant,
}

impl Role {
    /// The role's name in chat templates.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

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
    pub size: ImageSize,
}

/// How large the model shall see a picture, in pixels; what is left out comes from the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageSize {
    /// At least this many.
    pub min_pixels: Option<u32>,
    /// At most this many.
    pub max_pixels: Option<u32>,
    /// Exactly this width and height.
    pub exact: Option<(u32, u32)>,
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
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stopping {
    /// The most tokens to generate.
    pub max_tokens: Option<u32>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Tokens that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the checkpoint's end tokens.
    pub ignore_eos: bool,
}

/// A conversation to answer.
#[derive(Clone, Debug, PartialEq)]
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
}

/// Where a picture stands in a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartIndex {
    /// Index of the message.
    pub message: usize,
    /// Index of the part in the message.
    pub part: usize,
}

impl Request {
    /// The pictures of the conversation, in order, with their places.
    pub fn images(&self) -> impl Iterator<Item = (PartIndex, &Image)> {
        images(&self.messages)
    }
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

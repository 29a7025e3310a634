//! Conversations to prompts: rendering, splitting at control tokens, encoding, and the runs of pad tokens.

use std::sync::Arc;
use std::time::Duration;

use super::chat::{Chat, Message, Part, Role};
use super::escape::{Escaper, Segment};
use super::template::{ChatTemplate, TemplateError};
use super::tokenizer::PromptTokenizer;
use crate::workers::{Workers, WorkersError};

/// The most bytes of text in a conversation: more than fill any context that the family has.
pub const MAX_PROMPT_BYTES: usize = 1 << 20;
/// The longest that a conversation may wait for and spend on its encoding.
pub const MAX_PROMPT_TIME: Duration = Duration::from_secs(10);
/// Conversations that are encoded at once.
const ENCODING_AT_ONCE: usize = 4;
/// Conversations that may wait to be encoded.
const WAITING_TO_ENCODE: usize = 256;

/// Where a picture stands in a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MediaSpan {
    /// Index of its first pad token.
    pub first_token: usize,
    /// How many pad tokens it has.
    pub num_tokens: usize,
}

/// A conversation as the model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// All tokens, pictures as runs of pad tokens.
    pub token_ids: Vec<u32>,
    /// The pictures' runs, in order.
    pub media: Vec<MediaSpan>,
}

/// Why a conversation could not be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// More text than is looked at.
    #[error("{bytes} bytes of text; at most {max}")]
    TooLong {
        /// Bytes of text in the conversation.
        bytes: usize,
        /// How many there may be.
        max: usize,
    },
    /// The checkpoint's template does nothing with tools.
    #[error("this checkpoint's chat template takes no tools")]
    ToolsUnsupported,
    /// The template refused the conversation, or failed.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The template placed another number of pictures than the conversation has.
    #[error("the chat template placed {placed} pictures where the conversation has {pictures}")]
    PadCount {
        /// Pad tokens in the rendered conversation.
        placed: usize,
        /// Pictures in the conversation.
        pictures: usize,
    },
    /// The tokenizer failed.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    /// What the checkpoint's files hold does not fit together.
    #[error("{0}")]
    Checkpoint(String),
    /// Encoding took too long.
    #[error("encoding the conversation took longer than {} s", MAX_PROMPT_TIME.as_secs())]
    TimedOut,
    /// Too many conversations wait, or the encoding panicked.
    #[error(transparent)]
    Workers(#[from] WorkersError),
}

impl PromptError {
    /// The field of the public API's `Chat` that is at fault, with what is wrong. `None` if the conversation is not at
    /// fault.
    pub fn fault(&self) -> Option<(&'static str, String)> {
        let field = match self {
            Self::TooLong { .. } | Self::Template(TemplateError::Refused(_)) => "messages",
            Self::ToolsUnsupported => "tools",
            Self::Template(TemplateError::Failed(_))
            | Self::PadCount { .. }
            | Self::Tokenizer(_)
            | Self::Checkpoint(_)
            | Self::TimedOut
            | Self::Workers(_) => return None,
        };
        Some((field, self.to_string()))
    }
}

/// Encodes conversations for one checkpoint.
#[derive(Debug)]
pub struct PromptEncoder {
    tokenizer: PromptTokenizer,
    template: ChatTemplate,
    escaper: Escaper,
    image_token_id: u32,
    workers: Workers,
}

impl PromptEncoder {
    /// An encoder for a checkpoint's tokenizer and template, and for the pad token that stands for pictures.
    ///
    /// Tries the template on a conversation with text and a picture, so that one that cannot be used is found at start.
    pub fn new(
        tokenizer: PromptTokenizer,
        template: ChatTemplate,
        image_token_id: u32,
    ) -> Result<Self, PromptError> {
        let controls = tokenizer.controls().map(|token| (token.content.clone(), token.id));
        let escaper = Escaper::new(controls).map_err(PromptError::Checkpoint)?;
        if !tokenizer.controls().any(|token| token.id == image_token_id) {
            return Err(PromptError::Checkpoint(format!(
                "the picture token {image_token_id} is not among the tokenizer's added tokens"
            )));
        }
        let workers = Workers::new("encoding prompts", ENCODING_AT_ONCE, WAITING_TO_ENCODE);
        let encoder = Self { tokenizer, template, escaper, image_token_id, workers };
        let parts = vec![Part::Image { num_tokens: 1 }, Part::Text("What is this?".into())];
        encoder.encode(&Chat { messages: vec![Message { role: Role::User, parts }], tools: Vec::new() })?;
        Ok(encoder)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &PromptTokenizer {
        &self.tokenizer
    }

    /// Encodes a conversation off the async threads, within [`MAX_PROMPT_TIME`].
    pub async fn encode_off_thread(self: &Arc<Self>, chat: Chat) -> Result<Prompt, PromptError> {
        self.check(&chat)?;
        let encoder = Arc::clone(self);
        let work = self.workers.run(move || encoder.encode(&chat));
        tokio::time::timeout(MAX_PROMPT_TIME, work).await.map_err(|_| PromptError::TimedOut)??
    }

    /// Encodes a conversation.
    pub fn encode(&self, chat: &Chat) -> Result<Prompt, PromptError> {
        self.check(chat)?;
        let rendered = self.template.render(chat, &self.escaper)?;
        let image_tokens = chat.image_token_counts();
        self.encode_rendered(&rendered, |_| image_tokens)
    }

    /// Encodes escaped, rendered text. `image_tokens` is asked, with the number of pictures that the template placed,
    /// for the token counts of the pictures.
    pub(super) fn encode_rendered(
        &self,
        rendered: &str,
        image_tokens: impl FnOnce(usize) -> Vec<usize>,
    ) -> Result<Prompt, PromptError> {
        let segments = self.escaper.split(rendered);
        let is_pad = |segment: &&Segment| **segment == Segment::Control(self.image_token_id);
        let placed = segments.iter().filter(is_pad).count();
        let image_tokens = image_tokens(placed);
        if placed != image_tokens.len() {
            return Err(PromptError::PadCount { placed, pictures: image_tokens.len() });
        }
        let mut prompt = Prompt { token_ids: Vec::new(), media: Vec::with_capacity(placed) };
        let mut image_tokens = image_tokens.into_iter();
        for segment in &segments {
            match segment {
                Segment::Control(id) if *id == self.image_token_id => {
                    let num_tokens = image_tokens.next().expect("as many as pad tokens");
                    prompt.media.push(MediaSpan { first_token: prompt.token_ids.len(), num_tokens });
                    prompt.token_ids.extend(std::iter::repeat_n(*id, num_tokens));
                }
                Segment::Control(id) => prompt.token_ids.push(*id),
                Segment::Text(text) => {
                    let ids = self.tokenizer.encode_text(text).map_err(PromptError::Tokenizer)?;
                    prompt.token_ids.extend(ids);
                }
            }
        }
        Ok(prompt)
    }

    fn check(&self, chat: &Chat) -> Result<(), PromptError> {
        let bytes = chat.text_bytes();
        if bytes > MAX_PROMPT_BYTES {
            return Err(PromptError::TooLong { bytes, max: MAX_PROMPT_BYTES });
        }
        if !chat.tools.is_empty() && !self.template.takes_tools() {
            return Err(PromptError::ToolsUnsupported);
        }
        Ok(())
    }
}

//! Conversations to prompts: rendering, splitting at control tokens, encoding, and the runs of pad tokens.

use std::sync::Arc;

use super::chat::{Chat, Medium, Message, Part, Role};
use super::escape::{Escaper, Segment};
use super::template::{ChatTemplate, TemplateError};
use super::tokenizer::PromptTokenizer;
use crate::limits::{MAX_PROMPT_BYTES, MAX_PROMPT_TIME};
use crate::media::MediaKind;
use crate::workers::{Workers, WorkersError};

/// Conversations that are encoded at once.
const ENCODING_AT_ONCE: usize = 4;
/// Conversations that may wait to be encoded.
const WAITING_TO_ENCODE: usize = 256;

/// Where a picture or video stands in a prompt.
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
    /// All tokens, media as runs of pad tokens.
    pub token_ids: Vec<u32>,
    /// The runs of pictures and videos, in order.
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
    /// The template placed other media than the conversation has.
    #[error("the chat template placed {} where the conversation has {}", words(.placed), words(.media))]
    Pads {
        /// What the pad tokens in the rendered conversation stand for.
        placed: Vec<MediaKind>,
        /// What the conversation has.
        media: Vec<MediaKind>,
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
            | Self::Pads { .. }
            | Self::Tokenizer(_)
            | Self::Checkpoint(_)
            | Self::TimedOut
            | Self::Workers(_) => return None,
        };
        Some((field, self.to_string()))
    }
}

/// Kinds of media in words.
fn words(kinds: &[MediaKind]) -> String {
    let count = |kind| kinds.iter().filter(|other| **other == kind).count();
    format!("{} pictures and {} videos in its order", count(MediaKind::Image), count(MediaKind::Video))
}

/// The tokens that stand for pieces of media.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MediaTokens {
    /// For a piece of a picture.
    pub image: u32,
    /// For a piece of a video.
    pub video: u32,
}

impl MediaTokens {
    /// What a token stands for a piece of.
    fn kind(self, token_id: u32) -> Option<MediaKind> {
        match token_id {
            id if id == self.image => Some(MediaKind::Image),
            id if id == self.video => Some(MediaKind::Video),
            _ => None,
        }
    }
}

/// Encodes conversations for one checkpoint.
#[derive(Debug)]
pub struct PromptEncoder {
    tokenizer: PromptTokenizer,
    template: ChatTemplate,
    escaper: Escaper,
    media_tokens: MediaTokens,
    workers: Workers,
}

impl PromptEncoder {
    /// An encoder for a checkpoint's tokenizer and template, and for the pad tokens that stand for media.
    ///
    /// Tries the template on a conversation with text, a picture and a video, so that one that cannot be used is found at start.
    pub fn new(
        tokenizer: PromptTokenizer,
        template: ChatTemplate,
        media_tokens: MediaTokens,
    ) -> Result<Self, PromptError> {
        let controls = tokenizer.controls().map(|token| (token.content.clone(), token.id));
        let escaper = Escaper::new(controls).map_err(PromptError::Checkpoint)?;
        for (what, id) in [("picture", media_tokens.image), ("video", media_tokens.video)] {
            if !tokenizer.controls().any(|token| token.id == id) {
                return Err(PromptError::Checkpoint(format!(
                    "the {what} token {id} is not among the tokenizer's added tokens"
                )));
            }
        }
        let workers = Workers::new("encoding prompts", ENCODING_AT_ONCE, WAITING_TO_ENCODE);
        let encoder = Self { tokenizer, template, escaper, media_tokens, workers };
        let [image, video] =
            [MediaKind::Image, MediaKind::Video].map(|kind| Part::Medium(Medium { kind, num_tokens: 1 }));
        let parts = vec![image, video, Part::Text("What is this?".into())];
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
        let media = chat.media();
        self.encode_rendered(&rendered, |_| media)
    }

    /// Encodes escaped, rendered text. `media` is asked, with what the template placed, for the media of the conversation.
    pub(super) fn encode_rendered(
        &self,
        rendered: &str,
        media: impl FnOnce(&[MediaKind]) -> Vec<Medium>,
    ) -> Result<Prompt, PromptError> {
        let segments = self.escaper.split(rendered);
        let pad = |segment: &Segment| match segment {
            Segment::Control(id) => self.media_tokens.kind(*id),
            Segment::Text(_) => None,
        };
        let placed: Vec<MediaKind> = segments.iter().filter_map(pad).collect();
        let media = media(&placed);
        if !placed.iter().eq(media.iter().map(|medium| &medium.kind)) {
            let media = media.iter().map(|medium| medium.kind).collect();
            return Err(PromptError::Pads { placed, media });
        }
        let mut prompt = Prompt { token_ids: Vec::new(), media: Vec::with_capacity(placed.len()) };
        let mut media = media.into_iter();
        for segment in &segments {
            match segment {
                Segment::Control(id) if self.media_tokens.kind(*id).is_some() => {
                    let Medium { num_tokens, .. } = media.next().expect("as many as pad tokens");
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

//! From a conversation to token ids: chat template, tokenizer, and the runs of pad tokens of media.
//!
//! Text from a user never becomes a control token. Only the checkpoint's template places control tokens: user text is
//! escaped before rendering ([`escape`]), so that the control tokens found in the rendered text are the template's own,
//! and the text between them is encoded by a tokenizer that knows no control token at all ([`tokenizer`]).

mod chat;
mod encoder;
mod escape;
#[cfg(test)]
mod golden_tests;
mod python;
mod template;
mod tokenizer;
mod vocabulary;

pub use chat::{Chat, Medium, Message, Part, Role, Tool};
pub use encoder::{MediaSpan, MediaTokens, Prompt, PromptEncoder, PromptError};
pub use template::{ChatTemplate, SpecialTokens, TemplateError};
pub use tokenizer::{AddedToken, PromptTokenizer, TokenizerFault};
pub use vocabulary::Vocabulary;

//! A conversation as the prompt sees it.

use crate::media::MediaKind;

/// Who speaks in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// A piece of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text. Control tokens in it stay text.
    Text(String),
    /// A picture or a video.
    Medium(Medium),
}

/// A picture or a video, as far as the prompt is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Medium {
    /// Which of them it is.
    pub kind: MediaKind,
    /// Tokens that it takes in the prompt, at least one.
    pub num_tokens: usize,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said and shown, in order.
    pub parts: Vec<Part>,
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// The function's name.
    pub name: String,
    /// What it does.
    pub description: String,
    /// Its parameters as a JSON schema.
    pub parameters: serde_json::Value,
}

/// A conversation to answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chat {
    /// The turns, oldest first.
    pub messages: Vec<Message>,
    /// Functions that the model may call.
    pub tools: Vec<Tool>,
}

impl Chat {
    /// Bytes of text in messages and tools.
    pub fn text_bytes(&self) -> usize {
        let parts = self.messages.iter().flat_map(|message| &message.parts);
        let text = parts.map(|part| match part {
            Part::Text(text) => text.len(),
            Part::Medium(_) => 0,
        });
        let tools = self
            .tools
            .iter()
            .map(|tool| tool.name.len() + tool.description.len() + json_bytes(&tool.parameters));
        text.chain(tools).sum()
    }

    /// The pictures and videos, in order.
    pub fn media(&self) -> Vec<Medium> {
        let parts = self.messages.iter().flat_map(|message| &message.parts);
        parts
            .filter_map(|part| match part {
                Part::Medium(medium) => Some(*medium),
                Part::Text(_) => None,
            })
            .collect()
    }
}

/// An estimate, from below, of the bytes that a JSON value takes when it is written out.
fn json_bytes(value: &serde_json::Value) -> usize {
    use serde_json::Value;
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 4,
        Value::String(text) => text.len() + 2,
        Value::Array(items) => 2 + items.iter().map(json_bytes).sum::<usize>(),
        Value::Object(entries) => {
            2 + entries.iter().map(|(key, value)| key.len() + 4 + json_bytes(value)).sum::<usize>()
        }
    }
}

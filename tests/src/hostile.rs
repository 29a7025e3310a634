//! A catalogue of input that nobody should send, and what must become of each.

mod fields;
mod pictures;
mod uploads;
mod videos;

pub use self::uploads::{BadUpload, bad_uploads};

use lockstep_proto::v1;
use tonic::Code;

/// What must become of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// It is answered.
    Served,
    /// It is refused with this code, naming these fields.
    Refused(Code, Vec<String>),
}

/// A request and what must become of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is wrong with it.
    pub name: String,
    /// The request.
    pub request: v1::GenerateRequest,
    /// What must become of it.
    pub expected: Expected,
}

impl Case {
    fn served(name: impl Into<String>, request: v1::GenerateRequest) -> Self {
        Self { name: name.into(), request, expected: Expected::Served }
    }

    fn invalid(name: impl Into<String>, request: v1::GenerateRequest, fields: &[&str]) -> Self {
        let fields = fields.iter().map(|field| (*field).to_owned()).collect();
        Self { name: name.into(), request, expected: Expected::Refused(Code::InvalidArgument, fields) }
    }
}

/// All of them.
///
/// # Errors
/// When a file of the catalogue cannot be read.
pub fn catalogue() -> anyhow::Result<Vec<Case>> {
    Ok([pictures::cases()?, videos::cases()?, fields::cases()].concat())
}

/// A request for two tokens after these parts.
pub fn ask(parts: Vec<v1::part::Part>) -> v1::GenerateRequest {
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    let messages = vec![v1::Message { role: v1::Role::User.into(), parts }];
    v1::GenerateRequest {
        chat: Some(v1::Chat { messages, tools: vec![] }),
        stopping: Some(v1::Stopping { max_tokens: Some(2), ..Default::default() }),
        ..Default::default()
    }
}

fn text(text: impl Into<String>) -> v1::part::Part {
    v1::part::Part::Text(text.into())
}

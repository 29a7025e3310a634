//! From protobuf requests to domain requests. Every fault is reported, each with its field.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use lockstep_proto::v1;

mod video;

use super::caller::Caller;
use super::fault::{Faults, Refusal};
use crate::budget::Reservation;
use crate::limits::*;
use crate::media::{MediaId, MediaKind, MediaLibrary, PictureOptions, PictureProcessor};
use crate::output::{StopError, StopStrings};
use crate::prompt::Role;
use crate::request::*;

/// What requests are checked against.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Tokens in the vocabulary.
    pub vocab_size: u32,
    /// The checkpoint's picture processor.
    pub processor: PictureProcessor,
    /// Uploaded media.
    pub library: Arc<MediaLibrary>,
}

/// Finds the uploaded media of one request.
struct Finder<'a> {
    library: &'a MediaLibrary,
    namespace: Namespace,
    message: &'a Reservation,
}

impl Finder<'_> {
    /// The file that `field` names by its id. It counts as if the request had brought it.
    fn find(&self, kind: MediaKind, id: &[u8], field: String, faults: &mut Faults) -> Option<Bytes> {
        let Ok(id) = id.try_into() else {
            faults.invalid(field, format!("has {} bytes; an id has 32", id.len()));
            return None;
        };
        let Some(file) = self.library.find(self.namespace, kind, MediaId(id)) else {
            faults.missing(field, "is not there: upload it");
            return None;
        };
        let room = self.message.grow(file.len() as u64);
        room.map_err(|error| faults.over_budget(&field, error)).ok().map(|()| file)
    }
}

/// Turns a request into its domain form.
///
/// # Errors
/// Every field at fault (INVALID_ARGUMENT), or, in a request without fault, the features that are not there yet
/// (UNIMPLEMENTED), or media that are not there any more (NOT_FOUND).
pub fn request(proto: v1::GenerateRequest, caller: &Caller, rules: &Rules) -> Result<Request, Refusal> {
    let mut faults = Faults::default();
    let salt = proto.cache_salt.as_deref();
    check_salt("cache_salt", salt, &mut faults);
    let namespace = caller.namespace(salt);
    let finder = Finder { library: &rules.library, namespace, message: &caller.message };
    let messages = chat(proto.chat, &rules.processor, &finder, &mut faults);
    let sampling = sampling(proto.sampling.unwrap_or_default(), rules.vocab_size, &mut faults);
    let stopping = stopping(proto.stopping.unwrap_or_default(), rules.vocab_size, &mut faults);
    let num_choices = proto.n.unwrap_or(1);
    if !(1..=MAX_CHOICES).contains(&num_choices) {
        faults.invalid("n", format!("must be in 1..{MAX_CHOICES}"));
    }
    if proto.logprobs.is_some_and(|n| n > MAX_LOGPROBS) {
        faults.invalid("logprobs", format!("must be at most {MAX_LOGPROBS}"));
    }
    if proto.response_format.is_some() {
        faults.later("response_format", "constrained answers");
    }
    if proto.adapter.is_some() {
        faults.later("adapter", "adapters");
    }
    faults.into_result()?;
    Ok(Request {
        messages,
        sampling,
        stopping,
        num_choices,
        logprobs: proto.logprobs,
        priority: proto.priority.unwrap_or(0),
        namespace,
        deadline: caller.deadline,
    })
}

/// Turns the conversation of a CountTokens request into its domain form.
///
/// # Errors
/// As [`request`].
pub fn conversation(
    proto: v1::CountTokensRequest,
    caller: &Caller,
    rules: &Rules,
) -> Result<Vec<Message>, Refusal> {
    let mut faults = Faults::default();
    let salt = proto.cache_salt.as_deref();
    check_salt("cache_salt", salt, &mut faults);
    let finder =
        Finder { library: &rules.library, namespace: caller.namespace(salt), message: &caller.message };
    let messages = chat(proto.chat, &rules.processor, &finder, &mut faults);
    faults.into_result()?;
    Ok(messages)
}

/// Notes a salt that is too long.
pub(super) fn check_salt(field: &str, salt: Option<&str>, faults: &mut Faults) {
    if salt.is_some_and(|salt| salt.len() > MAX_CACHE_SALT_BYTES) {
        faults.invalid(field, format!("must have at most {MAX_CACHE_SALT_BYTES} bytes"));
    }
}

fn chat(
    proto: Option<v1::Chat>,
    processor: &PictureProcessor,
    finder: &Finder<'_>,
    faults: &mut Faults,
) -> Vec<Message> {
    let Some(chat) = proto else {
        faults.invalid("chat", "is missing");
        return Vec::new();
    };
    if !chat.tools.is_empty() {
        faults.later("chat.tools", "tools");
    }
    if chat.messages.is_empty() {
        faults.invalid("chat.messages", "must have at least one message");
    }
    let num_parts: usize = chat.messages.iter().map(|message| message.parts.len()).sum();
    let num_media = chat.messages.iter().flat_map(|message| &message.parts);
    let num_media =
        num_media.filter(|part| !matches!(part.part, Some(v1::part::Part::Text(_)) | None)).count();
    let mut oversized = false;
    for (field, count, bound) in [
        ("chat.messages", chat.messages.len(), MAX_MESSAGES),
        ("chat.messages.parts", num_parts, MAX_PARTS),
        ("chat.messages.parts", num_media, MAX_MEDIA),
    ] {
        if count > bound {
            oversized = true;
            faults.invalid(field, format!("has {count}; at most {bound} are taken"));
        }
    }
    if oversized {
        return Vec::new();
    }
    let messages = chat.messages.into_iter().enumerate();
    messages.map(|(i, message)| turn(i, message, processor, finder, faults)).collect()
}

fn turn(
    index: usize,
    proto: v1::Message,
    processor: &PictureProcessor,
    finder: &Finder<'_>,
    faults: &mut Faults,
) -> Message {
    let field = format!("chat.messages[{index}]");
    let role = match v1::Role::try_from(proto.role) {
        Ok(v1::Role::System) => Role::System,
        Ok(v1::Role::User) => Role::User,
        Ok(v1::Role::Assistant) => Role::Assistant,
        Ok(v1::Role::Unspecified) | Err(_) => {
            faults.invalid(format!("{field}.role"), "must be ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT");
            Role::User
        }
    };
    if proto.parts.is_empty() {
        faults.invalid(format!("{field}.parts"), "must have at least one part");
    }
    let mut parts = Vec::with_capacity(proto.parts.len());
    for (i, part) in proto.parts.into_iter().enumerate() {
        let field = format!("{field}.parts[{i}]");
        match part.part {
            Some(v1::part::Part::Text(text)) => parts.push(Part::Text(text)),
            Some(v1::part::Part::Image(proto)) => {
                parts.extend(image(&field, proto, processor, finder, faults).map(Part::Image))
            }
            Some(v1::part::Part::Video(proto)) => {
                let field = format!("{field}.video");
                parts.extend(video::video(&field, proto, finder, faults).map(Part::Video))
            }
            None => faults.invalid(field, "must be a text, an image or a video"),
        }
    }
    Message { role, parts }
}

fn image(
    field: &str,
    proto: v1::Image,
    processor: &PictureProcessor,
    finder: &Finder<'_>,
    faults: &mut Faults,
) -> Option<Image> {
    let field = format!("{field}.image");
    let options = PictureOptions {
        min_pixels: proto.min_pixels,
        max_pixels: proto.max_pixels,
        resized_width: proto.resized_width,
        resized_height: proto.resized_height,
    };
    for fault in options.faults(processor) {
        faults.invalid(format!("{field}.{}", fault.field), fault.problem);
    }
    match proto.source {
        Some(v1::image::Source::Data(data)) if data.is_empty() => {
            faults.invalid(format!("{field}.data"), "is empty");
            None
        }
        Some(v1::image::Source::Data(data)) => Some(Image { data, options }),
        Some(v1::image::Source::MediaId(id)) => {
            let data = finder.find(MediaKind::Image, &id, format!("{field}.media_id"), faults)?;
            Some(Image { data, options })
        }
        None => {
            faults.invalid(field, "must have data or a media_id");
            None
        }
    }
}

fn sampling(proto: v1::Sampling, vocab_size: u32, faults: &mut Faults) -> Sampling {
    let mut within = |name: &str, value: Option<f32>, ok: fn(f32) -> bool, rule: &str| {
        if value.is_some_and(|value| !ok(value)) {
            faults.invalid(format!("sampling.{name}"), format!("must be {rule}"));
        }
    };
    within("temperature", proto.temperature, |v| (0.0..=MAX_FACTOR).contains(&v), "in 0..100");
    within("top_p", proto.top_p, |v| v > 0.0 && v <= 1.0, "more than 0 and at most 1");
    within("min_p", proto.min_p, |v| (0.0..=1.0).contains(&v), "in 0..1");
    within(
        "repetition_penalty",
        proto.repetition_penalty,
        |v| v > 0.0 && v <= MAX_FACTOR,
        "more than 0 and at most 100",
    );
    let is_penalty = |v: f32| v.abs() <= MAX_ANSWER_PENALTY;
    within("presence_penalty", proto.presence_penalty, is_penalty, "in -2..2");
    within("frequency_penalty", proto.frequency_penalty, is_penalty, "in -2..2");
    Sampling {
        temperature: proto.temperature,
        top_k: proto.top_k,
        top_p: proto.top_p,
        min_p: proto.min_p,
        repetition_penalty: proto.repetition_penalty,
        presence_penalty: proto.presence_penalty,
        frequency_penalty: proto.frequency_penalty,
        logit_bias: logit_bias(proto.logit_bias, vocab_size, faults),
        seed: proto.seed,
    }
}

/// Biases by token: the order of the wire is any.
fn logit_bias(proto: HashMap<u32, f32>, vocab_size: u32, faults: &mut Faults) -> Vec<(u32, f32)> {
    if proto.len() > MAX_LOGIT_BIASES {
        let count = proto.len();
        faults.invalid("sampling.logit_bias", format!("has {count}; at most {MAX_LOGIT_BIASES} are taken"));
        return Vec::new();
    }
    let mut biases: Vec<(u32, f32)> = proto.into_iter().collect();
    biases.sort_unstable_by_key(|(token, _)| *token);
    for (token, bias) in &biases {
        let field = format!("sampling.logit_bias[{token}]");
        if *token >= vocab_size {
            faults.invalid(&field, format!("the vocabulary has {vocab_size} tokens"));
        }
        // Not a number is in no range.
        if !(-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS).contains(bias) {
            faults.invalid(&field, "must be in -100..100");
        }
    }
    biases
}

fn stopping(proto: v1::Stopping, vocab_size: u32, faults: &mut Faults) -> Stopping {
    if proto.max_tokens == Some(0) {
        faults.invalid("stopping.max_tokens", "must be at least 1");
    }
    let stop = StopStrings::new(&proto.stop).unwrap_or_else(|errors| {
        for error in errors {
            faults.invalid(stop_field(&error), error.to_string());
        }
        StopStrings::default()
    });
    if proto.stop_token_ids.len() > MAX_STOP_TOKENS {
        let count = proto.stop_token_ids.len();
        faults
            .invalid("stopping.stop_token_ids", format!("has {count}; at most {MAX_STOP_TOKENS} are taken"));
    }
    for (i, token) in proto.stop_token_ids.iter().enumerate().take(MAX_STOP_TOKENS) {
        if *token >= vocab_size {
            let field = format!("stopping.stop_token_ids[{i}]");
            faults.invalid(field, format!("the vocabulary has {vocab_size} tokens"));
        }
    }
    Stopping {
        max_tokens: proto.max_tokens,
        stop,
        stop_token_ids: proto.stop_token_ids,
        ignore_eos: proto.ignore_eos.unwrap_or(false),
    }
}

fn stop_field(error: &StopError) -> String {
    match error.index() {
        Some(index) => format!("stopping.stop[{index}]"),
        None => "stopping.stop".to_owned(),
    }
}

#[cfg(test)]
mod tests;

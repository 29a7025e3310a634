//! What is asked: messages of text, pictures and videos, and how the answer is to be drawn and ended.

use std::{fs, io, path::Path, time::Duration};

use bytes::Bytes;
use lockstep_proto::v1;

use crate::{FieldViolation, MediaId, Video};

/// A piece of a message.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Plain text. Control tokens typed here stay plain text.
    Text(String),
    /// A picture.
    Image(Image),
    /// A video.
    Video(Video),
}

impl Part {
    /// The part, its file sent by its id if it has one.
    pub(crate) fn by_id(self) -> Self {
        match self {
            Part::Image(image) => Part::Image(image.by_id()),
            Part::Video(video) => Part::Video(video.by_id()),
            Part::Text(text) => Part::Text(text),
        }
    }
}

impl From<&str> for Part {
    fn from(text: &str) -> Self {
        Part::Text(text.to_owned())
    }
}

impl From<String> for Part {
    fn from(text: String) -> Self {
        Part::Text(text)
    }
}

impl From<Image> for Part {
    fn from(image: Image) -> Self {
        Part::Image(image)
    }
}

impl From<Video> for Part {
    fn from(video: Video) -> Self {
        Part::Video(video)
    }
}

/// A picture's file, and the size that the model sees it at.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    data: Bytes,
    id: Option<MediaId>,
    min_pixels: Option<u32>,
    max_pixels: Option<u32>,
    resized_width: Option<u32>,
    resized_height: Option<u32>,
}

/// Why a file cannot be sent as a picture.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file could not be read.
    #[error("cannot read the picture {path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// The file is none of the formats that the server decodes.
    #[error(
        "{path} is not a picture: its first bytes are not those of a PNG, JPEG, WebP, GIF, BMP or TIFF file"
    )]
    Format {
        /// The file.
        path: String,
    },
}

impl Image {
    /// A picture from the bytes of its file: PNG, JPEG, WebP, GIF (first frame), BMP or TIFF.
    pub fn new(data: impl Into<Bytes>) -> Self {
        Image {
            data: data.into(),
            id: None,
            min_pixels: None,
            max_pixels: None,
            resized_width: None,
            resized_height: None,
        }
    }

    /// A picture from a file. A file whose first bytes are not those of a picture is refused here, before it travels.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ImageError> {
        let path = path.as_ref();
        let shown = || path.display().to_string();
        let data = fs::read(path).map_err(|error| ImageError::Read { path: shown(), error })?;
        if !looks_like_a_picture(&data) {
            return Err(ImageError::Format { path: shown() });
        }
        Ok(Image::new(data))
    }

    /// Send 32 bytes in place of the file, which is uploaded when the server does not have it. For pictures that are sent often, as
    /// in a conversation.
    pub fn by_id(mut self) -> Self {
        self.id = Some(MediaId::of(&self.data));
        self
    }

    /// The picture's file.
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// Enlarge the picture to at least this many pixels.
    pub fn min_pixels(mut self, pixels: u32) -> Self {
        self.min_pixels = Some(pixels);
        self
    }

    /// Reduce the picture to at most this many pixels.
    pub fn max_pixels(mut self, pixels: u32) -> Self {
        self.max_pixels = Some(pixels);
        self
    }

    /// The exact width for the model in pixels, a multiple of 28. Goes together with [`Image::resized_height`].
    pub fn resized_width(mut self, pixels: u32) -> Self {
        self.resized_width = Some(pixels);
        self
    }

    /// The exact height for the model in pixels, a multiple of 28. Goes together with [`Image::resized_width`].
    pub fn resized_height(mut self, pixels: u32) -> Self {
        self.resized_height = Some(pixels);
        self
    }
}

fn looks_like_a_picture(data: &[u8]) -> bool {
    const SIGNATURES: [&[u8]; 6] =
        [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*"];
    let is_webp = data.len() >= 12 && data.starts_with(b"RIFF") && &data[8..12] == b"WEBP";
    is_webp || SIGNATURES.iter().any(|signature| data.starts_with(signature))
}

/// What can be said in one message: a text, a picture, a video, a tuple of them, or any number of [`Part`]s.
pub trait IntoParts {
    /// The parts, in order.
    fn into_parts(self) -> Vec<Part>;
}

impl IntoParts for &str {
    fn into_parts(self) -> Vec<Part> {
        vec![self.into()]
    }
}

impl IntoParts for String {
    fn into_parts(self) -> Vec<Part> {
        vec![self.into()]
    }
}

impl IntoParts for Image {
    fn into_parts(self) -> Vec<Part> {
        vec![self.into()]
    }
}

impl IntoParts for Video {
    fn into_parts(self) -> Vec<Part> {
        vec![self.into()]
    }
}

impl IntoParts for Part {
    fn into_parts(self) -> Vec<Part> {
        vec![self]
    }
}

impl IntoParts for Vec<Part> {
    fn into_parts(self) -> Vec<Part> {
        self
    }
}

impl<const N: usize> IntoParts for [Part; N] {
    fn into_parts(self) -> Vec<Part> {
        self.into()
    }
}

impl<A: Into<Part>, B: Into<Part>> IntoParts for (A, B) {
    fn into_parts(self) -> Vec<Part> {
        vec![self.0.into(), self.1.into()]
    }
}

impl<A: Into<Part>, B: Into<Part>, C: Into<Part>> IntoParts for (A, B, C) {
    fn into_parts(self) -> Vec<Part> {
        vec![self.0.into(), self.1.into(), self.2.into()]
    }
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions to the model. Without them the checkpoint's own default is used.
    System,
    /// The person or program that asks.
    User,
    /// An earlier answer of the model.
    Assistant,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said and shown, in order.
    pub parts: Vec<Part>,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: Role, parts: impl IntoParts) -> Self {
        Message { role, parts: parts.into_parts() }
    }
}

/// A conversation to answer, and how. Whatever is not said is the checkpoint's default.
#[derive(Debug, Clone, Default)]
pub struct Request {
    messages: Vec<Message>,
    sampling: v1::Sampling,
    stopping: v1::Stopping,
    n: Option<u32>,
    logprobs: Option<u32>,
    priority: Option<i32>,
    cache_salt: Option<String>,
    timeout: Option<Duration>,
}

impl Request {
    /// An empty conversation.
    pub fn new() -> Self {
        Request::default()
    }

    /// Adds a turn.
    pub fn message(mut self, message: Message) -> Self {
        self.messages.push(message);
        self
    }

    /// Adds turns, oldest first.
    pub fn messages(mut self, messages: impl IntoIterator<Item = Message>) -> Self {
        self.messages.extend(messages);
        self
    }

    /// Adds instructions to the model.
    pub fn system(self, parts: impl IntoParts) -> Self {
        self.message(Message::new(Role::System, parts))
    }

    /// Adds a turn of the person or program that asks.
    pub fn user(self, parts: impl IntoParts) -> Self {
        self.message(Message::new(Role::User, parts))
    }

    /// Adds an earlier answer of the model.
    pub fn assistant(self, parts: impl IntoParts) -> Self {
        self.message(Message::new(Role::Assistant, parts))
    }

    /// Temperature of sampling; 0 is greedy.
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.sampling.temperature = Some(temperature);
        self
    }

    /// Draw from the smallest set of tokens whose probabilities sum to this, in (0, 1].
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.sampling.top_p = Some(top_p);
        self
    }

    /// Draw from this many most probable tokens; 0 is all.
    pub fn top_k(mut self, top_k: u32) -> Self {
        self.sampling.top_k = Some(top_k);
        self
    }

    /// Draw from tokens at least this fraction as probable as the most probable, in [0, 1].
    pub fn min_p(mut self, min_p: f32) -> Self {
        self.sampling.min_p = Some(min_p);
        self
    }

    /// Penalty on tokens of the prompt and the answer; 1 is none.
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.sampling.repetition_penalty = Some(penalty);
        self
    }

    /// Subtracted from the logits of tokens in the answer.
    pub fn presence_penalty(mut self, penalty: f32) -> Self {
        self.sampling.presence_penalty = Some(penalty);
        self
    }

    /// Subtracted from the logits of tokens in the answer, times their count.
    pub fn frequency_penalty(mut self, penalty: f32) -> Self {
        self.sampling.frequency_penalty = Some(penalty);
        self
    }

    /// Added to the logit of one token.
    pub fn logit_bias(mut self, token_id: u32, bias: f32) -> Self {
        self.sampling.logit_bias.insert(token_id, bias);
        self
    }

    /// The same seed and request give the same tokens. Drawn by the server when not set.
    pub fn seed(mut self, seed: u64) -> Self {
        self.sampling.seed = Some(seed);
        self
    }

    /// The most tokens to generate.
    pub fn max_tokens(mut self, tokens: u32) -> Self {
        self.stopping.max_tokens = Some(tokens);
        self
    }

    /// Adds a text that ends the answer.
    pub fn stop(mut self, text: impl Into<String>) -> Self {
        self.stopping.stop.push(text.into());
        self
    }

    /// Adds a token that ends the answer.
    pub fn stop_token_id(mut self, token_id: u32) -> Self {
        self.stopping.stop_token_ids.push(token_id);
        self
    }

    /// Go on past the checkpoint's end tokens.
    pub fn ignore_eos(mut self, ignore: bool) -> Self {
        self.stopping.ignore_eos = Some(ignore);
        self
    }

    /// How many answers to draw from the one prompt.
    pub fn n(mut self, n: u32) -> Self {
        self.n = Some(n);
        self
    }

    /// Return each token's log-probability, and those of this many most probable alternatives.
    pub fn logprobs(mut self, alternatives: u32) -> Self {
        self.logprobs = Some(alternatives);
        self
    }

    /// Higher goes first.
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Requests with different salts share nothing in the server's caches.
    pub fn cache_salt(mut self, salt: impl Into<String>) -> Self {
        self.cache_salt = Some(salt.into());
        self
    }

    /// The time that the whole answer may take; replaces the client's own.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// The files of media that are sent by their ids and whose fields are at fault.
    pub(crate) fn files_by_id(
        &self,
        violations: &[FieldViolation],
    ) -> impl Iterator<Item = (v1::MediaKind, &Bytes)> {
        let parts = self.messages.iter().enumerate().flat_map(|(i, message)| {
            message
                .parts
                .iter()
                .enumerate()
                .map(move |(j, part)| (format!("chat.messages[{i}].parts[{j}]"), part))
        });
        parts.filter_map(move |(field, part)| {
            let (kind, name, file) = match part {
                Part::Image(image) if image.id.is_some() => (v1::MediaKind::Image, "image", &image.data),
                Part::Video(video) => (v1::MediaKind::Video, "video", video.file_by_id()?),
                Part::Image(_) | Part::Text(_) => return None,
            };
            let field = format!("{field}.{name}.media_id");
            violations.iter().any(|violation| violation.field == field).then_some((kind, file))
        })
    }

    /// The salt of the caches.
    pub(crate) fn salt(&self) -> Option<&str> {
        self.cache_salt.as_deref()
    }

    /// The time that this request sets for itself.
    pub(crate) fn own_timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// The conversation alone, as the server counts it.
    pub(crate) fn to_chat(&self) -> v1::Chat {
        v1::Chat { messages: self.messages.iter().map(message_to_wire).collect(), tools: Vec::new() }
    }

    /// The request as it travels.
    pub(crate) fn to_wire(&self) -> v1::GenerateRequest {
        v1::GenerateRequest {
            chat: Some(self.to_chat()),
            sampling: Some(self.sampling.clone()),
            stopping: Some(self.stopping.clone()),
            n: self.n,
            logprobs: self.logprobs,
            priority: self.priority,
            cache_salt: self.cache_salt.clone(),
            response_format: None,
            adapter: None,
        }
    }
}

fn message_to_wire(message: &Message) -> v1::Message {
    let role = match message.role {
        Role::System => v1::Role::System,
        Role::User => v1::Role::User,
        Role::Assistant => v1::Role::Assistant,
    };
    v1::Message { role: role.into(), parts: message.parts.iter().map(part_to_wire).collect() }
}

fn part_to_wire(part: &Part) -> v1::Part {
    let part = match part {
        Part::Text(text) => v1::part::Part::Text(text.clone()),
        Part::Image(image) => v1::part::Part::Image(v1::Image {
            source: Some(match image.id {
                Some(id) => v1::image::Source::MediaId(id.to_wire()),
                None => v1::image::Source::Data(image.data.clone()),
            }),
            min_pixels: image.min_pixels,
            max_pixels: image.max_pixels,
            resized_width: image.resized_width,
            resized_height: image.resized_height,
        }),
        Part::Video(video) => v1::part::Part::Video(video.to_wire()),
    };
    v1::Part { part: Some(part) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_their_order_and_sizes() {
        let picture = Image::new(&b"GIF89a"[..]).min_pixels(3136).resized_width(56).resized_height(28);
        let request = Request::new().system("Be brief.").user(("Look:", picture.clone(), "Well?")).seed(0);

        let wire = request.to_wire();

        let messages = wire.chat.unwrap().messages;
        assert_eq!(messages[0].role(), v1::Role::System);
        let parts: Vec<_> = messages[1].parts.iter().map(|part| part.part.clone().unwrap()).collect();
        assert_eq!(parts[0], v1::part::Part::Text("Look:".into()));
        let v1::part::Part::Image(image) = &parts[1] else { panic!("the second part is a picture") };
        assert_eq!(
            (image.min_pixels, image.max_pixels, image.resized_width, image.resized_height),
            (Some(3136), None, Some(56), Some(28))
        );
        assert_eq!(parts[2], v1::part::Part::Text("Well?".into()));
        assert_eq!(wire.sampling.unwrap().seed, Some(0), "a seed of 0 is a seed");
    }

    #[test]
    fn what_is_not_said_is_not_sent() {
        let wire = Request::new().user("Hi").to_wire();
        assert_eq!(wire.sampling, Some(v1::Sampling::default()));
        assert_eq!(wire.stopping, Some(v1::Stopping::default()));
        assert_eq!((wire.n, wire.logprobs, wire.priority, wire.cache_salt), (None, None, None, None));
    }

    #[test]
    fn a_file_that_is_no_picture_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("notes.png");
        fs::write(&text, "not a picture").unwrap();

        let refused = Image::open(&text).unwrap_err().to_string();
        let missing = Image::open(folder.path().join("none.png")).unwrap_err().to_string();

        assert!(refused.contains("notes.png is not a picture"), "{refused}");
        assert!(missing.contains("none.png: No such file"), "{missing}");
    }

    #[test]
    fn the_signatures_of_all_formats_are_known() {
        for head in [
            &b"\x89PNG\r\n\x1a\n"[..],
            b"\xff\xd8\xff\xe0",
            b"GIF89a",
            b"BM66",
            b"II*\0",
            b"MM\0*",
            b"RIFF....WEBPVP8 ",
        ] {
            assert!(looks_like_a_picture(head), "{head:?}");
        }
        for head in [&b""[..], b"RIFF....WAVE", b"%PDF", b"\x89PN"] {
            assert!(!looks_like_a_picture(head), "{head:?}");
        }
    }
}

//! Entrances for fuzzers. Each takes any bytes, and panics where a promise is broken. `tests/fuzz` feeds them.

use std::path::Path;
use std::sync::Arc;

use lockstep_proto::v1;
use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::api::caller::Caller;
use crate::api::convert::{self, Rules};
use crate::budget::ByteBudget;
use crate::checkpoint::{GenerationDefaults, ModelFiles};
use crate::limits::MAX_REQUEST_BYTES;
use crate::media::video::{Video, VideoLimits};
use crate::media::{MediaLibrary, PictureProcessor, decode_picture};
use crate::prompt::{Chat, MediaTokens, Message, Part, PromptEncoder, Role};

/// Pixels of the largest picture that is decoded.
const MAX_PIXELS: u64 = 1 << 20;
/// What lies between two texts of a conversation; no byte of UTF-8.
const SEPARATOR: u8 = 0xFF;

/// A picture's file. What is decoded has as many pixels as its header says.
pub fn picture(file: &[u8]) {
    if let Ok((header, pixels)) = decode_picture(file, MAX_PIXELS) {
        assert_eq!(pixels.len() as u64, u64::from(header.width) * u64::from(header.height) * 3);
    }
}

/// A video's file, as far as its headers. What is opened is within the limits, and has frames in the order of time.
pub fn video(file: &[u8]) {
    let limits = VideoLimits::default();
    let Ok(video) = Video::open(file.to_vec(), &limits) else { return };
    let header = video.header();
    let times = header.times.times_s();
    assert!(u64::from(header.width) * u64::from(header.height) <= limits.max_frame_pixels);
    assert!((1..=limits.max_frames).contains(&times.len()));
    assert!(times.is_sorted() && times.iter().all(|time| time.is_finite()));
    assert!((0.0..=limits.max_duration_s).contains(&header.times.duration_s()));
}

/// A request's message. What is refused names its fields, and what is taken has numbers that can be worked with.
pub fn request(message: &[u8]) {
    let Ok(request) = v1::GenerateRequest::decode(message) else { return };
    let library = Arc::new(MediaLibrary::new(0));
    let rules = Rules { vocab_size: 1000, processor: PictureProcessor::default(), library };
    let caller = Caller::with_key(None, ByteBudget::new(MAX_REQUEST_BYTES as u64).open());
    match convert::request(request, &caller, &rules) {
        Ok(request) => {
            let sampling = request.sampling.with_defaults(&GenerationDefaults::default(), request.logprobs);
            for number in [
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.repetition_penalty,
                sampling.presence_penalty,
                sampling.frequency_penalty,
            ] {
                assert!(number.is_finite(), "{sampling:?}");
            }
            assert!(!request.messages.is_empty());
        }
        Err(refusal) => {
            let status = Status::from(refusal);
            assert!([Code::InvalidArgument, Code::Unimplemented, Code::NotFound].contains(&status.code()));
            let fields =
                status.get_details_bad_request().map_or(Vec::new(), |details| details.field_violations);
            assert!(!fields.is_empty() && fields.iter().all(|fault| !fault.field.is_empty()), "{status}");
        }
    }
}

/// Conversations with one checkpoint's template and tokenizer.
pub struct Prompts(PromptEncoder);

impl Prompts {
    /// Opens the checkpoint in `folder`.
    ///
    /// # Panics
    /// If it cannot be used.
    pub fn open(folder: &Path) -> Self {
        let ModelFiles { tokenizer, template, .. } = ModelFiles::open(folder).expect("a checkpoint");
        let id = |content| tokenizer.control_id(content).expect("a token of the family");
        let tokens = MediaTokens { image: id("<|image_pad|>"), video: id("<|video_pad|>") };
        Self(PromptEncoder::new(tokenizer, template, tokens).expect("a template of the family"))
    }

    /// Texts, each between two separators. Whatever they are, the control tokens of the prompt are those that the template
    /// places around other texts.
    pub fn check(&self, texts: &[u8]) {
        let Ok(texts) =
            texts.split(|byte| *byte == SEPARATOR).map(std::str::from_utf8).collect::<Result<Vec<_>, _>>()
        else {
            return;
        };
        let Ok(controls) = self.controls(&texts) else { return };
        assert_eq!(Ok(controls), self.controls(&vec!["x"; texts.len()]), "{texts:?}");
    }

    /// The control tokens of a conversation of these texts, in turns.
    fn controls(&self, texts: &[&str]) -> Result<Vec<u32>, String> {
        let roles = [Role::System, Role::User, Role::Assistant, Role::User].into_iter().cycle();
        let messages = roles
            .zip(texts)
            .map(|(role, text)| Message { role, parts: vec![Part::Text((*text).to_owned())] });
        let chat = Chat { messages: messages.collect(), tools: Vec::new() };
        let prompt = self.0.encode(&chat).map_err(|error| error.to_string())?;
        let is_control = |id: &u32| self.0.tokenizer().controls().any(|token| token.id == *id);
        Ok(prompt.token_ids.into_iter().filter(is_control).collect())
    }
}

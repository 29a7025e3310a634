//! The reference's answers: `tests/goldens/<checkpoint>.json`, described in `tests/goldens/README.md`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use bytes::Bytes;
use lockstep_proto::v1;
use serde::Deserialize;

/// The answers for one checkpoint.
#[derive(Debug, Deserialize)]
pub struct Golden {
    /// Its folder, from the repository's root.
    pub checkpoint: String,
    /// The cases.
    pub cases: Vec<Case>,
}

/// One conversation and its answers.
#[derive(Debug, Deserialize)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// The conversation.
    pub messages: Vec<Message>,
    /// The prompt.
    pub input_ids: Vec<u32>,
    /// Patches in time, height and width of each picture and video.
    pub grids: Vec<[u32; 3]>,
    /// Width and height of each resized picture and video.
    pub resized: Vec<[u32; 2]>,
    /// When each frame is shown that is taken of each video; of none in a file without videos.
    #[serde(default)]
    pub timestamps_s: Vec<Vec<f64>>,
    /// A greedy answer.
    pub greedy: Vec<u32>,
    /// A greedy answer with repetition penalty 1.3.
    pub greedy_rp: Vec<u32>,
    /// The most probable tokens at the first position.
    pub first_logprobs: TopLogprobs,
    /// Log-probability of each token of `greedy`.
    pub logprobs: Vec<f32>,
    /// The largest error of the reference's own bf16.
    pub full_bf16_max_error: f32,
}

impl Case {
    /// Whether it shows a video's file, of which no two decoders give the same pixels.
    pub fn has_video_file(&self) -> bool {
        self.messages.iter().flat_map(|message| &message.parts).any(|part| part.video.is_some())
    }

    /// The text of a conversation that is nothing but one text.
    pub fn only_text(&self) -> Option<&str> {
        match &self.messages[..] {
            [Message { parts, .. }] => match &parts[..] {
                [part] => part.text.as_deref(),
                _ => None,
            },
            _ => None,
        }
    }
}

/// The most probable tokens, best first.
#[derive(Debug, Deserialize)]
pub struct TopLogprobs {
    /// Their ids.
    pub ids: Vec<u32>,
    /// Their log-probabilities.
    pub logprobs: Vec<f32>,
}

/// One turn.
#[derive(Debug, Deserialize)]
pub struct Message {
    role: String,
    parts: Vec<Part>,
}

#[derive(Debug, Deserialize)]
struct Part {
    text: Option<String>,
    image: Option<String>,
    video: Option<String>,
    frames: Option<Vec<String>>,
    rate: Option<f64>,
    #[serde(default)]
    timestamps_s: Vec<f64>,
    min_pixels: Option<u32>,
    max_pixels: Option<u32>,
    resized_width: Option<u32>,
    resized_height: Option<u32>,
}

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the repository").to_owned()
}

/// Reads the goldens of a checkpoint.
///
/// # Errors
/// When the file is missing or malformed.
pub fn read(name: &str) -> anyhow::Result<Golden> {
    let path = root().join(format!("tests/goldens/{name}.json"));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

/// A conversation of goldens as the API takes it.
///
/// # Errors
/// When a picture or video cannot be read.
pub fn chat(messages: &[Message]) -> anyhow::Result<v1::Chat> {
    let messages = messages.iter().map(message).collect::<anyhow::Result<_>>()?;
    Ok(v1::Chat { messages, tools: Vec::new() })
}

/// A case as the API takes it: greedy, of exactly so many tokens, with the log-probabilities of the 20 best.
///
/// # Errors
/// When a picture or video cannot be read.
pub fn request(
    case: &Case,
    repetition_penalty: f32,
    max_tokens: usize,
) -> anyhow::Result<v1::GenerateRequest> {
    Ok(v1::GenerateRequest {
        chat: Some(chat(&case.messages)?),
        sampling: Some(v1::Sampling {
            temperature: Some(0.0),
            repetition_penalty: Some(repetition_penalty),
            ..Default::default()
        }),
        stopping: Some(v1::Stopping {
            max_tokens: Some(max_tokens as u32),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        logprobs: Some(20),
        ..Default::default()
    })
}

/// The largest difference of log-probabilities from the reference's f32: of the first `positions` tokens of the answer,
/// and of the first position's most probable tokens.
///
/// # Errors
/// When the answer is without log-probabilities.
pub fn largest_error(case: &Case, choice: &v1::Choice, positions: usize) -> anyhow::Result<f32> {
    let mut largest = 0f32;
    for (expected, got) in case.logprobs.iter().zip(&choice.logprobs).take(positions) {
        let got = got.chosen.as_ref().context("a log-probability")?;
        largest = largest.max((expected - got.logprob).abs());
    }
    let first = &choice.logprobs.first().context("a first position")?.top;
    for (id, expected) in case.first_logprobs.ids.iter().zip(&case.first_logprobs.logprobs) {
        // A token at the edge of the best 20 may fall out of them.
        if let Some(got) = first.iter().find(|token| token.token_id == *id) {
            largest = largest.max((expected - got.logprob).abs());
        }
    }
    Ok(largest)
}

fn message(message: &Message) -> anyhow::Result<v1::Message> {
    let role = match message.role.as_str() {
        "system" => v1::Role::System,
        "user" => v1::Role::User,
        "assistant" => v1::Role::Assistant,
        other => anyhow::bail!("role {other}"),
    };
    let parts = message.parts.iter().map(part).collect::<anyhow::Result<_>>()?;
    Ok(v1::Message { role: role.into(), parts })
}

fn part(part: &Part) -> anyhow::Result<v1::Part> {
    let file = |path: &String| -> anyhow::Result<Bytes> {
        Ok(std::fs::read(root().join(path)).context(path.clone())?.into())
    };
    let video = |source| {
        v1::part::Part::Video(v1::Video {
            source: Some(source),
            min_pixels: part.min_pixels,
            max_pixels: part.max_pixels,
            ..Default::default()
        })
    };
    let part = match (&part.text, &part.image, &part.video, &part.frames) {
        (Some(text), None, None, None) => v1::part::Part::Text(text.clone()),
        (None, Some(path), None, None) => v1::part::Part::Image(v1::Image {
            source: Some(v1::image::Source::Data(file(path)?)),
            min_pixels: part.min_pixels,
            max_pixels: part.max_pixels,
            resized_width: part.resized_width,
            resized_height: part.resized_height,
        }),
        (None, None, Some(path), None) => video(v1::video::Source::Data(file(path)?)),
        (None, None, None, Some(paths)) => video(v1::video::Source::Frames(v1::VideoFrames {
            frames: paths.iter().map(file).collect::<anyhow::Result<_>>()?,
            timestamps_s: part.timestamps_s.clone(),
            rate: part.rate,
        })),
        _ => anyhow::bail!("a part is a text, an image, a video or frames"),
    };
    Ok(v1::Part { part: Some(part) })
}

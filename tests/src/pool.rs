//! Requests of every kind, made from a seed: texts of several lengths, pictures, videos, conversations, and every way to draw.

use bytes::Bytes;
use lockstep_proto::v1;
use lockstep_proto::v1::part::Part;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::golden::root;

/// The most tokens that the prompt and the answers of a request have together, by the tokenizer of the small checkpoints. A server
/// that holds as many gives every request its whole answer.
pub const MOST_TOKENS: u32 = 512;
/// The most tokens of an answer.
pub const MAX_TOKENS: u32 = 80;

const PICTURES: [&str; 6] = [
    "cat.jpg",
    "coffee.jpg",
    "gradient_70x95.png",
    "noise_56x56.png",
    "scene_112x140.png",
    "scene_260x180.png",
];
const VIDEOS: [&str; 3] = ["full_range.mp4", "moving.gif", "reordered.mp4"];
const FRAMES: usize = 6;
/// The largest sizes that pictures are reduced to, in pixels: 16 to 128 tokens. Few, so that requests share pictures.
const PICTURE_PIXELS: [u32; 3] = [12_544, 40_000, 100_000];
/// The largest size of a frame, in pixels, and the most frames of a file.
const FRAME_PIXELS: u32 = 9_000;
const VIDEO_FRAMES: u32 = 8;
/// Kinds of conversations, and ways to draw: numbers without a common divisor.
const KINDS: usize = 9;
const WAYS: usize = 7;
const ABOUT_PICTURE: usize = 5;
const SAMPLED: usize = 2;
const WORDS: [&str; 16] = [
    "lighthouse",
    "a",
    "the",
    "harbour",
    "walked",
    "at",
    "night",
    "seven",
    "ropes",
    "and",
    "Éire",
    "42",
    "grey;",
    "soon",
    "日本",
    "gulls",
];

/// Makes requests.
pub struct Pool {
    rng: StdRng,
    made: usize,
}

impl Pool {
    /// A pool that makes the same requests for the same seed.
    pub fn new(seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), made: 0 }
    }

    /// The next `count` requests. Kinds and ways to draw take turns, so that a few dozen have them all.
    ///
    /// # Errors
    /// When a picture or video cannot be read.
    pub fn take(&mut self, count: usize) -> anyhow::Result<Vec<v1::GenerateRequest>> {
        (0..count).map(|_| self.next()).collect()
    }

    fn next(&mut self) -> anyhow::Result<v1::GenerateRequest> {
        // Every kind comes with every way to draw.
        let (kind, way) = (self.made % KINDS, self.made % WAYS);
        self.made += 1;
        let rng = &mut self.rng;
        let chat = v1::Chat { messages: messages(rng, kind)?, tools: vec![] };
        let n = if rng.random_bool(0.3) { rng.random_range(2..=3) } else { 1 };
        Ok(v1::GenerateRequest {
            chat: Some(chat),
            sampling: Some(sampling(rng, way)),
            stopping: Some(stopping(rng)),
            n: Some(n),
            logprobs: if rng.random_bool(0.2) { None } else { Some(rng.random_range(0..6)) },
            ..Default::default()
        })
    }
}

/// A question about a picture.
///
/// # Errors
/// When a picture cannot be read.
pub fn about_picture(rng: &mut StdRng) -> anyhow::Result<v1::GenerateRequest> {
    let messages = messages(rng, ABOUT_PICTURE)?;
    Ok(v1::GenerateRequest {
        chat: Some(v1::Chat { messages, tools: vec![] }),
        sampling: Some(sampling(rng, SAMPLED)),
        stopping: Some(stopping(rng)),
        ..Default::default()
    })
}

/// A turn of a conversation.
pub fn message(role: v1::Role, text: String) -> v1::Message {
    turn(role, vec![Part::Text(text)])
}

fn messages(rng: &mut StdRng, kind: usize) -> anyhow::Result<Vec<v1::Message>> {
    let question = words(rng, 3..12);
    Ok(match kind {
        0 => vec![user(vec![words(rng, 1..3)])],
        1 | 2 => vec![user(vec![question])],
        3 => vec![user(vec![words(rng, 50..90)])],
        4 => {
            let system = turn(v1::Role::System, vec![words(rng, 2..8)]);
            let mut turns = vec![system, user(vec![question])];
            for _ in 0..rng.random_range(1..4) {
                turns.push(turn(v1::Role::Assistant, vec![words(rng, 3..20)]));
                turns.push(user(vec![words(rng, 3..12)]));
            }
            turns
        }
        ABOUT_PICTURE => vec![user(vec![picture(rng)?, question])],
        6 => {
            let answer = turn(v1::Role::Assistant, vec![words(rng, 3..12)]);
            vec![user(vec![question, picture(rng)?, picture(rng)?]), answer, user(vec![words(rng, 2..8)])]
        }
        7 => vec![user(vec![video(rng)?, question])],
        _ => vec![user(vec![words(rng, 1..20), frames(rng)?, question])],
    })
}

fn user(parts: Vec<Part>) -> v1::Message {
    turn(v1::Role::User, parts)
}

fn turn(role: v1::Role, parts: Vec<Part>) -> v1::Message {
    let parts = parts.into_iter().map(|part| v1::Part { part: Some(part) }).collect();
    v1::Message { role: role.into(), parts }
}

fn words(rng: &mut StdRng, count: std::ops::Range<usize>) -> Part {
    let count = rng.random_range(count);
    let words: Vec<_> = (0..count).map(|_| *WORDS.choose(rng).expect("there are words")).collect();
    Part::Text(words.join(" "))
}

fn file(path: &str) -> anyhow::Result<Bytes> {
    Ok(std::fs::read(root().join("tests").join(path))?.into())
}

fn picture(rng: &mut StdRng) -> anyhow::Result<Part> {
    let name = PICTURES.choose(rng).expect("there are pictures");
    let data = file(&format!("pictures/{name}"))?;
    let max_pixels = PICTURE_PIXELS.choose(rng).copied();
    let source = Some(v1::image::Source::Data(data));
    Ok(Part::Image(v1::Image { source, max_pixels, ..Default::default() }))
}

fn video(rng: &mut StdRng) -> anyhow::Result<Part> {
    let name = VIDEOS.choose(rng).expect("there are videos");
    let source = Some(v1::video::Source::Data(file(&format!("videos/{name}"))?));
    let max_frames = Some(VIDEO_FRAMES);
    Ok(Part::Video(v1::Video { max_frames, ..small_frames(source) }))
}

fn frames(rng: &mut StdRng) -> anyhow::Result<Part> {
    let count = rng.random_range(1..=FRAMES);
    let frames =
        (0..count).map(|i| file(&format!("videos/frames/{i:02}.png"))).collect::<anyhow::Result<_>>()?;
    let rate = [1.0, 2.0, 29.97].choose(rng).copied();
    let frames = v1::VideoFrames { frames, timestamps_s: vec![], rate };
    Ok(Part::Video(small_frames(Some(v1::video::Source::Frames(frames)))))
}

fn small_frames(source: Option<v1::video::Source>) -> v1::Video {
    v1::Video { source, min_pixels: Some(784), max_pixels: Some(FRAME_PIXELS), ..Default::default() }
}

/// How tokens are drawn: greedily, from all, or after each way to leave some out or to favour some.
fn sampling(rng: &mut StdRng, way: usize) -> v1::Sampling {
    // The checkpoint has defaults of its own for what is left out.
    let plain = v1::Sampling {
        temperature: Some(if way < 2 { 0.0 } else { rng.random_range(0.5..1.5) }),
        repetition_penalty: Some(1.0),
        seed: Some(rng.random()),
        ..Default::default()
    };
    match way {
        0 | SAMPLED => plain,
        1 => v1::Sampling { repetition_penalty: Some(rng.random_range(0.8..1.4)), ..plain },
        3 => v1::Sampling { top_k: Some(rng.random_range(1..400)), ..plain },
        4 => v1::Sampling { top_p: Some(rng.random_range(0.3..1.0)), ..plain },
        5 => v1::Sampling {
            presence_penalty: Some(rng.random_range(-1.0..1.0)),
            frequency_penalty: Some(rng.random_range(-1.0..1.0)),
            logit_bias: (0..3).map(|_| (rng.random_range(0..256), rng.random_range(-5.0..5.0))).collect(),
            ..plain
        },
        _ => v1::Sampling {
            top_k: Some(rng.random_range(2..100)),
            top_p: Some(rng.random_range(0.5..1.0)),
            min_p: Some(rng.random_range(0.0..0.2)),
            repetition_penalty: Some(rng.random_range(1.0..1.3)),
            ..plain
        },
    }
}

fn stopping(rng: &mut StdRng) -> v1::Stopping {
    // Most go on to their last token, so that answers are long enough to need more blocks on the way.
    let ends = rng.random_bool(0.3);
    let stop = if ends {
        vec![["a", "e ", "\u{fffd}\u{fffd}"].choose(rng).map(ToString::to_string)]
    } else {
        vec![]
    };
    v1::Stopping {
        max_tokens: Some(rng.random_range(1..=MAX_TOKENS)),
        stop: stop.into_iter().flatten().collect(),
        stop_token_ids: if ends { (0..4).map(|_| rng.random_range(0..256)).collect() } else { vec![] },
        ignore_eos: Some(!ends),
    }
}

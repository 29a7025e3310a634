//! What a server asks itself before it says that it serves: about nothing, a picture and a video, through everything that a request
//! goes through. What does not work is found before anybody waits for it, and the first client does not pay for first times.

use std::sync::Arc;

use anyhow::{anyhow, bail};
use bytes::Bytes;
use image::codecs::gif::GifEncoder;
use image::{Delay, Frame, RgbaImage};

use crate::api::fault::Refusal;
use crate::budget::ByteBudget;
use crate::deadline::Deadline;
use crate::generation::{Frontend, Output};
use crate::media::PictureOptions;
use crate::media::video::{SamplingOptions, VideoInput, VideoOptions, VideoSource};
use crate::prompt::Role;
use crate::request::{Image, Message, Namespace, Part, Request, Sampling, Stopping};
use crate::telemetry::Trace;

/// Tokens of each answer: the first comes from the prompt, the second from the first.
const ANSWER_TOKENS: u32 = 2;
/// Pixels on a side of picture and video.
const SIDE: u32 = 56;
/// Frames of the video, and the time that each is shown.
const FRAMES: u8 = 4;
const FRAME_MS: u32 = 500;

/// Answers a text, a picture and a video. What this server is not made for, because its bounds are small, is left out.
///
/// # Errors
/// One of them was not answered.
pub async fn warm_up(frontend: &Frontend, budget: &ByteBudget) -> anyhow::Result<()> {
    let picture = Image { data: film(1)?, options: PictureOptions::default() };
    let video = VideoInput {
        source: VideoSource::File(film(FRAMES)?),
        sampling: SamplingOptions::default(),
        options: VideoOptions::default(),
    };
    for (what, shown) in
        [("text", None), ("a picture", Some(Part::Image(picture))), ("a video", Some(Part::Video(video)))]
    {
        let parts = shown.into_iter().chain([Part::Text("What is this?".into())]).collect();
        match answer(frontend, budget, Message { role: Role::User, parts }).await {
            Ok(()) => {}
            Err(Refusal::Invalid(_) | Refusal::Exhausted(_)) => {
                tracing::info!("no warm-up with {what}: it has no room here")
            }
            Err(Refusal::Unavailable(why) | Refusal::Internal(why)) => {
                bail!("the warm-up with {what} failed: {why}")
            }
            Err(refusal) => return Err(anyhow!("the warm-up with {what} was refused: {refusal:?}")),
        }
    }
    Ok(())
}

async fn answer(frontend: &Frontend, budget: &ByteBudget, message: Message) -> Result<(), Refusal> {
    let request = Request {
        messages: vec![message],
        sampling: Sampling { temperature: Some(0.0), ..Sampling::default() },
        stopping: Stopping { max_tokens: Some(ANSWER_TOKENS), ignore_eos: true, ..Stopping::default() },
        num_choices: 1,
        logprobs: None,
        priority: 0,
        namespace: Namespace::default(),
        deadline: Deadline::default(),
    };
    let mut generation = frontend.start(request, Arc::new(budget.open()), Trace::none()).await?;
    while let Some(output) = generation.next().await {
        if let Output::Completed { .. } = output? {
            return Ok(());
        }
    }
    Err(Refusal::Internal("it has no end".into()))
}

/// A GIF of so many frames.
fn film(frames: u8) -> anyhow::Result<Bytes> {
    let mut file = Vec::new();
    let frames = (0..frames).map(|index| {
        let pixel = |x: u32, y: u32| image::Rgba([x as u8, y as u8, 40 * index, 255]);
        let delay = Delay::from_numer_denom_ms(FRAME_MS, 1);
        Frame::from_parts(RgbaImage::from_fn(SIDE, SIDE, pixel), 0, 0, delay)
    });
    GifEncoder::new(&mut file).encode_frames(frames)?;
    Ok(file.into())
}

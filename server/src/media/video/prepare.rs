//! Videos to what the model takes: measured, admitted, decoded in a process of their own, resized, hashed.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::container::Container;
use super::error::{VideoError, VideoLimits, malformed};
use super::ffmpeg::{Ffmpeg, Film};
use super::file::{Video, VideoHeader};
use super::process::{DecodeError, VideoDecoder};
use super::sampling::{FrameTimes, Sample, Sampler, SamplingOptions};
use super::size::{VideoOptions, VideoProcessor, VideoSize};
use crate::limits::MAX_SECONDS_PER_GRID_T;
use crate::media::decode::Header;
use crate::media::medium::{self, Blame, MediaKind, Medium, MediumInfo};
use crate::media::picture::{PictureError, PicturePreparer};
use crate::workers::{Place, Workers, WorkersError};

/// Videos that are decoded at once, each in a process. What decoding holds beside files and pixels is bounded by this and
/// by the processes' own bound, so that no request reserves it.
const DECODING_AT_ONCE: usize = 4;
/// Videos that may wait to be decoded.
const WAITING_TO_DECODE: usize = 64;
/// Files whose headers are read at once.
const READING_AT_ONCE: usize = 4;
/// Files that may wait for that.
const WAITING_TO_READ: usize = 256;
/// Videos whose frames, given one by one, are decoded at once.
const GIVEN_AT_ONCE: usize = 2;
/// Such videos that may wait for that.
const WAITING_GIVEN: usize = 64;
/// Frames of one such video that are decoded at once.
const FRAMES_AT_ONCE: usize = 4;

/// A video as it was sent, and what the model shall see of it.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoInput {
    /// Where the frames come from.
    pub source: VideoSource,
    /// Which frames of a file are taken.
    pub sampling: SamplingOptions,
    /// How large they are.
    pub options: VideoOptions,
}

/// Where the frames of a video come from.
#[derive(Debug, Clone, PartialEq)]
pub enum VideoSource {
    /// A video's file.
    File(Bytes),
    /// Pictures' files, each a frame; all are taken.
    Frames {
        /// The files, in order of time.
        files: Vec<Bytes>,
        /// When each is shown.
        times: FrameTimes,
    },
}

impl VideoInput {
    /// The same with every file passed through `with`.
    pub fn map_files(&self, with: impl Fn(&Bytes) -> Bytes) -> Self {
        let source = match &self.source {
            VideoSource::File(file) => VideoSource::File(with(file)),
            VideoSource::Frames { files, times } => {
                VideoSource::Frames { files: files.iter().map(with).collect(), times: times.clone() }
            }
        };
        Self { source, ..self.clone() }
    }
}

/// Why a video is not taken.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The video is at fault.
    #[error(transparent)]
    Video(#[from] VideoError),
    /// The frames that were given are at fault, all together.
    #[error(transparent)]
    Frames(VideoError),
    /// A frame that was given is at fault.
    #[error("frame {index}: {problem}")]
    Frame {
        /// Its index.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// Too many videos wait, or reading one panicked.
    #[error(transparent)]
    Workers(#[from] WorkersError),
    /// The machine has no room or no time to decode the video now.
    #[error("{0}")]
    Load(String),
    /// No process could be started, made ready, or spoken to.
    #[error("the process that decodes videos: {0}")]
    Process(#[from] io::Error),
}

impl PrepareError {
    /// Who or what is at fault; fields are those of the public API's `Video`.
    pub fn blame(&self) -> Blame {
        let fields = |faults: Vec<(&str, String)>| {
            Blame::Fields(faults.into_iter().map(|(field, problem)| (field.to_owned(), problem)).collect())
        };
        match self {
            Self::Video(error) => fields(error.faults("data")),
            Self::Frames(error) => fields(error.faults("frames")),
            Self::Frame { index, problem } => {
                Blame::Fields(vec![(format!("frames.frames[{index}]"), problem.clone())])
            }
            Self::Workers(WorkersError::Overloaded { .. }) | Self::Load(_) => Blame::Load(self.to_string()),
            // A demuxer that panics does so because of the file.
            Self::Workers(WorkersError::Panicked { .. }) => {
                fields(vec![("data", "the video cannot be decoded".to_owned())])
            }
            Self::Process(_) => Blame::Server(self.to_string()),
        }
    }
}

impl From<DecodeError> for PrepareError {
    fn from(error: DecodeError) -> Self {
        match error {
            DecodeError::Video(error) => error.into(),
            error @ (DecodeError::NoRoom(_) | DecodeError::Killed(_)) => {
                tracing::warn!("a video was not decoded: {error}");
                Self::Load("there is no room to decode a video now".into())
            }
            DecodeError::Process(error) => error.into(),
        }
    }
}

impl PrepareError {
    fn of_frame(index: usize, error: &PictureError) -> Self {
        Self::Frame { index, problem: error.to_string() }
    }

    /// Of work on frames that are given one by one. What a panic says is not for clients.
    fn of_given(error: WorkersError) -> Self {
        match error {
            WorkersError::Overloaded { .. } => error.into(),
            WorkersError::Panicked { .. } => Self::Frames(malformed("its frames cannot be read")),
        }
    }
}

/// Prepares videos, a bounded number at a time.
#[derive(Debug, Clone)]
pub struct VideoPreparer {
    rules: Arc<Rules>,
    decoder: VideoDecoder,
    /// For what the decoder does not take.
    ffmpeg: Option<Ffmpeg>,
    max_time: Duration,
    readers: Workers,
    decoders: Workers,
    given: Workers,
}

/// The most that a video takes of a prompt.
#[derive(Debug, Clone, Copy)]
pub struct TokenBounds {
    /// Of a video.
    pub video: u64,
    /// Of one of its temporal patches, which are encoded one at a time, as a picture is.
    pub temporal_patch: u64,
    /// Of a video whose request says nothing about its size: it is reduced until it fits.
    pub unasked: u64,
}

impl TokenBounds {
    /// One bound for everything.
    pub fn same(tokens: u64) -> Self {
        Self { video: tokens, temporal_patch: tokens, unasked: tokens }
    }
}

#[derive(Debug)]
struct Rules {
    processor: VideoProcessor,
    sampler: Sampler,
    limits: VideoLimits,
    bounds: TokenBounds,
}

/// A video's file whose headers have been read.
enum Opened {
    /// By this program.
    Own(Video),
    /// By ffmpeg.
    Other(Film),
}

impl Opened {
    fn header(&self) -> &VideoHeader {
        match self {
            Self::Own(video) => video.header(),
            Self::Other(film) => &film.header,
        }
    }
}

/// A video whose headers have been read and whose cost is known.
struct Plan {
    source: Source,
    sample: Sample,
    size: VideoSize,
}

/// What frames are before they are resized.
#[derive(Clone, Copy)]
struct Source {
    /// Width and height in pixels.
    size: (u32, u32),
    /// Of all of them.
    decoded_pixels: u64,
}

impl Plan {
    fn info(&self) -> MediumInfo {
        let Self { source, sample, size } = self;
        MediumInfo {
            kind: MediaKind::Video,
            source: source.size,
            size: (size.width, size.height),
            grid: size.grid,
            num_tokens: size.num_tokens,
            timestamps_s: sample.timestamps_s.clone(),
            seconds_per_grid_t: sample.seconds_per_grid_t,
            decoded_pixels: source.decoded_pixels,
        }
    }
}

impl VideoPreparer {
    /// A preparer for a processor, whose videos are within `bounds`, and whose decoding may take `max_time`.
    pub fn new(
        processor: VideoProcessor,
        decoder: VideoDecoder,
        bounds: TokenBounds,
        max_time: Duration,
    ) -> Self {
        let sampler = Sampler { temporal_patch_size: processor.temporal_patch_size, ..Sampler::default() };
        let processor = processor.of_at_most(bounds.unasked.min(bounds.video));
        let rules = Rules { processor, sampler, limits: decoder.limits, bounds };
        Self {
            rules: Arc::new(rules),
            decoder,
            ffmpeg: None,
            max_time,
            readers: Workers::new("reading videos", READING_AT_ONCE, WAITING_TO_READ),
            decoders: Workers::new("decoding videos", DECODING_AT_ONCE, WAITING_TO_DECODE),
            given: Workers::new("decoding frames of videos", GIVEN_AT_ONCE, WAITING_GIVEN),
        }
    }

    /// The same, with an ffmpeg for files that are not read here.
    pub fn with_ffmpeg(self, ffmpeg: Option<Ffmpeg>) -> Self {
        Self { ffmpeg, ..self }
    }

    /// Reads a file's headers, whatever shall be taken of it.
    pub async fn inspect(&self, file: Bytes) -> Result<(), PrepareError> {
        let place = Arc::new(self.readers.place().await?);
        self.open(&place, &file).await.map(|_| ())
    }

    /// Reads a file's headers here, or has ffmpeg read them where another codec or container is all that is wrong.
    async fn open(&self, place: &Arc<Place>, file: &Bytes) -> Result<Opened, PrepareError> {
        let (limits, own) = (self.rules.limits, file.clone());
        let error = match place.run(move || Video::open(own.to_vec(), &limits)).await? {
            Ok(video) => return Ok(Opened::Own(video)),
            Err(error) => error,
        };
        match (Container::for_ffmpeg(&error, file), &self.ffmpeg) {
            (None, _) => Err(error.into()),
            (Some(_), None) => Err(VideoError::WithoutFfmpeg(Box::new(error)).into()),
            (Some(container), Some(ffmpeg)) => {
                let film = self.in_time(ffmpeg.open(place, file.clone(), container)).await??;
                Ok(Opened::Other(film))
            }
        }
    }

    /// A file whose headers are read and which is admitted.
    async fn plan(
        &self,
        place: &Arc<Place>,
        file: &Bytes,
        input: VideoInput,
    ) -> Result<(Opened, Plan), PrepareError> {
        let opened = self.open(place, file).await?;
        let rules = Arc::clone(&self.rules);
        let plan = move || rules.plan(opened.header(), &input).map(|plan| (opened, plan));
        Ok(place.run(plan).await??)
    }

    /// What a video would cost, from its headers, or from those of its frames.
    pub async fn measure(
        &self,
        pictures: &PicturePreparer,
        input: VideoInput,
    ) -> Result<MediumInfo, PrepareError> {
        let (rules, pictures) = (Arc::clone(&self.rules), pictures.clone());
        match &input.source {
            VideoSource::File(file) => {
                let place = Arc::new(self.readers.place().await?);
                let file = file.clone();
                Ok(self.plan(&place, &file, input).await?.1.info())
            }
            VideoSource::Frames { files, times } => {
                let (files, times) = (files.clone(), times.clone());
                let work = move || rules.plan_given(&pictures, &files, &times, &input.options);
                Ok(self.readers.run(work).await.map_err(PrepareError::of_given)??.info())
            }
        }
    }

    /// Measures, admits, decodes, resizes and hashes a video, all of it in one place: a video that is in work is not
    /// refused midway because others come.
    pub async fn prepare(
        &self,
        pictures: &PicturePreparer,
        input: VideoInput,
    ) -> Result<Medium, PrepareError> {
        let rules = Arc::clone(&self.rules);
        let (place, plan, pixels) = match &input.source {
            VideoSource::File(file) => {
                // Taken first: an opened video is a copy of its file.
                let place = Arc::new(self.decoders.place().await?);
                let (opened, plan) = self.plan(&place, file, input.clone()).await?;
                let (indices, size) = (&plan.sample.indices, &plan.size);
                let pixels = match &opened {
                    Opened::Own(video) => self.in_time(self.decoder.decode(video, indices, size)).await??,
                    Opened::Other(film) => self.in_time(film.decode(&place, indices, size)).await??,
                };
                (place, plan, pixels)
            }
            VideoSource::Frames { files, times } => {
                let place = Arc::new(self.given.place().await?);
                let work = {
                    let (pictures, files, times) = (pictures.clone(), files.clone(), times.clone());
                    move || rules.plan_given(&pictures, &files, &times, &input.options)
                };
                let plan = place.run(work).await.map_err(PrepareError::of_given)??;
                let pixels = self.in_time(decode_frames(&place, pictures, files, &plan)).await??;
                (place, plan, pixels)
            }
        };
        let info = plan.info();
        let (grid, seconds) = (info.grid, info.seconds_per_grid_t);
        let hashed = place.run(move || (medium::hash(MediaKind::Video, grid, seconds, &pixels), pixels));
        let (hash, pixels) = hashed.await?;
        Ok(Medium { info, pixels: pixels.into(), hash })
    }

    /// Bounds decoding by the clock. What one video may cost is bounded by its headers and by a processor's time: where the
    /// clock is faster, the machine has too much to do.
    async fn in_time<T>(&self, decoding: impl Future<Output = T>) -> Result<T, PrepareError> {
        tokio::time::timeout(self.max_time, decoding).await.map_err(|_| {
            let why = format!("decoding a video took longer than {:?}", self.max_time);
            tracing::warn!("{why}");
            PrepareError::Load(why)
        })
    }
}

impl Rules {
    /// What is taken of a file.
    fn plan(&self, header: &VideoHeader, input: &VideoInput) -> Result<Plan, VideoError> {
        let sample = self.sampler.sample(&header.times, &input.sampling)?;
        let source = Source { size: (header.width, header.height), decoded_pixels: header.decoded_pixels };
        let advice = "lower max_frames, max_pixels or total_pixels";
        self.admit(source, sample, &input.options, advice)
    }

    /// What is taken of frames that are given one by one.
    fn plan_given(
        &self,
        pictures: &PicturePreparer,
        files: &[Bytes],
        times: &FrameTimes,
        options: &VideoOptions,
    ) -> Result<Plan, PrepareError> {
        let sample = self.sampler.all(times).map_err(PrepareError::Frames)?;
        let headers = files.iter().enumerate().map(|(index, file)| {
            pictures.frame_header(file).map_err(|error| PrepareError::of_frame(index, &error))
        });
        let headers = headers.collect::<Result<Vec<_>, _>>()?;
        let size = frame_size(&headers)?;
        self.limits.check_decoded_pixels(size, headers.len()).map_err(PrepareError::Frames)?;
        let frame_pixels = u64::from(size.0) * u64::from(size.1);
        let source = Source { size, decoded_pixels: frame_pixels.saturating_mul(headers.len() as u64) };
        let advice = "lower max_pixels or total_pixels, or give fewer frames";
        self.admit(source, sample, options, advice).map_err(PrepareError::Frames)
    }

    /// `advice` says what would help against too many tokens.
    fn admit(
        &self,
        source: Source,
        sample: Sample,
        options: &VideoOptions,
        advice: &'static str,
    ) -> Result<Plan, VideoError> {
        let frames = sample.indices.len();
        let size = self.processor.size(source.size.0, source.size.1, frames, options)?;
        // Sampling gives no others; the shards would refuse them, and a step with them, and the server would end.
        if !(0.0..=MAX_SECONDS_PER_GRID_T).contains(&sample.seconds_per_grid_t) {
            return Err(malformed("the times of its frames are out of range"));
        }
        let VideoSize { width, height, num_tokens: tokens, .. } = size;
        if tokens > self.bounds.video {
            let max = self.bounds.video;
            return Err(VideoError::TooManyTokens { tokens, frames, width, height, max, advice });
        }
        let tokens = tokens / u64::from(size.grid[0]);
        if tokens > self.bounds.temporal_patch {
            let max = self.bounds.temporal_patch;
            return Err(VideoError::TooManyTokensAtOnce { tokens, width, height, max });
        }
        Ok(Plan { source, sample, size })
    }
}

/// The one size that all frames have.
fn frame_size(headers: &[Header]) -> Result<(u32, u32), PrepareError> {
    let first = headers.first().ok_or(PrepareError::Frames(VideoError::NoFrames))?;
    let size = (first.width, first.height);
    match headers.iter().position(|header| (header.width, header.height) != size) {
        None => Ok(size),
        Some(index) => {
            let Header { width, height, .. } = headers[index];
            let problem = format!("has {width} x {height} pixels, the first frame {} x {}", size.0, size.1);
            Err(PrepareError::Frame { index, problem })
        }
    }
}

/// The pixels of frames that are given one by one, a few of which are decoded at once. Dropping the future ends it after
/// these.
async fn decode_frames(
    place: &Arc<Place>,
    pictures: &PicturePreparer,
    files: &[Bytes],
    plan: &Plan,
) -> Result<Vec<u8>, PrepareError> {
    let size = (plan.size.width, plan.size.height);
    let frames: Vec<_> = files
        .iter()
        .enumerate()
        .map(|(index, file)| {
            let (pictures, file) = (pictures.clone(), file.clone());
            async move {
                let decoded = place.run(move || pictures.frame(&file, size)).await;
                // A decoder that panics does so because of the file.
                let decoded = decoded.unwrap_or(Err(PictureError::Malformed("it is broken".into())));
                decoded.map_err(|error| PrepareError::of_frame(index, &error))
            }
        })
        .collect();
    let pixel_bytes = plan.size.pixel_bytes(plan.sample.indices.len());
    let mut pixels = Vec::with_capacity(usize::try_from(pixel_bytes).map_err(io::Error::other)?);
    let mut frames = stream::iter(frames).buffered(FRAMES_AT_ONCE);
    while let Some(frame) = frames.try_next().await? {
        pixels.extend(frame);
    }
    // The last frame fills the last temporal patch.
    let frame_bytes = pixels.len() / files.len().max(1);
    for _ in files.len()..plan.sample.indices.len() {
        pixels.extend_from_within(pixels.len() - frame_bytes..);
    }
    Ok(pixels)
}

#[cfg(test)]
mod tests;

//! Videos to what the model takes: measured, admitted, decoded in a process of their own, resized, hashed.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::error::{VideoError, VideoLimits};
use super::file::Video;
use super::process::{DecodeError, VideoDecoder};
use super::sampling::{FrameTimes, Sample, Sampler, SamplingOptions};
use super::size::{VideoOptions, VideoProcessor, VideoSize};
use crate::media::decode::Header;
use crate::media::medium::{self, Blame, MediaKind, Medium, MediumInfo};
use crate::media::picture::{FrameError, PictureError, PicturePreparer};
use crate::workers::{Workers, WorkersError};

/// Videos that are decoded at once, each in a process. What decoding holds beside files and pixels is bounded by this and
/// by the processes' own bound, so that no request reserves it.
const DECODING_AT_ONCE: usize = 4;
/// Videos that may wait to be decoded.
const WAITING_TO_DECODE: usize = 64;
/// Files whose headers are read at once.
const READING_AT_ONCE: usize = 4;
/// Files that may wait for that.
const WAITING_TO_READ: usize = 256;
/// Frames of one video, given one by one, that are decoded at once.
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
    /// No process could be started, or spoken to.
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
            Self::Workers(WorkersError::Overloaded { .. }) => Blame::Load(self.to_string()),
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
            DecodeError::Process(error) => error.into(),
        }
    }
}

impl From<FrameError> for PrepareError {
    fn from(FrameError { index, error }: FrameError) -> Self {
        match (index, error) {
            (_, PictureError::Workers(error @ WorkersError::Overloaded { .. }))
            | (None, PictureError::Workers(error)) => error.into(),
            (index, error) => Self::Frame { index: index.unwrap_or(0), problem: error.to_string() },
        }
    }
}

/// Prepares videos, a bounded number at a time.
#[derive(Debug, Clone)]
pub struct VideoPreparer {
    rules: Arc<Rules>,
    decoder: VideoDecoder,
    max_time: Duration,
    readers: Workers,
    decoders: Workers,
}

#[derive(Debug)]
struct Rules {
    processor: VideoProcessor,
    sampler: Sampler,
    limits: VideoLimits,
    max_tokens: u64,
}

/// A video whose headers have been read and whose cost is known.
struct Plan {
    source: (u32, u32),
    sample: Sample,
    size: VideoSize,
}

impl Plan {
    fn info(&self) -> MediumInfo {
        let Self { source, sample, size } = self;
        MediumInfo {
            kind: MediaKind::Video,
            source: *source,
            size: (size.width, size.height),
            grid: size.grid,
            num_tokens: size.num_tokens,
            timestamps_s: sample.timestamps_s.clone(),
            seconds_per_grid_t: sample.seconds_per_grid_t,
        }
    }
}

impl VideoPreparer {
    /// A preparer for a checkpoint's processor. A video has at most `max_tokens` in the prompt, and its decoding may take
    /// `max_time`.
    pub fn new(
        processor: VideoProcessor,
        decoder: VideoDecoder,
        max_tokens: u64,
        max_time: Duration,
    ) -> Self {
        let sampler = Sampler { temporal_patch_size: processor.temporal_patch_size, ..Sampler::default() };
        let rules = Rules { processor, sampler, limits: decoder.limits, max_tokens };
        Self {
            rules: Arc::new(rules),
            decoder,
            max_time,
            readers: Workers::new("reading videos", READING_AT_ONCE, WAITING_TO_READ),
            decoders: Workers::new("decoding videos", DECODING_AT_ONCE, WAITING_TO_DECODE),
        }
    }

    /// Reads a file's headers, whatever shall be taken of it.
    pub async fn inspect(&self, file: Bytes) -> Result<(), PrepareError> {
        let rules = Arc::clone(&self.rules);
        let work = move || Video::open(file.to_vec(), &rules.limits).map(|_| ());
        Ok(self.readers.run(work).await??)
    }

    /// What a video would cost, from its headers, or from those of its frames.
    pub async fn measure(
        &self,
        pictures: &PicturePreparer,
        input: VideoInput,
    ) -> Result<MediumInfo, PrepareError> {
        Ok(match &input.source {
            VideoSource::File(file) => self.open(file.clone(), &input).await?.1.info(),
            VideoSource::Frames { files, times } => self.plan(pictures, files, times, &input).await?.info(),
        })
    }

    /// Measures, admits, decodes, resizes and hashes a video.
    pub async fn prepare(
        &self,
        pictures: &PicturePreparer,
        input: VideoInput,
    ) -> Result<Medium, PrepareError> {
        let (plan, pixels) = match &input.source {
            VideoSource::File(file) => {
                // Taken first: an opened video is a copy of its file.
                let _place = self.decoders.place().await?;
                let (video, plan) = self.open(file.clone(), &input).await?;
                let decoding = self.decoder.decode(&video, &plan.sample.indices, &plan.size);
                let pixels = tokio::time::timeout(self.max_time, decoding).await.map_err(|_| {
                    VideoError::Decoding(format!("decoding the video took longer than {:?}", self.max_time))
                })??;
                (plan, pixels)
            }
            VideoSource::Frames { files, times } => {
                let plan = self.plan(pictures, files, times, &input).await?;
                let pixels = decode_frames(pictures, files, &plan).await?;
                (plan, pixels)
            }
        };
        let info = plan.info();
        let (grid, seconds) = (info.grid, info.seconds_per_grid_t);
        let hashed =
            self.readers.run(move || (medium::hash(MediaKind::Video, grid, seconds, &pixels), pixels));
        let (hash, pixels) = hashed.await?;
        Ok(Medium { info, pixels: pixels.into(), hash })
    }

    async fn open(&self, file: Bytes, input: &VideoInput) -> Result<(Video, Plan), PrepareError> {
        let (rules, sampling, options) = (Arc::clone(&self.rules), input.sampling, input.options);
        let work = move || {
            let video = Video::open(file.to_vec(), &rules.limits)?;
            let header = video.header();
            let sample = rules.sampler.sample(&header.times, &sampling)?;
            let plan = rules.admit((header.width, header.height), sample, &options)?;
            Ok::<_, VideoError>((video, plan))
        };
        Ok(self.readers.run(work).await??)
    }

    /// What is taken of frames that are given one by one.
    async fn plan(
        &self,
        pictures: &PicturePreparer,
        files: &[Bytes],
        times: &FrameTimes,
        input: &VideoInput,
    ) -> Result<Plan, PrepareError> {
        let rules = &self.rules;
        let sample = rules.sampler.all(times).map_err(PrepareError::Frames)?;
        let headers = pictures.frame_headers(files.to_vec()).await?;
        let size = frame_size(&headers)?;
        rules.limits.check_decoded_pixels(size, headers.len()).map_err(PrepareError::Frames)?;
        rules.admit(size, sample, &input.options).map_err(PrepareError::Frames)
    }
}

impl Rules {
    fn admit(&self, source: (u32, u32), sample: Sample, options: &VideoOptions) -> Result<Plan, VideoError> {
        let frames = sample.indices.len();
        let size = self.processor.size(source.0, source.1, frames, options)?;
        if size.num_tokens > self.max_tokens {
            let VideoSize { width, height, num_tokens: tokens, .. } = size;
            return Err(VideoError::TooManyTokens { tokens, frames, width, height, max: self.max_tokens });
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
                let decoded = pictures.frame(file, size).await;
                decoded.map_err(|error| FrameError { index: Some(index), error })
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

//! Videos: from the bytes of a file to frames, with the time of each.
//!
//! The container is read first and tells how many frames there are, when each is shown and how large they are; only then
//! is a decoder asked for the frames that are taken. Decoding H.264 is C++ over a client's bytes: a server does it in a
//! child process only. What is not read here goes to ffmpeg, in a child process too, where the operator names one.

mod animation;
mod boxes;
mod child;
mod confine;
mod container;
mod edits;
mod error;
mod ffmpeg;
mod file;
#[cfg(test)]
mod golden_tests;
mod h264;
mod launch;
mod mp4;
#[cfg(test)]
mod mp4_writer;
mod prepare;
mod process;
mod sampling;
mod size;
mod sps;
mod yuv;

pub use child::decode_from_stdin;
pub use error::{VideoError, VideoLimits};
pub use ffmpeg::Ffmpeg;
pub use file::{Frame, Video, VideoHeader};
pub use launch::{ConfineArgs, confine_and_become};
pub use prepare::{PrepareError, TokenBounds, VideoInput, VideoPreparer, VideoSource};
pub use process::{DecodeError, VideoDecoder};
pub use sampling::{FrameTimes, Sample, Sampler, SamplingOptions};
pub use size::{VideoOptions, VideoProcessor, VideoSize};

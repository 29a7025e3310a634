//! What videos are admitted, and why one is not.

use serde::{Deserialize, Serialize};

use crate::limits::{MAX_DECODED_PIXELS, MAX_VIDEO_SECONDS};
use crate::media::{OptionFault, SizeError};

/// What videos are decoded. All of it is checked on what the container says, before a frame is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct VideoLimits {
    /// Frames in the file, taken or not.
    pub max_frames: usize,
    /// Seconds from the first frame to the end of the last.
    pub max_duration_s: f64,
    /// Pixels of one frame.
    pub max_frame_pixels: u64,
    /// Pixels of all frames of the file: what decoding them costs.
    pub max_decoded_pixels: u64,
}

impl Default for VideoLimits {
    /// Half an hour at 30 frames a second; frames of level 5.2, which is the largest that the H.264 decoder takes; and
    /// as many pixels as a whole request may have.
    fn default() -> Self {
        Self {
            max_frames: 54_000,
            max_duration_s: MAX_VIDEO_SECONDS,
            max_frame_pixels: 36_864 * 256,
            max_decoded_pixels: MAX_DECODED_PIXELS,
        }
    }
}

impl VideoLimits {
    /// Checks what a container says of its frames.
    pub(super) fn check(
        &self,
        (width, height): (u32, u32),
        num_frames: usize,
        duration_s: f64,
    ) -> Result<(), VideoError> {
        let pixels = u64::from(width) * u64::from(height);
        if pixels > self.max_frame_pixels {
            return Err(VideoError::FrameTooLarge { width, height, max: self.max_frame_pixels });
        }
        self.check_frames(num_frames)?;
        if duration_s > self.max_duration_s {
            return Err(VideoError::TooLong { seconds: duration_s, max: self.max_duration_s });
        }
        self.check_decoded_pixels((width, height), num_frames)
    }

    /// Checks what decoding all frames costs.
    pub(super) fn check_decoded_pixels(
        &self,
        (width, height): (u32, u32),
        num_frames: usize,
    ) -> Result<(), VideoError> {
        let pixels = (u64::from(width) * u64::from(height)).saturating_mul(num_frames as u64);
        if pixels > self.max_decoded_pixels {
            return Err(VideoError::TooManyPixels { pixels, max: self.max_decoded_pixels });
        }
        Ok(())
    }

    /// Checks how many frames there are.
    pub(super) fn check_frames(&self, num_frames: usize) -> Result<(), VideoError> {
        if num_frames > self.max_frames {
            return Err(VideoError::TooManyFrames { frames: num_frames as u64, max: self.max_frames as u64 });
        }
        Ok(())
    }
}

/// Why a video is not taken.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum VideoError {
    /// No bytes.
    #[error("the video is empty")]
    Empty,
    /// The file begins like no video.
    #[error("this is not a video: give MP4, GIF or animated WebP")]
    NotAVideo,
    /// A still picture.
    #[error("this is a picture that does not move: send it as an image")]
    NotAnimated,
    /// A codec that is not decoded.
    #[error("the video's codec, {0}, is not supported: give H.264, or its frames one by one")]
    UnsupportedCodec(String),
    /// A container that is not read.
    #[error(
        "the video's container, {0}, is not supported: give MP4, GIF or animated WebP, or its frames one by one"
    )]
    UnsupportedContainer(&'static str),
    /// A kind of H.264 or of MP4 that is not decoded.
    #[error("the video is {0}, which is not supported")]
    Unsupported(&'static str),
    /// What ffmpeg would take, on a server that has none.
    #[error("{0}; a server started with --ffmpeg takes it")]
    WithoutFfmpeg(Box<VideoError>),
    /// Sound only, or nothing.
    #[error("the file has no video track")]
    NoVideoTrack,
    /// A video track with nothing to show.
    #[error("the video has no frames")]
    NoFrames,
    /// More frames than are decoded, or than may be taken.
    #[error("the video has {frames} frames; at most {max}")]
    TooManyFrames {
        /// What it has.
        frames: u64,
        /// The bound.
        max: u64,
    },
    /// A longer video than is decoded.
    #[error("the video is {seconds:.1} seconds long; at most {max:.1}")]
    TooLong {
        /// Its length.
        seconds: f64,
        /// The bound.
        max: f64,
    },
    /// Larger frames than are decoded.
    #[error("the video's frames have {width} x {height} pixels; at most {max} in all")]
    FrameTooLarge {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// The bound, in pixels.
        max: u64,
    },
    /// More pixels in all frames together than are decoded.
    #[error("the video's frames have {pixels} pixels together; at most {max}")]
    TooManyPixels {
        /// Of all frames of the file.
        pixels: u64,
        /// The bound.
        max: u64,
    },
    /// The video would take more of the prompt than is admitted.
    #[error(
        "the video takes {tokens} tokens as {frames} frames of {width} x {height} pixels; at most {max}: {advice}"
    )]
    TooManyTokens {
        /// What it would take.
        tokens: u64,
        /// Frames that would be taken.
        frames: usize,
        /// Their width for the model.
        width: u32,
        /// Their height for the model.
        height: u32,
        /// The bound.
        max: u64,
        /// What would help.
        advice: &'static str,
    },
    /// A temporal patch of the video has more tokens than a picture may have.
    #[error(
        "each two frames take {tokens} tokens, of {width} x {height} pixels; at most {max}: lower max_pixels"
    )]
    TooManyTokensAtOnce {
        /// What they would take.
        tokens: u64,
        /// Their width for the model.
        width: u32,
        /// Their height for the model.
        height: u32,
        /// The bound.
        max: u64,
    },
    /// Options that are wrong, each with its field.
    #[error("{}", .0.iter().map(|fault| format!("{} {}", fault.field, fault.problem)).collect::<Vec<_>>().join("; "))]
    Options(Vec<OptionFault>),
    /// The frames have no size for the model.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The file is cut short or broken.
    #[error("the video cannot be decoded: {0}")]
    Malformed(String),
    /// What the process that decodes said, or how it ended.
    #[error("{0}")]
    Decoding(String),
}

impl VideoError {
    /// The fields of the public API's `Video` that are at fault, each with what is wrong. `source` is the field that the
    /// frames come from.
    pub fn faults(&self, source: &'static str) -> Vec<(&'static str, String)> {
        match self {
            Self::Options(faults) | Self::Size(SizeError::Options(faults)) => {
                faults.iter().map(|fault| (fault.field, fault.problem.clone())).collect()
            }
            other => vec![(source, other.to_string())],
        }
    }
}

/// A broken file.
pub(super) fn malformed(problem: impl Into<String>) -> VideoError {
    VideoError::Malformed(problem.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_at_their_edge() {
        let limits = VideoLimits {
            max_frames: 10,
            max_duration_s: 5.0,
            max_frame_pixels: 100,
            max_decoded_pixels: 800,
        };
        assert_eq!(limits.check((10, 10), 8, 5.0), Ok(()));
        let error = limits.check((11, 10), 8, 5.0).unwrap_err();
        assert_eq!(error, VideoError::FrameTooLarge { width: 11, height: 10, max: 100 });
        let error = limits.check((1, 1), 11, 5.0).unwrap_err();
        assert_eq!(error, VideoError::TooManyFrames { frames: 11, max: 10 });
        let error = limits.check((10, 10), 8, 5.1).unwrap_err();
        assert_eq!(error, VideoError::TooLong { seconds: 5.1, max: 5.0 });
        let error = limits.check((10, 10), 9, 5.0).unwrap_err();
        assert_eq!(error, VideoError::TooManyPixels { pixels: 900, max: 800 });
        assert!(limits.check((u32::MAX, u32::MAX), usize::MAX, 0.0).is_err());
    }

    #[test]
    fn faults_name_their_fields() {
        let faults = vec![OptionFault { field: "fps", problem: "is 0".into() }];
        assert_eq!(VideoError::Options(faults).faults("data"), [("fps", "is 0".to_owned())]);
        assert_eq!(VideoError::NoFrames.faults("data")[0].0, "data");
    }
}

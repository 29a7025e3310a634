//! The size at which the model sees the frames of a video, and what that costs.

use crate::media::size::{largest_within, smart_resize};
use crate::media::{OptionFault, PictureProcessor, SizeError};

/// Pixels on a side of a token of Qwen2.5-VL, squared.
const TOKEN_PIXELS: u64 = 28 * 28;

/// How a checkpoint's videos are sized.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoProcessor {
    /// A frame is enlarged to at least this many pixels.
    pub min_pixels: u64,
    /// A frame is reduced to at most this many pixels.
    pub max_pixels: u64,
    /// Pixels of all frames together, where the frames of one temporal patch count once, as they do in tokens.
    pub total_pixels: u64,
    /// Pixels on a side of a patch.
    pub patch_size: u32,
    /// Frames in a patch.
    pub temporal_patch_size: u32,
    /// Patches on a side of a token.
    pub merge_size: u32,
}

impl Default for VideoProcessor {
    /// The defaults of transformers' `Qwen2VLVideoProcessor` with `cap_pixels_per_frame`: 128 to 768 tokens a frame, and
    /// 90 per cent of 128,000 tokens a video.
    fn default() -> Self {
        Self {
            min_pixels: 128 * TOKEN_PIXELS,
            max_pixels: 768 * TOKEN_PIXELS,
            total_pixels: 128_000 * TOKEN_PIXELS / 10 * 9,
            patch_size: 14,
            temporal_patch_size: 2,
            merge_size: 2,
        }
    }
}

/// The size at which the model sees a video.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VideoSize {
    /// Of each frame, in pixels.
    pub width: u32,
    /// Of each frame, in pixels.
    pub height: u32,
    /// Patches in time, height and width.
    pub grid: [u32; 3],
    /// Tokens in the prompt.
    pub num_tokens: u64,
}

impl VideoSize {
    /// Bytes of the pixels of `num_frames` frames: red, green and blue.
    pub fn pixel_bytes(&self, num_frames: usize) -> u64 {
        (u64::from(self.width) * u64::from(self.height) * 3).saturating_mul(num_frames as u64)
    }
}

/// What a request says about the size of one video.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VideoOptions {
    /// Least pixels of a frame, in place of the processor's.
    pub min_pixels: Option<u32>,
    /// Most pixels of a frame, in place of the processor's.
    pub max_pixels: Option<u32>,
    /// Most pixels of all frames, in place of the processor's and counted as there.
    pub total_pixels: Option<u64>,
}

impl VideoOptions {
    /// Everything that is wrong with the options, whatever the video is.
    pub fn faults(&self) -> Vec<OptionFault> {
        let values = [
            ("min_pixels", self.min_pixels.map(u64::from)),
            ("max_pixels", self.max_pixels.map(u64::from)),
            ("total_pixels", self.total_pixels),
        ];
        let zero = values.into_iter().filter(|(_, value)| *value == Some(0));
        let mut faults: Vec<_> =
            zero.map(|(field, _)| OptionFault { field, problem: "is 0; at least 1".into() }).collect();
        if let (Some(min), Some(max)) = (self.min_pixels, self.max_pixels)
            && min > max
        {
            let problem = format!("is {min}, above max_pixels, which is {max}");
            faults.push(OptionFault { field: "min_pixels", problem });
        }
        faults
    }
}

impl VideoProcessor {
    /// The processor of a checkpoint whose pictures are sized by `picture`. Its bounds are those of pictures only: files
    /// for videos are in no released checkpoint.
    pub fn of(picture: &PictureProcessor) -> Self {
        let PictureProcessor { patch_size, temporal_patch_size, merge_size, .. } = *picture;
        Self { patch_size, temporal_patch_size, merge_size, ..Self::default() }
    }

    /// The same, with no more pixels of all frames together than have `max_tokens` tokens.
    pub fn of_at_most(self, max_tokens: u64) -> Self {
        let pixels = u64::from(self.factor()).pow(2).saturating_mul(max_tokens);
        Self { total_pixels: self.total_pixels.min(pixels), ..self }
    }

    /// Pixels on a side of a token.
    pub fn factor(&self) -> u32 {
        self.patch_size * self.merge_size
    }

    /// The size at which the model sees `num_frames` frames of `width` x `height` pixels, none of them 0.
    ///
    /// # Errors
    /// Wrong options, or frames of which one side is too much longer than the other.
    pub fn size(
        &self,
        width: u32,
        height: u32,
        num_frames: usize,
        options: &VideoOptions,
    ) -> Result<VideoSize, SizeError> {
        let faults = options.faults();
        if !faults.is_empty() {
            return Err(SizeError::Options(faults));
        }
        let (min_pixels, max_pixels) = self.pixel_bounds(num_frames, options);
        let mut sides = smart_resize(height, width, self.factor(), min_pixels, max_pixels)
            .ok_or(SizeError::AspectRatio { width, height })?;
        // Enlarging rounds up; where nothing was asked for, a frame keeps to its share all the same.
        let share = self.share(num_frames);
        let is_own = options.min_pixels.is_none() && options.total_pixels.is_none();
        if is_own && sides.0 * sides.1 > share {
            sides = largest_within(height, width, self.factor(), share);
        }
        let (height, width) = sides;
        let num_grid_t = (num_frames as u64).div_ceil(self.temporal_patch_size.into());
        let side = |pixels: u64| u32::try_from(pixels).ok();
        let (Some(width), Some(height), Some(num_grid_t)) = (side(width), side(height), side(num_grid_t))
        else {
            return Err(SizeError::Enormous { width, height });
        };
        let factor = self.factor();
        let frame_tokens = u64::from(width / factor) * u64::from(height / factor);
        Ok(VideoSize {
            width,
            height,
            grid: [num_grid_t, height / self.patch_size, width / self.patch_size],
            num_tokens: frame_tokens.saturating_mul(num_grid_t.into()),
        })
    }

    /// The bounds of a frame's pixels, as `cap_pixels_per_frame` of transformers 5.23 has them: no frame takes more than
    /// its share of the total, but 1.05 times the least is always allowed.
    ///
    /// With the reference's total no video has so many frames that the least is more than their share of it; with a smaller
    /// one ([`Self::of_at_most`]) the least gives way, unless it is asked for.
    ///
    /// There the allowance goes above a `max_pixels` that is nearly `min_pixels`; here, as in `qwen_vl_utils`, it does not.
    fn pixel_bounds(&self, num_frames: usize, options: &VideoOptions) -> (u64, u64) {
        let (min, max) = match (options.min_pixels.map(u64::from), options.max_pixels.map(u64::from)) {
            (None, None) => (self.min_pixels, self.max_pixels),
            // As for pictures, a bound that is asked for moves the processor's own other bound out of its way.
            (Some(min), None) => (min, self.max_pixels.max(min)),
            (None, Some(max)) => (self.min_pixels.min(max), max),
            (Some(min), Some(max)) => (min, max),
        };
        let share = options
            .total_pixels
            .map_or_else(|| self.share(num_frames), |total| self.share_of(total, num_frames));
        let allowance = (min as f64 * 1.05) as u64;
        if options.min_pixels.is_some() {
            return (min, max.min(share.max(allowance)));
        }
        // The processor's own least gives way to the processor's own total: a long video is reduced, not refused.
        let most = self.share(num_frames).max(1);
        (min.min(most), max.min(share.max(allowance.min(most))))
    }

    /// A frame's share of the processor's own total of pixels.
    fn share(&self, num_frames: usize) -> u64 {
        self.share_of(self.total_pixels, num_frames)
    }

    fn share_of(&self, total: u64, num_frames: usize) -> u64 {
        total.saturating_mul(self.temporal_patch_size.into()) / num_frames.max(1) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(width: u32, height: u32, num_frames: usize, options: VideoOptions) -> VideoSize {
        VideoProcessor::default().size(width, height, num_frames, &options).unwrap()
    }

    #[test]
    fn defaults_are_the_references() {
        let processor = VideoProcessor::default();
        assert_eq!(processor.min_pixels, 100_352);
        assert_eq!(processor.max_pixels, 602_112);
        assert_eq!(processor.total_pixels, 90_316_800);
    }

    /// Computed with `smart_resize` and the bounds of `cap_pixels_per_frame` by hand.
    #[test]
    fn sizes_are_the_references() {
        for (source, frames, grid) in [
            // 1920 x 1080 has 2,645 tokens: reduced to 36 x 20.
            ((1920, 1080), 20, [10, 40, 72]),
            // 640 x 360 has 23 x 13 tokens as it is.
            ((640, 360), 20, [10, 26, 46]),
            // 70 x 42 is enlarged to 128 tokens: 15 x 9.
            ((70, 42), 4, [2, 18, 30]),
            // 768 frames leave 300 tokens each, of which 23 x 12 fit.
            ((1920, 1080), 768, [384, 24, 46]),
        ] {
            let size = size(source.0, source.1, frames, VideoOptions::default());
            assert_eq!(size.grid, grid, "{source:?}");
            assert_eq!((size.width, size.height), (grid[2] * 14, grid[1] * 14));
            let tokens = u64::from(grid[0]) * u64::from(grid[1] / 2) * u64::from(grid[2] / 2);
            assert_eq!(size.num_tokens, tokens);
        }
    }

    #[test]
    fn rounds_half_to_even() {
        // 70 / 28 and 98 / 28 are 2.5 and 3.5.
        let options = VideoOptions { min_pixels: Some(1), ..Default::default() };
        let size = size(98, 70, 4, options);
        assert_eq!((size.width, size.height), (112, 56));
    }

    #[test]
    fn the_total_is_shared_by_the_frames() {
        let options =
            VideoOptions { min_pixels: Some(784), total_pixels: Some(100 * 784), ..Default::default() };
        for num_frames in [2, 4, 10, 50, 100] {
            let size = size(1280, 720, num_frames, options);
            assert!(size.num_tokens <= 100, "{num_frames}: {size:?}");
            assert!(size.num_tokens > 40, "{num_frames}: {size:?}");
        }
        // Each frame keeps its least, whatever the total.
        let size = size(1280, 720, 768, VideoOptions { min_pixels: None, ..options });
        assert!(size.num_tokens >= 384 * 100, "{size:?}");
    }

    /// What the server admits at most is what a video has at most, unless a request asks for more.
    #[test]
    fn long_videos_are_reduced_to_what_is_admitted() {
        let processor = VideoProcessor::default().of_at_most(16_384);
        let size = |num_frames, options| processor.size(1920, 1080, num_frames, &options).unwrap();
        for (width, height) in [(1920, 1080), (64, 48), (6, 4)] {
            for num_frames in [2, 40, 128, 256, 258, 600, 768] {
                let size = processor.size(width, height, num_frames, &VideoOptions::default()).unwrap();
                assert!(size.num_tokens <= 16_384, "{num_frames}: {size:?}");
                assert!(num_frames < 256 || size.num_tokens > 10_000, "{num_frames}: {size:?}");
            }
        }
        let asked = VideoOptions { min_pixels: Some(128 * 784), ..Default::default() };
        assert!(size(768, asked).num_tokens > 16_384);
        let asked = VideoOptions { total_pixels: Some(1 << 40), ..Default::default() };
        assert!(size(768, asked).num_tokens > 16_384);
        let generous = VideoProcessor::default().of_at_most(u64::MAX);
        assert_eq!(generous, VideoProcessor::default());
    }

    #[test]
    fn one_bound_moves_the_default_of_the_other() {
        let small = size(1000, 1000, 4, VideoOptions { max_pixels: Some(784), ..Default::default() });
        assert_eq!(small.num_tokens, 2);
        let large = size(10, 10, 4, VideoOptions { min_pixels: Some(2_000_000), ..Default::default() });
        assert!(u64::from(large.width) * u64::from(large.height) >= 2_000_000);
    }

    #[test]
    fn reports_all_option_faults_at_once() {
        let fields =
            |options: VideoOptions| options.faults().iter().map(|fault| fault.field).collect::<Vec<_>>();
        let zeros = VideoOptions { min_pixels: Some(0), max_pixels: Some(0), total_pixels: Some(0) };
        assert_eq!(fields(zeros), ["min_pixels", "max_pixels", "total_pixels"]);
        let crossed = VideoOptions { min_pixels: Some(9), max_pixels: Some(8), total_pixels: None };
        assert_eq!(fields(crossed), ["min_pixels"]);
        let error = VideoProcessor::default().size(9, 9, 4, &crossed).unwrap_err();
        assert!(matches!(error, SizeError::Options(_)));
    }

    #[test]
    fn never_overflows() {
        for (width, height) in [(1, 1), (u32::MAX, u32::MAX), (u32::MAX, u32::MAX / 200 + 1), (1, 200)] {
            for num_frames in [1, 2, 768, 1 << 31] {
                for pixels in [1, u32::MAX] {
                    let options = VideoOptions {
                        min_pixels: Some(pixels),
                        max_pixels: Some(pixels),
                        total_pixels: Some(u64::from(pixels).pow(2)),
                    };
                    let size = size(width, height, num_frames, options);
                    assert!(size.num_tokens > 0 && size.pixel_bytes(num_frames) > 0);
                }
            }
        }
        assert!(VideoProcessor::default().size(1, 201, 2, &VideoOptions::default()).is_err());
    }
}

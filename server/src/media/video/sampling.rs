//! Which frames of a video the model sees, and what time each stands for.
//!
//! # What is taken
//!
//! Of a video of `T` frames that lasts `d` seconds, sampled at `fps` (2 unless the request says otherwise),
//!
//! - `n = d * fps`, raised to 4, lowered to `max_frames` (768) and to `T`, and cut to an even number;
//! - the frames `linspace(0, T - 1, n).round()`: the first, the last, and evenly between them;
//! - `seconds_per_grid_t = temporal_patch_size * d / n`, never cut to an integer.
//!
//! | the video, 10 s | fps asked | n | seconds_per_grid_t |
//! |---|---|---|---|
//! | 1 a second, 10 frames | 2 | 10 (no more than there are) | 2 |
//! | 1.5 a second, 15 frames | 2 | 14 (an even number) | 1.428... |
//! | 2 a second, 20 frames | 2 | 20, all of them | 1 |
//! | 4 a second, 40 frames | 2 | 20 | 1 |
//! | 25 a second, 250 frames | 2 | 20 | 1 |
//! | 29.97 a second, 300 frames (10.01 s) | 2 | 20 | 1.001 |
//! | 29.97 a second, 300 frames | 1 | 10 | 2.002 |
//! | 29.97 a second, 300 frames | 1.5 | 14 | 1.43 |
//! | 29.97 a second, 300 frames | 4 | 40 | 0.5005 |
//! | 29.97 a second, 300 frames | 25 | 250 | 0.08008 |
//! | 29.97 a second, 300 frames | 29.97 | 298 (299.9997 is cut) | 0.0671... |
//!
//! # Where it comes from
//!
//! The count and the indices are those of Qwen's own `qwen_vl_utils` (`vision_process.py`: `smart_nframes`, then
//! `torch.linspace(0, total_frames - 1, nframes).round()`). `sample_frames` of transformers 5.23
//! (`models/qwen2_vl/video_processing_qwen2_vl.py`) counts alike but takes `arange(0, T, T / n).int()`, which never
//! takes the last frame. `seconds_per_grid_t` is `temporal_patch_size / sampled_fps` with `sampled_fps = n / T * fps` in
//! both (`models/qwen2_5_vl/processing_qwen2_5_vl.py`).
//!
//! Differences from `qwen_vl_utils`, all of them meant:
//!
//! - The indices are computed with integers. `n - 1` is odd, so that no index lies half way between two frames and the
//!   way of rounding does not matter; torch computes in single precision, which can be a frame off in videos of more
//!   than ten thousand frames.
//! - A video of one frame is taken, twice; the utility refuses it.
//! - `max_frames` above 768 is refused.
//! - Positions in time are `t * seconds_per_grid_t`: they claim that frames are evenly spaced. Of a video whose rate
//!   varies, frames evenly spaced by index are not; there the frames that are on show at the seconds `i * d / n` are taken
//!   instead. A video counts as one of constant rate while no frame is half a frame off, and the last is not shown for
//!   more than two.

use super::error::VideoError;
use crate::limits::{MAX_FPS, MAX_FRAMES, MAX_VIDEO_SECONDS};
use crate::media::OptionFault;

/// The least frames that are taken of a video that has them.
const MIN_FRAMES: u32 = 4;
/// Frames are counted in pairs, as the model's patches take them.
const FRAME_FACTOR: usize = 2;
/// Frames per second that are taken when the request does not say.
const FPS: f64 = 2.0;
/// How long the one frame of a video is shown that does not say.
const STILL_SECONDS: f64 = 1.0 / FPS;

/// When each frame of a video is shown.
#[derive(Debug, Clone, PartialEq)]
pub struct FrameTimes {
    times_s: Vec<f64>,
    duration_s: f64,
}

impl FrameTimes {
    /// Frames shown at these seconds, in order; the last one is shown until `end_s`.
    ///
    /// # Errors
    /// No frames, or times that are not finite or not in order.
    pub fn new(times_s: Vec<f64>, end_s: f64) -> Result<Self, VideoError> {
        let (Some(first), Some(last)) = (times_s.first(), times_s.last()) else {
            return Err(VideoError::NoFrames);
        };
        let finite = end_s.is_finite() && times_s.iter().all(|time| time.is_finite());
        if !finite || *last > end_s || times_s.windows(2).any(|pair| pair[0] > pair[1]) {
            return Err(VideoError::Malformed("the times of its frames are not in order".into()));
        }
        Ok(Self { duration_s: end_s - first, times_s })
    }

    /// `num_frames` frames at `rate` frames per second.
    ///
    /// # Errors
    /// No frames, or a rate that is none.
    pub fn at_rate(num_frames: usize, rate: f64) -> Result<Self, VideoError> {
        if !(rate.is_finite() && rate > 0.0 && (1.0 / rate).is_finite()) {
            return Err(VideoError::Malformed(format!("{rate} frames per second")));
        }
        Self::new((0..num_frames).map(|frame| frame as f64 / rate).collect(), num_frames as f64 / rate)
    }

    /// Frames shown at these seconds, in order; the last one is shown as long as the others are on average.
    ///
    /// # Errors
    /// No frames, or times that are not finite or not in order.
    pub fn at_times(times_s: Vec<f64>) -> Result<Self, VideoError> {
        let (Some(first), Some(last)) = (times_s.first(), times_s.last()) else {
            return Err(VideoError::NoFrames);
        };
        let gaps = times_s.len() - 1;
        let gap = if gaps == 0 { STILL_SECONDS } else { (last - first) / gaps as f64 };
        let end_s = last + gap;
        Self::new(times_s, end_s)
    }

    /// How many frames there are; at least 1.
    pub fn num_frames(&self) -> usize {
        self.times_s.len()
    }

    /// The second at which each frame is shown.
    pub fn times_s(&self) -> &[f64] {
        &self.times_s
    }

    /// Seconds from the first frame to the end of the last.
    pub fn duration_s(&self) -> f64 {
        self.duration_s
    }

    /// Whether every frame is where frames of one rate would be, within half a frame, and the last one is not held.
    fn is_constant_rate(&self) -> bool {
        let (first, gaps) = (self.times_s[0], self.times_s.len() - 1);
        if gaps == 0 {
            return true;
        }
        let length = self.times_s[gaps] - first;
        let gap = length / gaps as f64;
        let even = |index: usize| first + gap * index as f64;
        let is_held = self.duration_s - length > 2.0 * gap;
        !is_held
            && self.times_s.iter().enumerate().all(|(index, time)| (time - even(index)).abs() <= gap / 2.0)
    }

    /// The frame that is on show at a second: the last one whose time has come.
    fn on_show(&self, second: f64) -> usize {
        self.times_s.partition_point(|time| *time <= second).saturating_sub(1)
    }
}

/// What a request says about the frames that are taken.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SamplingOptions {
    /// Frames to take per second of video.
    pub fps: Option<f64>,
    /// The most frames to take.
    pub max_frames: Option<u32>,
}

impl SamplingOptions {
    /// Everything that is wrong with the options, whatever the video is.
    pub fn faults(&self) -> Vec<OptionFault> {
        let mut faults = Vec::new();
        let least = 1.0 / MAX_VIDEO_SECONDS;
        // Not a number is in no range.
        if let Some(fps) = self.fps.filter(|fps| !(least..=MAX_FPS).contains(fps)) {
            let problem = format!("is {fps}; at least {least:.5}, at most {MAX_FPS}");
            faults.push(OptionFault { field: "fps", problem });
        }
        if let Some(max) = self.max_frames.filter(|max| !(2..=MAX_FRAMES).contains(max)) {
            let problem = format!("is {max}; at least 2, at most {MAX_FRAMES}");
            faults.push(OptionFault { field: "max_frames", problem });
        }
        faults
    }
}

/// The frames that are taken of a video.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Which frames, in order, an even number of them; a frame may be taken more than once.
    pub indices: Vec<usize>,
    /// The second at which each of these frames is shown.
    pub timestamps_s: Vec<f64>,
    /// Seconds between two temporal patches.
    pub seconds_per_grid_t: f64,
}

/// Takes frames as a model wants them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Frames per second, where a request does not say.
    pub fps: f64,
    /// Frames in a temporal patch; even or 1.
    pub temporal_patch_size: u32,
}

impl Default for Sampler {
    /// As Qwen2.5-VL has it.
    fn default() -> Self {
        Self { fps: FPS, temporal_patch_size: 2 }
    }
}

impl Sampler {
    /// Takes frames of a video.
    ///
    /// # Errors
    /// Wrong options, or several frames that all are shown at one time.
    pub fn sample(&self, times: &FrameTimes, options: &SamplingOptions) -> Result<Sample, VideoError> {
        let faults = options.faults();
        if !faults.is_empty() {
            return Err(VideoError::Options(faults));
        }
        let total = times.num_frames();
        if total > 1 && times.duration_s <= 0.0 {
            return Err(VideoError::Malformed("all its frames are shown at the same time".into()));
        }
        let fps = options.fps.unwrap_or(self.fps);
        let n = num_frames(total, times.duration_s * fps, options.max_frames.unwrap_or(MAX_FRAMES) as usize);
        let indices = if times.is_constant_rate() { evenly(total, n) } else { evenly_in_time(times, n) };
        // Never from `fps`: what a client asks for is no time of the video.
        let frame_s = if times.duration_s > 0.0 { times.duration_s / n as f64 } else { STILL_SECONDS };
        Ok(self.take(times, indices, frame_s))
    }

    /// Takes all frames as they are, the last one twice if they are odd in number: frames that a request gives one by one
    /// are sampled already.
    ///
    /// # Errors
    /// More frames than a video may have, or several that all are shown at one time.
    pub fn all(&self, times: &FrameTimes) -> Result<Sample, VideoError> {
        let total = times.num_frames();
        if total > MAX_FRAMES as usize {
            return Err(VideoError::TooManyFrames { frames: total as u64, max: MAX_FRAMES.into() });
        }
        if times.duration_s <= 0.0 {
            return Err(VideoError::Malformed("all its frames are shown at the same time".into()));
        }
        let indices = (0..total.next_multiple_of(FRAME_FACTOR)).map(|frame| frame.min(total - 1)).collect();
        Ok(self.take(times, indices, times.duration_s / total as f64))
    }

    /// `frame_s` is the time from one frame to the next.
    fn take(&self, times: &FrameTimes, indices: Vec<usize>, frame_s: f64) -> Sample {
        let timestamps_s = indices.iter().map(|index| times.times_s[*index]).collect();
        Sample { indices, timestamps_s, seconds_per_grid_t: f64::from(self.temporal_patch_size) * frame_s }
    }
}

/// How many frames are taken of `total`, where `wanted` would be: an even number, at least 2.
fn num_frames(total: usize, wanted: f64, max_frames: usize) -> usize {
    let even = |frames: usize| frames - frames % FRAME_FACTOR;
    let most = even(max_frames.min(total));
    // A number beyond the range of integers becomes the largest one.
    even((wanted.max(MIN_FRAMES.into()) as usize).min(most)).max(FRAME_FACTOR)
}

/// `linspace(0, total - 1, n).round()` for an even `n`: none of these numbers is half way between two integers.
fn evenly(total: usize, n: usize) -> Vec<usize> {
    let (last, gaps) = (total - 1, n - 1);
    (0..n).map(|i| (2 * i * last + gaps) / (2 * gaps)).collect()
}

/// The frames on show at the seconds that the model takes `n` frames to stand at.
fn evenly_in_time(times: &FrameTimes, n: usize) -> Vec<usize> {
    let second = |i: usize| times.times_s[0] + times.duration_s * (i as f64 / n as f64);
    (0..n).map(|i| times.on_show(second(i))).collect()
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const NTSC: f64 = 30_000.0 / 1001.0;

    fn sample(num_frames: usize, rate: f64, fps: Option<f64>) -> Sample {
        let times = FrameTimes::at_rate(num_frames, rate).unwrap();
        Sampler::default().sample(&times, &SamplingOptions { fps, max_frames: None }).unwrap()
    }

    fn assert_near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    }

    /// The table above. The numbers are those of `smart_nframes` and `sampled_fps`, computed by hand.
    #[test]
    fn takes_as_many_frames_as_the_reference() {
        for (frames, rate, fps, n, seconds) in [
            (10, 1.0, None, 10, 2.0),
            (15, 1.5, None, 14, 20.0 / 14.0),
            (20, 2.0, None, 20, 1.0),
            (40, 4.0, None, 20, 1.0),
            (250, 25.0, None, 20, 1.0),
            (300, NTSC, None, 20, 1.001),
            (300, NTSC, Some(1.0), 10, 2.002),
            (300, NTSC, Some(1.5), 14, 1.43),
            (300, NTSC, Some(4.0), 40, 0.5005),
            (300, NTSC, Some(25.0), 250, 0.08008),
            (300, NTSC, Some(29.97), 298, 20.02 / 298.0),
            (300, NTSC, Some(1000.0), 300, 20.02 / 300.0),
            (3, 25.0, None, 2, 0.12),
            (5, 25.0, None, 4, 0.1),
            (25 * 3600, 25.0, None, 768, 7200.0 / 768.0),
        ] {
            let sample = sample(frames, rate, fps);
            assert_eq!(sample.indices.len(), n, "{frames} frames at {rate}, {fps:?}");
            assert_near(sample.seconds_per_grid_t, seconds);
            assert_eq!((sample.indices[0], sample.indices[n - 1]), (0, frames - 1));
        }
    }

    /// `torch.linspace(0, T - 1, n).round()` worked out by hand.
    #[test]
    fn takes_the_frames_of_the_reference() {
        assert_eq!(evenly(10, 10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(evenly(15, 14), [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(
            evenly(40, 20),
            [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 21, 23, 25, 27, 29, 31, 33, 35, 37, 39]
        );
        assert_eq!(evenly(250, 4), [0, 83, 166, 249]);
        assert_eq!(evenly(3, 2), [0, 2]);
        assert_eq!(evenly(1, 2), [0, 0]);
    }

    #[test]
    fn timestamps_are_those_of_the_frames() {
        let sample = sample(250, 25.0, Some(0.4));
        assert_eq!(sample.indices, [0, 83, 166, 249]);
        assert_eq!(sample.timestamps_s, [0.0, 83.0 / 25.0, 166.0 / 25.0, 249.0 / 25.0]);
        assert_near(sample.seconds_per_grid_t, 5.0);
    }

    #[test]
    fn one_frame_is_taken_twice() {
        let sample = sample(1, 25.0, None);
        assert_eq!(sample.indices, [0, 0]);
        assert_eq!(sample.timestamps_s, [0.0, 0.0]);
        assert!(sample.seconds_per_grid_t > 0.0);
    }

    /// Nothing that a request asks for makes a time of it.
    #[test]
    fn a_still_of_no_duration_has_one() {
        let still = FrameTimes::new(vec![3.0], 3.0).unwrap();
        for fps in [None, Some(1.0 / MAX_VIDEO_SECONDS), Some(0.5), Some(MAX_FPS)] {
            let options = SamplingOptions { fps, max_frames: None };
            let sample = Sampler::default().sample(&still, &options).unwrap();
            assert_eq!(sample.seconds_per_grid_t, 1.0);
        }
        let options = SamplingOptions { fps: Some(1e-320), max_frames: None };
        let refused = Sampler::default().sample(&still, &options).unwrap_err();
        assert_eq!(refused.faults("data")[0].0, "fps");
    }

    #[test]
    fn max_frames_is_cut_to_an_even_number() {
        let times = FrameTimes::at_rate(100, 10.0).unwrap();
        for (max_frames, n) in [(2, 2), (3, 2), (7, 6), (768, 20)] {
            let options = SamplingOptions { fps: None, max_frames: Some(max_frames) };
            assert_eq!(Sampler::default().sample(&times, &options).unwrap().indices.len(), n);
        }
    }

    #[test]
    fn reports_all_option_faults_at_once() {
        let fields = |fps, max_frames| {
            let faults = SamplingOptions { fps, max_frames }.faults();
            faults.iter().map(|fault| fault.field).collect::<Vec<_>>()
        };
        assert_eq!(fields(Some(f64::NAN), Some(0)), ["fps", "max_frames"]);
        assert_eq!(fields(Some(-1.0), Some(769)), ["fps", "max_frames"]);
        assert_eq!(fields(Some(0.0), Some(1)), ["fps", "max_frames"]);
        assert_eq!(fields(Some(f64::INFINITY), None), ["fps"]);
        for fps in [1e-320, 6.9e-5, 1.001e6, 1e300] {
            assert_eq!(fields(Some(fps), None), ["fps"], "{fps}");
        }
        assert!(fields(Some(1.0 / MAX_VIDEO_SECONDS), Some(2)).is_empty());
        assert!(fields(Some(MAX_FPS), Some(768)).is_empty());
    }

    /// A second of 25 frames, nine of one frame.
    #[test]
    fn a_variable_rate_is_sampled_in_time() {
        let times: Vec<f64> = (0..25).map(|frame| f64::from(frame) / 25.0).chain([10.0]).collect();
        let times = FrameTimes::at_times(times).unwrap();
        assert!(!times.is_constant_rate());
        let sample = Sampler::default().sample(&times, &SamplingOptions::default()).unwrap();
        assert_eq!(sample.indices.len(), 20);
        assert_eq!(sample.indices[..3], [0, 13, 24]);
        // At 9.88 s the last frame is not there yet.
        assert_eq!(sample.indices[18..], [24, 24]);
        assert_eq!(sample.timestamps_s[1], 13.0 / 25.0);
    }

    /// Twenty frames in a second, the last of which stays for five: most of what is taken is that one.
    #[test]
    fn a_last_frame_that_is_held_is_seen_for_as_long() {
        let moving: Vec<f64> = (0..20).map(|frame| f64::from(frame) / 20.0).collect();
        let held = FrameTimes::new(moving.clone(), 6.0).unwrap();
        let sample = Sampler::default().sample(&held, &SamplingOptions::default()).unwrap();
        assert_eq!(sample.indices, [0, 10, 19, 19, 19, 19, 19, 19, 19, 19, 19, 19]);
        assert_near(sample.seconds_per_grid_t, 1.0);
        assert!(FrameTimes::new(moving, 1.04).unwrap().is_constant_rate());
    }

    /// Times in whole milliseconds are off by less than half a frame: the frames are those of the exact times.
    #[test]
    fn rounded_times_are_a_constant_rate() {
        let exact = FrameTimes::at_rate(300, NTSC).unwrap();
        let rounded = exact.times_s().iter().map(|time| (time * 1000.0).round() / 1000.0).collect();
        let rounded = FrameTimes::new(rounded, exact.duration_s()).unwrap();
        assert!(exact.is_constant_rate() && rounded.is_constant_rate());
        let taken = |times| Sampler::default().sample(times, &SamplingOptions::default()).unwrap().indices;
        assert_eq!(taken(&exact), taken(&rounded));
    }

    #[test]
    fn given_frames_are_taken_as_they_are() {
        let times = FrameTimes::at_rate(5, 4.0).unwrap();
        let sample = Sampler::default().all(&times).unwrap();
        assert_eq!(sample.indices, [0, 1, 2, 3, 4, 4]);
        assert_eq!(sample.timestamps_s, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]);
        assert_near(sample.seconds_per_grid_t, 0.5);
        let times = FrameTimes::at_times(vec![3.0, 3.5, 4.0]).unwrap();
        let sample = Sampler::default().all(&times).unwrap();
        assert_eq!(sample.timestamps_s, [3.0, 3.5, 4.0, 4.0]);
        assert_near(sample.seconds_per_grid_t, 1.0);
        let many = FrameTimes::at_rate(769, 4.0).unwrap();
        assert!(matches!(Sampler::default().all(&many), Err(VideoError::TooManyFrames { .. })));
    }

    #[test]
    fn refuses_times_that_are_none() {
        for (times, end) in [
            (vec![0.0, f64::NAN], 1.0),
            (vec![0.0, f64::INFINITY], 1.0),
            (vec![1.0, 0.5], 2.0),
            (vec![0.0, 1.0], 0.5),
            (vec![0.0], f64::NAN),
        ] {
            assert!(FrameTimes::new(times.clone(), end).is_err(), "{times:?} {end}");
        }
        assert_eq!(FrameTimes::new(Vec::new(), 1.0), Err(VideoError::NoFrames));
        assert_eq!(FrameTimes::at_times(Vec::new()), Err(VideoError::NoFrames));
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-310] {
            assert!(FrameTimes::at_rate(3, rate).is_err(), "{rate}");
        }
        let at_once = FrameTimes::new(vec![1.0; 3], 1.0).unwrap();
        assert!(Sampler::default().sample(&at_once, &SamplingOptions::default()).is_err());
        assert!(Sampler::default().all(&at_once).is_err());
    }

    /// Whatever the video: an even number of frames, in order, within the bounds, never more than asked for.
    #[test]
    fn samples_of_random_videos_are_within_their_bounds() {
        let mut rng = StdRng::seed_from_u64(3);
        for _ in 0..2000 {
            let total = rng.random_range(1..2000);
            let mut times: Vec<f64> = (0..total).map(|_| rng.random_range(0.0..100.0)).collect();
            times.sort_by(f64::total_cmp);
            let times = FrameTimes::at_times(times).unwrap();
            let max_frames = rng.random_range(2..=MAX_FRAMES);
            let options = SamplingOptions {
                fps: Some(10_f64.powf(rng.random_range(-3.0..4.0))),
                max_frames: Some(max_frames),
            };
            let sample = Sampler::default().sample(&times, &options).unwrap();
            let n = sample.indices.len();
            assert!(n % 2 == 0 && n >= 2 && n <= max_frames as usize && n <= total.max(2));
            assert!(sample.indices.is_sorted() && sample.indices[n - 1] < total);
            assert_eq!(sample.timestamps_s.len(), n);
            assert!(sample.seconds_per_grid_t > 0.0 && sample.seconds_per_grid_t.is_finite());
        }
    }
}

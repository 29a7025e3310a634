//! Videos: their files or frames, and what is to be taken of them.

use lockstep_proto::v1;
use lockstep_proto::v1::video::Source;

use super::Finder;
use crate::api::fault::Faults;
use crate::limits::{MAX_FRAMES, MAX_VIDEO_SECONDS};
use crate::media::MediaKind;
use crate::media::video::{FrameTimes, SamplingOptions, VideoInput, VideoOptions, VideoSource};

/// Turns a video into its domain form. `field` is its own.
pub(super) fn video(
    field: &str,
    proto: v1::Video,
    finder: &Finder<'_>,
    faults: &mut Faults,
) -> Option<VideoInput> {
    let sampling = SamplingOptions { fps: proto.fps, max_frames: proto.max_frames };
    let options = VideoOptions {
        min_pixels: proto.min_pixels,
        max_pixels: proto.max_pixels,
        total_pixels: proto.total_pixels,
    };
    for fault in sampling.faults().into_iter().chain(options.faults()) {
        faults.invalid(format!("{field}.{}", fault.field), fault.problem);
    }
    let source = match proto.source {
        Some(Source::Data(data)) if data.is_empty() => {
            faults.invalid(format!("{field}.data"), "is empty");
            None
        }
        Some(Source::Data(data)) => Some(VideoSource::File(data)),
        Some(Source::MediaId(id)) => {
            let file = finder.find(MediaKind::Video, &id, format!("{field}.media_id"), faults);
            file.map(VideoSource::File)
        }
        Some(Source::Frames(proto)) => {
            for (option, is_set) in
                [("fps", sampling.fps.is_some()), ("max_frames", sampling.max_frames.is_some())]
            {
                if is_set {
                    faults.invalid(
                        format!("{field}.{option}"),
                        "frames that are given one by one are taken as they are",
                    );
                }
            }
            frames(&format!("{field}.frames"), proto, faults)
        }
        None => {
            faults.invalid(field, "must have data, a media_id or frames");
            None
        }
    };
    source.map(|source| VideoInput { source, sampling, options })
}

fn frames(field: &str, proto: v1::VideoFrames, faults: &mut Faults) -> Option<VideoSource> {
    let v1::VideoFrames { frames: files, timestamps_s, rate } = proto;
    let count = files.len();
    if count == 0 || count > MAX_FRAMES as usize {
        faults.invalid(format!("{field}.frames"), format!("has {count}; at least 1, at most {MAX_FRAMES}"));
        return None;
    }
    for (index, _) in files.iter().enumerate().filter(|(_, file)| file.is_empty()) {
        faults.invalid(format!("{field}.frames[{index}]"), "is empty");
    }
    let times = match rate {
        Some(_) if !timestamps_s.is_empty() => {
            faults.invalid(format!("{field}.rate"), "must not be set beside timestamps_s");
            return None;
        }
        Some(rate) => at_rate(field, count, rate, faults),
        None => at_times(field, count, timestamps_s, faults),
    };
    Some(VideoSource::Frames { files, times: times? })
}

fn at_rate(field: &str, count: usize, rate: f64, faults: &mut Faults) -> Option<FrameTimes> {
    let least = count as f64 / MAX_VIDEO_SECONDS;
    // Not a number is not in it.
    if rate >= least
        && let Ok(times) = FrameTimes::at_rate(count, rate)
    {
        return Some(times);
    }
    let problem = format!(
        "must be a positive number of frames per second, by which the video has at most {MAX_VIDEO_SECONDS} seconds"
    );
    faults.invalid(format!("{field}.rate"), problem);
    None
}

fn at_times(field: &str, count: usize, times_s: Vec<f64>, faults: &mut Faults) -> Option<FrameTimes> {
    let field = format!("{field}.timestamps_s");
    if times_s.is_empty() {
        faults.invalid(field, "must be set, or else rate");
        return None;
    }
    if times_s.len() != count {
        faults.invalid(field, format!("has {}; there are {count} frames", times_s.len()));
        return None;
    }
    let mut sound = true;
    let mut earlier = 0.0;
    for (index, &time) in times_s.iter().enumerate() {
        let problem = match time {
            time if !(0.0..=MAX_VIDEO_SECONDS).contains(&time) => {
                format!("is {time}, not in 0..{MAX_VIDEO_SECONDS}")
            }
            time if time < earlier => format!("is {time}, before the {earlier} of the frame before it"),
            _ => {
                earlier = time;
                continue;
            }
        };
        sound = false;
        faults.invalid(format!("{field}[{index}]"), problem);
    }
    if !sound {
        return None;
    }
    match FrameTimes::at_times(times_s) {
        Ok(times) if times.duration_s() > 0.0 => Some(times),
        _ => {
            faults.invalid(field, "all frames are shown at the same time");
            None
        }
    }
}

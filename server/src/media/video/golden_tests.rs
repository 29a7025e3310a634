//! Videos compared with what ffmpeg decodes of them, which the reference's decoders are made of.

use std::fs;

use super::{
    FrameTimes, Sampler, SamplingOptions, Video, VideoError, VideoLimits, VideoOptions, VideoProcessor,
};
use crate::goldens;

/// How far a sample may be from ffmpeg's: it converts colours with numbers of fewer bits.
const TOLERANCE: u8 = 4;

fn opened(name: &str) -> Result<Video, VideoError> {
    let file = fs::read(goldens::path(&format!("tests/videos/{name}.mp4"))).unwrap();
    Video::open(file, &VideoLimits::default())
}

#[test]
fn videos_are_as_ffmpeg_has_them() {
    for name in ["reordered", "main_bt709", "full_range", "rotated", "fragmented", "variable_rate", "trimmed"]
    {
        let video = opened(name).unwrap();
        let facts = goldens::json(&format!("tests/videos/{name}.json"));
        let header = video.header();
        let size = [&facts["width"], &facts["height"]].map(|side| side.as_u64().unwrap() as u32);
        assert_eq!([header.width, header.height], size, "{name}");
        let times: Vec<f64> =
            facts["times_s"].as_array().unwrap().iter().map(|time| time.as_f64().unwrap()).collect();
        assert_eq!(header.times.num_frames(), times.len(), "{name}");
        for (ours, theirs) in header.times.times_s().iter().zip(&times) {
            assert!((ours - (theirs - times[0])).abs() < 1e-6, "{name}: {ours}, not {theirs}");
        }
        let frames = image::open(goldens::path(&format!("tests/videos/{name}.png"))).unwrap().into_rgb8();
        let frame_bytes = size[0] as usize * size[1] as usize * 3;
        let all: Vec<usize> = (0..times.len()).collect();
        let mut decoded = 0;
        video
            .decode(&all, |index, frame| {
                let expected = &frames.as_raw()[index * frame_bytes..][..frame_bytes];
                let far = frame.pixels.iter().zip(expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
                assert!(far <= TOLERANCE, "{name}: frame {index}: a sample differs by {far}");
                decoded += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(decoded, times.len(), "{name}");
    }
}

#[test]
fn interlaced_video_is_refused() {
    assert_eq!(opened("interlaced").unwrap_err(), VideoError::Unsupported("interlaced"));
}

#[test]
fn a_video_that_is_cut_short_is_refused() {
    let file = fs::read(goldens::path("tests/videos/reordered.mp4")).unwrap();
    for sixteenth in 0..16 {
        let cut = file[..file.len() * sixteenth / 16].to_vec();
        assert!(Video::open(cut, &VideoLimits::default()).is_err(), "{sixteenth}/16");
    }
}

#[test]
fn the_references_frames_are_taken() {
    let golden = goldens::json("tests/goldens/video.json");
    let cases = golden["samples"].as_array().unwrap();
    assert!(cases.len() > 200);
    for case in cases {
        let [rate, fps, seconds] =
            ["rate", "fps", "seconds_per_grid_t"].map(|number| case[number].as_f64().unwrap());
        let times = FrameTimes::at_rate(case["total"].as_u64().unwrap() as usize, rate).unwrap();
        let max_frames = case["max_frames"].as_u64().map(|number| number as u32);
        let sample = Sampler::default().sample(&times, &SamplingOptions { fps: Some(fps), max_frames });
        let sample = sample.unwrap();
        let indices: Vec<_> = sample.indices.iter().map(|index| *index as u32).collect();
        assert_eq!(indices, goldens::numbers(&case["indices"]), "{case}");
        assert!((sample.seconds_per_grid_t / seconds - 1.0).abs() < 1e-12, "{case}");
    }
}

#[test]
fn frames_have_the_references_size() {
    let golden = goldens::json("tests/goldens/video.json");
    let cases = golden["sizes"].as_array().unwrap();
    assert!(cases.len() >= 70);
    for case in cases {
        let n = goldens::numbers(case);
        let size = VideoProcessor::default().size(n[0], n[1], n[2] as usize, &VideoOptions::default());
        assert_eq!(size.map(|size| (size.width, size.height)), Ok((n[3], n[4])), "{case}");
    }
}

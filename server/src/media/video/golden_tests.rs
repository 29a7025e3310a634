//! Videos compared with what ffmpeg decodes of them, which the reference's decoders are made of.

use std::fs;
use std::time::Duration;

use super::{
    FrameTimes, Sampler, SamplingOptions, TokenBounds, Video, VideoDecoder, VideoError, VideoInput,
    VideoLimits, VideoOptions, VideoPreparer, VideoProcessor, VideoSource,
};
use crate::goldens;
use crate::media::{MediaPreparer, MediumInput, PictureLimits, PicturePreparer, PictureProcessor};

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

/// A preparer whose processes would not start: frames that are given one by one need none.
fn preparer() -> MediaPreparer {
    let decoder = VideoDecoder::new(vec!["/nowhere".into()], VideoLimits::default(), 1);
    MediaPreparer {
        pictures: PicturePreparer::new(PictureProcessor::default(), PictureLimits::default()),
        videos: VideoPreparer::new(
            VideoProcessor::default(),
            decoder,
            TokenBounds::same(16_384),
            Duration::from_secs(1),
        ),
    }
}

/// Frames of a golden as a request gives them.
fn given(part: &serde_json::Value) -> MediumInput {
    let paths: Vec<_> =
        part["frames"].as_array().unwrap().iter().map(|path| path.as_str().unwrap()).collect();
    let times = match part["rate"].as_f64() {
        Some(rate) => FrameTimes::at_rate(paths.len(), rate),
        None => FrameTimes::at_times(serde_json::from_value(part["timestamps_s"].clone()).unwrap()),
    };
    let files = paths.into_iter().map(|path| fs::read(goldens::path(path)).unwrap().into()).collect();
    let bound = |name: &str| part[name].as_u64().map(|pixels| pixels as u32);
    let options =
        VideoOptions { min_pixels: bound("min_pixels"), max_pixels: bound("max_pixels"), total_pixels: None };
    let source = VideoSource::Frames { files, times: times.unwrap() };
    MediumInput::Video(VideoInput { source, sampling: SamplingOptions::default(), options })
}

/// The frames of every case, given one by one: sizes, grids, times and pixels.
#[tokio::test]
async fn frames_of_all_cases_agree() {
    let preparer = preparer();
    let mut compared = 0;
    for case in goldens::cases("tests/goldens/a_videos.json") {
        let parts = case["messages"].as_array().unwrap().iter().flat_map(|m| m["parts"].as_array().unwrap());
        let media = parts.filter(|part| !part["text"].is_string()).enumerate();
        for (index, part) in media.filter(|(_, part)| part["frames"].is_array()) {
            let what = format!("{}: medium {index}", case["name"]);
            let measured = preparer.measure(given(part)).await.unwrap();
            let medium = preparer.prepare(given(part)).await.unwrap();
            assert_eq!(medium.info, measured, "{what}");
            assert_eq!(measured.pixel_bytes(), medium.pixels.len() as u64, "{what}");
            assert_eq!(medium.info.grid.to_vec(), goldens::numbers(&case["grids"][index]), "{what}");
            let (width, height) = medium.info.size;
            assert_eq!([width, height].to_vec(), goldens::numbers(&case["resized"][index]), "{what}");
            let times: Vec<f64> = serde_json::from_value(case["timestamps_s"][index].clone()).unwrap();
            assert_eq!(medium.info.timestamps_s, times, "{what}");
            let sha256 = case["pixel_sha256"][index].as_str().unwrap();
            assert_eq!(goldens::sha256_hex(&medium.pixels), sha256, "{what}");
            compared += 1;
        }
    }
    assert!(compared >= 17, "{compared}");
}

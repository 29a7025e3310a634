use std::io::Cursor;

use image::{ImageFormat, RgbImage};

use super::super::file::tests::gif;
use super::*;
use crate::media::{PictureLimits, PictureProcessor};

fn pictures() -> PicturePreparer {
    PicturePreparer::new(PictureProcessor::default(), PictureLimits::default())
}

/// A preparer whose processes do what a shell is told.
fn preparer(command: &str, max_tokens: u64, max_time: Duration) -> VideoPreparer {
    bounded(command, TokenBounds::same(max_tokens), max_time)
}

fn bounded(command: &str, bounds: TokenBounds, max_time: Duration) -> VideoPreparer {
    let command = ["/bin/sh", "-c", command].iter().map(Into::into).collect();
    let decoder = VideoDecoder::new(command, VideoLimits::default(), 10);
    VideoPreparer::new(VideoProcessor::default(), decoder, bounds, max_time)
}

fn png(width: u32, height: u32) -> Bytes {
    let mut file = Cursor::new(Vec::new());
    RgbImage::new(width, height).write_to(&mut file, ImageFormat::Png).unwrap();
    file.into_inner().into()
}

fn of_file() -> VideoInput {
    let source = VideoSource::File(gif(4).into());
    VideoInput { source, sampling: SamplingOptions::default(), options: VideoOptions::default() }
}

fn given(num_frames: usize) -> VideoInput {
    let times = FrameTimes::at_rate(num_frames, 2.0).unwrap();
    let files = vec![png(56, 28); num_frames];
    VideoInput { source: VideoSource::Frames { files, times }, ..of_file() }
}

/// The field at fault, and what is wrong.
fn blamed<T>(result: Result<T, PrepareError>) -> (String, String) {
    match result.map(|_| ()).unwrap_err().blame() {
        Blame::Fields(mut fields) => fields.remove(0),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_decoding_costs_is_told() {
    let preparer = preparer("", 16_384, Duration::from_secs(60));
    let info = preparer.measure(&pictures(), of_file()).await.unwrap();
    assert_eq!(info.decoded_pixels, 4 * 6 * 4);
    let info = preparer.measure(&pictures(), given(3)).await.unwrap();
    assert_eq!((info.decoded_pixels, info.timestamps_s.len()), (3 * 56 * 28, 4));
}

#[tokio::test]
async fn a_machine_that_is_too_busy_is_not_the_videos_fault() {
    let preparer = preparer("sleep 60", 16_384, Duration::from_millis(50));
    let error = preparer.prepare(&pictures(), of_file()).await.unwrap_err();
    assert!(matches!(error.blame(), Blame::Load(_)), "{error}");
    let error: PrepareError = DecodeError::NoRoom("signal: 9".into()).into();
    assert_eq!(error.blame(), Blame::Load("there is no room to decode a video now".into()));
}

/// Frames are under the same clock as files.
#[tokio::test]
async fn frames_have_no_more_time_than_files() {
    let preparer = preparer("", 16_384, Duration::ZERO);
    // So many that they are not done before anybody looks at the clock.
    let error = preparer.prepare(&pictures(), given(256)).await.map(|_| ()).unwrap_err();
    assert!(matches!(error.blame(), Blame::Load(_)), "{error}");
}

#[tokio::test]
async fn advice_is_about_what_may_be_asked_for() {
    let preparer = preparer("", 3, Duration::from_secs(60));
    let (field, words) = blamed(preparer.measure(&pictures(), of_file()).await.and_then(|info| {
        // Two frames fit, and four are of one token each.
        assert_eq!(info.num_tokens, 2);
        Err::<(), _>(malformed("no fault").into())
    }));
    assert_eq!((field.as_str(), words.contains("no fault")), ("data", true));
    let options = VideoOptions { min_pixels: Some(100_000), ..Default::default() };
    let (field, words) = blamed(preparer.measure(&pictures(), VideoInput { options, ..of_file() }).await);
    assert!(field == "data" && words.contains("max_frames"), "{field}: {words}");
    let (field, words) = blamed(preparer.measure(&pictures(), VideoInput { options, ..given(4) }).await);
    assert!(field == "frames" && words.contains("fewer frames"), "{field}: {words}");
    assert!(!words.contains("max_frames"), "{words}");
}

#[tokio::test]
async fn a_temporal_patch_is_no_larger_than_a_picture() {
    let bounds = TokenBounds { video: 16_384, temporal_patch: 6, unasked: 8 };
    let preparer = bounded("", bounds, Duration::from_secs(60));
    let info = preparer.measure(&pictures(), of_file()).await.unwrap();
    assert!(info.num_tokens <= 8, "{info:?}");
    let asking = async |min_pixels| {
        let options = VideoOptions { min_pixels: Some(min_pixels), ..Default::default() };
        preparer.measure(&pictures(), VideoInput { options, ..of_file() }).await
    };
    assert_eq!(asking(6 * 784).await.unwrap().num_tokens, 12);
    let (field, words) = blamed(asking(6 * 784 + 1).await);
    assert!(field == "data" && words.contains("at most 6: lower max_pixels"), "{field}: {words}");
}

/// However full the queue of pictures is, and of videos behind this one.
#[tokio::test]
async fn a_video_in_work_is_not_refused() {
    let preparer = preparer("", 16_384, Duration::from_secs(60));
    let pictures = pictures();
    let input = given(6);
    let many = (0..GIVEN_AT_ONCE + WAITING_GIVEN).map(|_| preparer.prepare(&pictures, input.clone()));
    let all = futures::future::join_all(many).await;
    assert!(all.iter().all(Result::is_ok));
    let many = (0..GIVEN_AT_ONCE + WAITING_GIVEN + 5).map(|_| preparer.prepare(&pictures, input.clone()));
    let refused = futures::future::join_all(many).await.into_iter().filter_map(Result::err);
    let refused: Vec<_> = refused.map(|error| error.blame()).collect();
    assert_eq!(refused.len(), 5);
    assert!(refused.iter().all(|blame| matches!(blame, Blame::Load(_))), "{refused:?}");
}

#[test]
fn panics_name_what_was_given_and_say_nothing_else() {
    let panic = || WorkersError::Panicked { what: "test", message: "at line 7".into() };
    for (error, expected) in [(PrepareError::of_given(panic()), "frames"), (panic().into(), "data")] {
        let (field, words) = blamed(Err::<(), _>(error));
        assert_eq!(field, expected);
        assert!(words.contains("cannot be") && !words.contains("line 7"), "{words}");
    }
}

/// The second wall: whatever sampling gives, nothing out of range goes to the shards.
#[test]
fn times_that_no_shard_takes_are_refused() {
    let rules = Arc::clone(&preparer("", 16_384, Duration::ZERO).rules);
    let source = Source { size: (64, 48), decoded_pixels: 1 };
    for (seconds, is_fine) in [
        (0.5, true),
        (MAX_SECONDS_PER_GRID_T, true),
        (MAX_SECONDS_PER_GRID_T * 1.001, false),
        (f64::INFINITY, false),
        (f64::NAN, false),
        (-1.0, false),
    ] {
        let sample = Sample { indices: vec![0, 0], timestamps_s: vec![0.0; 2], seconds_per_grid_t: seconds };
        let plan = rules.admit(source, sample, &VideoOptions::default(), "");
        assert_eq!(plan.is_ok(), is_fine, "{seconds}");
    }
}

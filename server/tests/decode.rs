//! Videos decoded by the program itself, in a process of its own.

use std::time::Duration;

use image::codecs::gif::GifEncoder;
use image::{Delay, Frame, Rgba, RgbaImage};
use lockstep::media::video::{
    DecodeError, FrameTimes, SamplingOptions, TokenBounds, Video, VideoDecoder, VideoError, VideoInput,
    VideoLimits, VideoOptions, VideoPreparer, VideoProcessor, VideoSize, VideoSource,
};
use lockstep::media::{MediaPreparer, MediumInput, PictureLimits, PicturePreparer, PictureProcessor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIZE: VideoSize = VideoSize { width: 56, height: 28, grid: [1, 2, 4], num_tokens: 2 };

fn decoder() -> VideoDecoder {
    decoder_within(VideoLimits::default())
}

fn decoder_within(limits: VideoLimits) -> VideoDecoder {
    VideoDecoder::new(vec![env!("CARGO_BIN_EXE_lockstep").into()], limits, 10)
}

fn gif(num_frames: u8) -> Vec<u8> {
    let mut file = Vec::new();
    let frames = (0..num_frames).map(|frame| {
        let image = RgbaImage::from_pixel(40, 30, Rgba([10 * frame, 100, 0, 255]));
        Frame::from_parts(image, 0, 0, Delay::from_numer_denom_ms(40, 1))
    });
    GifEncoder::new(&mut file).encode_frames(frames).unwrap();
    file
}

#[tokio::test]
async fn frames_come_back_in_order() {
    let video = Video::open(gif(6), &VideoLimits::default()).unwrap();
    let indices = [0, 2, 2, 5];
    let pixels = decoder().decode(&video, &indices, &SIZE).await.unwrap();
    let frames: Vec<_> = pixels.chunks(56 * 28 * 3).collect();
    assert_eq!(frames.len(), indices.len());
    for (frame, index) in frames.iter().zip(indices) {
        assert!(frame.chunks(3).all(|pixel| pixel == [10 * index as u8, 100, 0]));
    }
}

#[tokio::test]
async fn a_broken_video_is_a_fault() {
    let mut file = gif(6);
    // The compressed pixels of the last frame, of which the blocks say nothing.
    let end = file.len();
    file[end - 12..end - 4].fill(0xFF);
    let video = Video::open(file, &VideoLimits::default()).unwrap();
    let error = decoder().decode(&video, &[0, 5], &SIZE).await.unwrap_err();
    let DecodeError::Video(VideoError::Decoding(words)) = error else { panic!("{error}") };
    assert!(words.starts_with("the video cannot be decoded"), "{words}");
}

fn reordered() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/videos/reordered.mp4")).unwrap()
}

const OWN_SIZE: VideoSize = VideoSize { width: 96, height: 64, grid: [12, 4, 6], num_tokens: 72 };

/// Twenty-four frames with reordering and sound: the same pixels as in this process.
#[tokio::test]
async fn h264_is_decoded() {
    let video = Video::open(reordered(), &VideoLimits::default()).unwrap();
    let indices: Vec<usize> = (0..24).collect();
    let apart = decoder().decode(&video, &indices, &OWN_SIZE).await.unwrap();
    let mut here = Vec::new();
    video
        .decode(&indices, |_, frame| {
            here.extend(frame.pixels);
            Ok(())
        })
        .unwrap();
    assert!(apart == here);
}

/// Whatever is done to the bytes of the frames: pixels of the right number, or a fault of the video, in time.
#[tokio::test]
async fn broken_h264_costs_its_request_only() {
    let mut rng = StdRng::seed_from_u64(9);
    let whole = reordered();
    let (mut decoded, mut refused) = (0, 0);
    for _ in 0..100 {
        let mut file = whole.clone();
        for _ in 0..rng.random_range(1..10) {
            let at = rng.random_range(40..file.len());
            file[at] = rng.random();
        }
        let Ok(video) = Video::open(file, &VideoLimits::default()) else { continue };
        let indices = [0, video.header().times.num_frames() - 1];
        let decoder = decoder();
        let work = decoder.decode(&video, &indices, &OWN_SIZE);
        match tokio::time::timeout(Duration::from_secs(20), work).await.expect("in time") {
            Ok(pixels) => {
                assert_eq!(pixels.len(), 2 * 96 * 64 * 3);
                decoded += 1;
            }
            Err(DecodeError::Video(_)) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 10, "{decoded} decoded, {refused} refused");
}

/// The process does not trust what its parent has read of the file.
#[tokio::test]
async fn limits_hold_in_the_process() {
    let video = Video::open(reordered(), &VideoLimits::default()).unwrap();
    let narrow = decoder_within(VideoLimits { max_frames: 3, ..Default::default() });
    let error = narrow.decode(&video, &[0], &OWN_SIZE).await.unwrap_err();
    let DecodeError::Video(VideoError::Decoding(words)) = error else { panic!("{error}") };
    assert_eq!(words, "the video has 24 frames; at most 3");
}

fn preparer(decoder: VideoDecoder, max_time: Duration) -> MediaPreparer {
    MediaPreparer {
        pictures: PicturePreparer::new(PictureProcessor::default(), PictureLimits::default()),
        videos: VideoPreparer::new(VideoProcessor::default(), decoder, TokenBounds::same(16_384), max_time),
    }
}

fn input(source: VideoSource) -> MediumInput {
    let (sampling, options) = (SamplingOptions::default(), VideoOptions::default());
    MediumInput::Video(VideoInput { source, sampling, options })
}

/// The frames of `reordered.mp4` as ffmpeg decodes them, one of them in a file.
fn frame_of_ffmpeg(index: usize) -> bytes::Bytes {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/videos/reordered.png");
    let frame = image::open(path).unwrap().crop_imm(0, 64 * index as u32, 96, 64);
    let mut file = std::io::Cursor::new(Vec::new());
    frame.write_to(&mut file, image::ImageFormat::Png).unwrap();
    file.into_inner().into()
}

/// A file is what its frames are, sampled, decoded by the reference's decoder and given one by one: within 4 of 255.
#[tokio::test]
async fn a_file_is_what_its_frames_are() {
    let preparer = preparer(decoder(), Duration::from_secs(60));
    let film = preparer.prepare(input(VideoSource::File(reordered().into()))).await.unwrap();
    let files = [0, 8, 15, 23].map(frame_of_ffmpeg).to_vec();
    let times = FrameTimes::at_times(film.info.timestamps_s.clone()).unwrap();
    let frames = preparer.prepare(input(VideoSource::Frames { files, times })).await.unwrap();
    assert_eq!((film.info.size, film.info.grid), (frames.info.size, frames.info.grid));
    let furthest = film.pixels.iter().zip(&frames.pixels[..]).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(furthest <= Some(4), "{furthest:?}");
}

/// The processes whose command lines hold a word.
fn processes_with(word: &str) -> usize {
    let folders = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = folders.filter_map(|folder| std::fs::read(folder.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(word)).count()
}

/// A process that never answers: it sleeps for this many seconds, which is then its command line.
fn stuck(seconds: &str) -> VideoDecoder {
    let sleep = format!("exec sleep {seconds}");
    let command = ["/bin/sh", "-c", &sleep];
    VideoDecoder::new(command.iter().map(Into::into).collect(), VideoLimits::default(), 10)
}

#[tokio::test]
async fn a_decoder_that_hangs_is_ended() {
    let preparer = preparer(stuck("1000.25"), Duration::from_millis(300));
    let error = preparer.prepare(input(VideoSource::File(gif(4).into()))).await.unwrap_err();
    assert!(error.to_string().contains("took longer than 300ms"), "{error}");
    gone("1000.25").await;
}

/// How deadlines and clients that go away are heard of.
#[tokio::test]
async fn dropping_the_work_ends_the_process() {
    let preparer = preparer(stuck("1000.75"), Duration::from_secs(600));
    let work = preparer.prepare(input(VideoSource::File(gif(4).into())));
    let waited = tokio::time::timeout(Duration::from_millis(300), work).await;
    assert!(waited.is_err());
    gone("1000.75").await;
}

async fn gone(word: &str) {
    for _ in 0..500 {
        if processes_with(word) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("a process with {word} is still there");
}

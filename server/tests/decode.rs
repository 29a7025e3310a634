//! Videos decoded by the program itself, in a process of its own.

use image::codecs::gif::GifEncoder;
use image::{Delay, Frame, Rgba, RgbaImage};
use lockstep::media::video::{DecodeError, Video, VideoDecoder, VideoError, VideoLimits, VideoSize};

const SIZE: VideoSize = VideoSize { width: 56, height: 28, grid: [1, 2, 4], num_tokens: 2 };

fn decoder() -> VideoDecoder {
    VideoDecoder {
        command: vec![env!("CARGO_BIN_EXE_lockstep").into()],
        limits: VideoLimits::default(),
        max_cpu_seconds: 10,
    }
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

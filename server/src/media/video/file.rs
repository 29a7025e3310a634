//! A video's file, whatever it is: opened by its headers, decoded frame by frame.

use image::RgbImage;

use super::animation::{Animation, Format};
use super::boxes::is_mp4;
use super::container::Container;
use super::error::{VideoError, VideoLimits};
use super::h264;
use super::mp4::H264Track;
use super::sampling::FrameTimes;

/// What the headers of a video say.
#[derive(Debug, Clone, PartialEq)]
pub struct VideoHeader {
    /// Of upright frames, in pixels.
    pub width: u32,
    /// Of upright frames, in pixels.
    pub height: u32,
    /// When each frame is shown.
    pub times: FrameTimes,
    /// Pixels of all frames of the file, shown or not: what decoding costs.
    pub decoded_pixels: u64,
}

/// A frame, upright.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// Rows top to bottom, three bytes (red, green, blue) a pixel.
    pub pixels: Vec<u8>,
}

/// A video whose headers have been read and whose frames have not.
#[derive(Debug, Clone)]
pub struct Video {
    file: Vec<u8>,
    header: VideoHeader,
    contents: Contents,
}

#[derive(Debug, Clone)]
enum Contents {
    H264(H264Track),
    Animation(Format, Animation),
}

impl Video {
    /// Reads the headers of MP4 (H.264), GIF or animated WebP.
    ///
    /// # Errors
    /// Anything that keeps the video from being decoded, or that is over a limit, as far as headers tell.
    pub fn open(mut file: Vec<u8>, limits: &VideoLimits) -> Result<Self, VideoError> {
        if file.is_empty() {
            return Err(VideoError::Empty);
        }
        let (contents, (width, height), times, decoded_pixels) = if is_mp4(&file) {
            let track = H264Track::open(&mut file, limits)?;
            let (size, times, pixels) = (track.size(), track.times.clone(), track.decoded_pixels());
            (Contents::H264(track), size, times, pixels)
        } else if let Some(format) = Format::of(&file) {
            let animation = Animation::open(format, &file, limits)?;
            let (size, times, pixels) = (animation.size, animation.times.clone(), animation.decoded_pixels);
            (Contents::Animation(format, animation), size, times, pixels)
        } else {
            return Err(Container::of(&file)
                .map_or(VideoError::NotAVideo, |other| VideoError::UnsupportedContainer(other.name())));
        };
        Ok(Self { file, header: VideoHeader { width, height, times, decoded_pixels }, contents })
    }

    /// The file, less what decoding does not need of it.
    pub(super) fn file(&self) -> &[u8] {
        &self.file
    }

    /// What its headers say.
    pub fn header(&self) -> &VideoHeader {
        &self.header
    }

    /// Decodes the frames of these indices, which are in order, and gives each to `take` with its index: a frame that is
    /// there several times once. One frame is held at a time.
    ///
    /// # Errors
    /// A broken file, or what `take` returns.
    ///
    /// # Panics
    /// An index out of order, or of no frame.
    pub fn decode(
        &self,
        indices: &[usize],
        mut take: impl FnMut(usize, Frame) -> Result<(), VideoError>,
    ) -> Result<(), VideoError> {
        assert!(indices.is_sorted(), "the indices are in order");
        assert!(
            indices.last().is_none_or(|last| *last < self.header.times.num_frames()),
            "there are such frames"
        );
        let mut wanted = indices.to_vec();
        wanted.dedup();
        if wanted.is_empty() {
            return Ok(());
        }
        let mut take = |index: usize, image: RgbImage| {
            let (width, height) = image.dimensions();
            take(index, Frame { width, height, pixels: image.into_raw() })
        };
        match &self.contents {
            Contents::H264(track) => h264::decode(track, &self.file, &wanted, &mut take),
            Contents::Animation(format, animation) => {
                animation.decode(*format, &self.file, &wanted, &mut take)
            }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use image::codecs::gif::GifEncoder;
    use image::{Delay, RgbaImage};

    use super::*;

    /// A GIF of single shades.
    pub(in crate::media::video) fn gif(num_frames: u8) -> Vec<u8> {
        let mut file = Vec::new();
        let frames = (0..num_frames).map(|frame| {
            let image = RgbaImage::from_pixel(6, 4, image::Rgba([frame; 4].map(|sample| sample | 0xF0)));
            image::Frame::from_parts(image, 0, 0, Delay::from_numer_denom_ms(40, 1))
        });
        GifEncoder::new(&mut file).encode_frames(frames).unwrap();
        file
    }

    #[test]
    fn what_is_no_video_is_refused() {
        let limits = VideoLimits::default();
        assert_eq!(Video::open(Vec::new(), &limits).unwrap_err(), VideoError::Empty);
        for file in [&b"hello"[..], b"\x89PNG\r\n\x1a\n0000", b"\0\0\0\x20moov0000", &[0xFF; 100]] {
            assert_eq!(Video::open(file.to_vec(), &limits).unwrap_err(), VideoError::NotAVideo);
        }
        let other = Video::open(b"RIFF0000AVI ".to_vec(), &limits).unwrap_err();
        assert_eq!(other, VideoError::UnsupportedContainer("AVI"));
    }

    #[test]
    fn a_frame_that_is_taken_twice_is_given_once() {
        let video = Video::open(gif(5), &VideoLimits::default()).unwrap();
        assert_eq!((video.header().width, video.header().height), (6, 4));
        assert_eq!((video.header().times.num_frames(), video.header().decoded_pixels), (5, 5 * 6 * 4));
        let mut given = Vec::new();
        video
            .decode(&[1, 1, 3, 4, 4], |index, frame| {
                assert_eq!(frame.pixels.len(), 6 * 4 * 3);
                given.push(index);
                Ok(())
            })
            .unwrap();
        assert_eq!(given, [1, 3, 4]);
        video.decode(&[], |_, _| panic!("nothing is wanted")).unwrap();
    }
}

//! GIF and animated WebP. A look at the blocks of the file tells the frames and their times; decoding is safe Rust.
//!
//! Where a frame of a WebP is blended into the one before, the decoder makes its opaque pixels one level of 255 too dark;
//! frames that replace all pixels are exact.

use std::io::Cursor;

use image::codecs::gif::GifDecoder;
use image::codecs::webp::WebPDecoder;
use image::{AnimationDecoder, Frames, ImageDecoder, ImageResult, Limits, RgbImage};

use super::error::{VideoError, VideoLimits, malformed};
use super::sampling::FrameTimes;
use crate::media::decode::rgb_on_white;

/// Frames shown for less than this are shown for [`DEFAULT_MS`], as in ffmpeg: they say nothing of use.
const LEAST_MS: u32 = 20;
/// How long a frame is shown that does not say.
const DEFAULT_MS: u32 = 100;
/// What decoders may allocate beside pixels.
const DECODER_SLACK_BYTES: u64 = 64 << 20;
/// Bytes of a pixel in a decoder: the frame, what is below it, and both together, of four bytes each.
const DECODER_PIXEL_BYTES: u64 = 12;

/// A file of pictures that move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Gif,
    WebP,
}

impl Format {
    /// The format that a file begins like.
    pub(super) fn of(file: &[u8]) -> Option<Self> {
        match (file.get(..6), file.get(..4), file.get(8..12)) {
            (Some(b"GIF87a" | b"GIF89a"), ..) => Some(Self::Gif),
            (_, Some(b"RIFF"), Some(b"WEBP")) => Some(Self::WebP),
            _ => None,
        }
    }
}

/// What the blocks of a file say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Animation {
    /// In pixels.
    pub(super) size: (u32, u32),
    /// When each frame is shown.
    pub(super) times: FrameTimes,
    /// Pixels of all frames: of each as many as it has itself, or as are shown, where these are more.
    pub(super) decoded_pixels: u64,
}

/// A frame: how long it is shown, and how many pixels it has itself.
struct Part {
    ms: u32,
    pixels: u64,
}

impl Animation {
    /// Reads the blocks of a file.
    ///
    /// # Errors
    /// A broken file, one that does not move, or one over a limit.
    pub(super) fn open(format: Format, file: &[u8], limits: &VideoLimits) -> Result<Self, VideoError> {
        let (size, parts) = match format {
            Format::Gif => read_gif(file, limits)?,
            Format::WebP => read_webp(file, limits)?,
        };
        if parts.is_empty() {
            return Err(VideoError::NoFrames);
        }
        let mut end_ms = 0_u64;
        let mut times_s = Vec::with_capacity(parts.len());
        let mut pixels = 0_u64;
        for part in &parts {
            times_s.push(end_ms as f64 / 1000.0);
            end_ms += u64::from(if part.ms < LEAST_MS { DEFAULT_MS } else { part.ms });
            // Each is laid on the one before, whatever it has itself.
            pixels = pixels.saturating_add(part.pixels.max(u64::from(size.0) * u64::from(size.1)));
        }
        let times = FrameTimes::new(times_s, end_ms as f64 / 1000.0)?;
        limits.check(size, parts.len(), times.duration_s())?;
        if pixels > limits.max_decoded_pixels {
            return Err(VideoError::TooManyPixels { pixels, max: limits.max_decoded_pixels });
        }
        Ok(Self { size, times, decoded_pixels: pixels })
    }

    /// Decodes the frames that are `wanted` (ascending, each once), transparency laid on white.
    pub(super) fn decode(
        &self,
        format: Format,
        file: &[u8],
        wanted: &[usize],
        take: &mut dyn FnMut(usize, RgbImage) -> Result<(), VideoError>,
    ) -> Result<(), VideoError> {
        let mut wanted = wanted.iter().copied().peekable();
        let frames = self.frames(format, file).map_err(|error| malformed(error.to_string()))?;
        for (index, frame) in frames.enumerate() {
            let frame = frame.map_err(|error| malformed(error.to_string()))?;
            if wanted.next_if_eq(&index).is_some() {
                let (width, height) = self.size;
                let pixels = frame.buffer().pixels().flat_map(|pixel| rgb_on_white(pixel.0)).collect();
                let image = RgbImage::from_raw(width, height, pixels);
                take(index, image.ok_or_else(|| malformed("its frames are not of one size"))?)?;
            }
            if wanted.peek().is_none() {
                return Ok(());
            }
        }
        Err(malformed("it ends before its frames do"))
    }

    fn frames<'a>(&self, format: Format, file: &'a [u8]) -> ImageResult<Frames<'a>> {
        let pixels = u64::from(self.size.0) * u64::from(self.size.1);
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(pixels * DECODER_PIXEL_BYTES + DECODER_SLACK_BYTES);
        match format {
            Format::Gif => {
                let mut decoder = GifDecoder::new(Cursor::new(file))?;
                decoder.set_limits(limits)?;
                Ok(decoder.into_frames())
            }
            Format::WebP => {
                let mut decoder = WebPDecoder::new(Cursor::new(file))?;
                decoder.set_limits(limits)?;
                Ok(decoder.into_frames())
            }
        }
    }
}

/// Bytes from the front of a file.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], VideoError> {
        let (taken, rest) =
            self.0.split_at_checked(count).ok_or_else(|| malformed("it ends before its frames do"))?;
        self.0 = rest;
        Ok(taken)
    }

    /// Little-endian.
    fn number(&mut self, num_bytes: usize) -> Result<u32, VideoError> {
        Ok(self.take(num_bytes)?.iter().rev().fold(0, |number, byte| (number << 8) | u32::from(*byte)))
    }

    /// Skips the blocks of bytes that follow, each after its length; the last one is empty.
    fn skip_sub_blocks(&mut self) -> Result<(), VideoError> {
        loop {
            match self.number(1)? as usize {
                0 => return Ok(()),
                length => self.take(length)?,
            };
        }
    }

    /// Skips a table of colours, if these flags say that one follows.
    fn skip_colours(&mut self, flags: u32) -> Result<(), VideoError> {
        if flags & 0x80 != 0 {
            self.take(3 << ((flags & 7) + 1))?;
        }
        Ok(())
    }
}

/// Size and frames of a GIF (specification of version 89a).
fn read_gif(file: &[u8], limits: &VideoLimits) -> Result<((u32, u32), Vec<Part>), VideoError> {
    let mut bytes = Bytes(file);
    bytes.take(6)?;
    let size = (bytes.number(2)?, bytes.number(2)?);
    let flags = bytes.number(1)?;
    bytes.take(2)?;
    bytes.skip_colours(flags)?;
    let mut parts = Vec::new();
    let mut ms = 0;
    loop {
        match bytes.number(1)? {
            // An extension; a graphic control says how long the next frame is shown.
            0x21 => {
                if bytes.number(1)? == 0xF9 && bytes.0.first() == Some(&4) {
                    bytes.take(2)?;
                    ms = bytes.number(2)? * 10;
                    bytes.take(1)?;
                }
                bytes.skip_sub_blocks()?;
            }
            0x2C => {
                bytes.take(4)?;
                let pixels = u64::from(bytes.number(2)?) * u64::from(bytes.number(2)?);
                let flags = bytes.number(1)?;
                bytes.skip_colours(flags)?;
                bytes.take(1)?;
                bytes.skip_sub_blocks()?;
                parts.push(Part { ms, pixels });
                limits.check_frames(parts.len())?;
                ms = 0;
            }
            0x3B => return Ok((checked(size)?, parts)),
            block => return Err(malformed(format!("it has a block of the unknown kind {block:#x}"))),
        }
    }
}

/// Size and frames of a WebP (RFC 9649).
fn read_webp(file: &[u8], limits: &VideoLimits) -> Result<((u32, u32), Vec<Part>), VideoError> {
    let mut bytes = Bytes(file);
    bytes.take(4)?;
    let riff_bytes = bytes.number(4)? as usize;
    let mut bytes = Bytes(bytes.take(riff_bytes)?);
    bytes.take(4)?;
    let mut size = None;
    let mut parts = Vec::new();
    while !bytes.0.is_empty() {
        let kind = bytes.take(4)?;
        let length = bytes.number(4)? as usize;
        let mut chunk = Bytes(bytes.take(length)?);
        // Chunks are filled up to an even length; the last one in some files is not.
        bytes.take((length % 2).min(bytes.0.len()))?;
        match kind {
            b"VP8X" => {
                let flags = chunk.number(1)?;
                chunk.take(3)?;
                let animated = flags & 2 != 0;
                size = animated.then_some((chunk.number(3)? + 1, chunk.number(3)? + 1));
            }
            b"ANMF" => {
                chunk.take(6)?;
                let pixels = u64::from(chunk.number(3)? + 1) * u64::from(chunk.number(3)? + 1);
                parts.push(Part { ms: chunk.number(3)?, pixels });
                limits.check_frames(parts.len())?;
            }
            _ => {}
        }
    }
    Ok((checked(size.ok_or(VideoError::NotAnimated)?)?, parts))
}

fn checked((width, height): (u32, u32)) -> Result<(u32, u32), VideoError> {
    if width == 0 || height == 0 {
        return Err(malformed(format!("its header says {width} x {height} pixels")));
    }
    Ok((width, height))
}

#[cfg(test)]
mod tests {
    use image::codecs::gif::GifEncoder;
    use image::codecs::webp::WebPEncoder;
    use image::{Delay, ExtendedColorType, Frame, RgbaImage};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const SIZE: (u32, u32) = (12, 8);

    /// A frame of one shade of gray.
    fn still(shade: u8) -> RgbaImage {
        RgbaImage::from_pixel(SIZE.0, SIZE.1, image::Rgba([shade, shade, shade, 255]))
    }

    fn gif(delays_ms: &[u32]) -> Vec<u8> {
        let mut file = Vec::new();
        let frames = delays_ms.iter().enumerate().map(|(index, ms)| {
            Frame::from_parts(still(20 * index as u8), 0, 0, Delay::from_numer_denom_ms(*ms, 1))
        });
        GifEncoder::new(&mut file).encode_frames(frames).unwrap();
        file
    }

    fn chunk(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
        let padding = &[0][..content.len() % 2];
        [&kind[..], &(content.len() as u32).to_le_bytes(), content, padding].concat()
    }

    fn riff(chunks: &[Vec<u8>]) -> Vec<u8> {
        let content = [&b"WEBP"[..], &chunks.concat()].concat();
        [&b"RIFF"[..], &(content.len() as u32).to_le_bytes(), &content].concat()
    }

    /// Three bytes.
    fn u24(value: u32) -> [u8; 3] {
        let [a, b, c, _] = value.to_le_bytes();
        [a, b, c]
    }

    /// The encoder makes stills; their image chunks are put into frames here.
    fn webp(delays_ms: &[u32]) -> Vec<u8> {
        let size = [u24(SIZE.0 - 1), u24(SIZE.1 - 1)].concat();
        let mut chunks = vec![chunk(b"VP8X", &[&[2, 0, 0, 0][..], &size].concat()), chunk(b"ANIM", &[0; 6])];
        for (index, ms) in delays_ms.iter().enumerate() {
            let mut file = Vec::new();
            let encoder = WebPEncoder::new_lossless(&mut file);
            encoder.encode(&still(20 * index as u8), SIZE.0, SIZE.1, ExtendedColorType::Rgba8).unwrap();
            let frame = [&[0; 6][..], &size, &u24(*ms), &[2], &file[12..]].concat();
            chunks.push(chunk(b"ANMF", &frame));
        }
        riff(&chunks)
    }

    fn opened(file: &[u8]) -> Result<Animation, VideoError> {
        Animation::open(Format::of(file).unwrap(), file, &VideoLimits::default())
    }

    fn decoded(file: &[u8], wanted: &[usize]) -> Result<Vec<(usize, RgbImage)>, VideoError> {
        let mut frames = Vec::new();
        opened(file)?.decode(Format::of(file).unwrap(), file, wanted, &mut |index, image| {
            frames.push((index, image));
            Ok(())
        })?;
        Ok(frames)
    }

    #[test]
    fn formats_are_told_by_their_first_bytes() {
        assert_eq!(Format::of(&gif(&[100])), Some(Format::Gif));
        assert_eq!(Format::of(&webp(&[100])), Some(Format::WebP));
        for other in [&b""[..], b"GIF", b"RIFF0000AVI ", b"\0\0\0\x20ftypisom"] {
            assert_eq!(Format::of(other), None);
        }
    }

    #[test]
    fn delays_are_times() {
        for file in [gif(&[100, 250, 0, 10, 1000]), webp(&[100, 250, 0, 10, 1000])] {
            let animation = opened(&file).unwrap();
            assert_eq!(animation.size, SIZE);
            assert_eq!(animation.times.times_s(), [0.0, 0.1, 0.35, 0.45, 0.55]);
            assert_eq!(animation.times.duration_s(), 1.55);
        }
    }

    #[test]
    fn frames_that_are_wanted_are_decoded() {
        for file in [gif(&[100; 6]), webp(&[100; 6])] {
            for wanted in [&[0, 1, 2, 3, 4, 5][..], &[5], &[1, 4], &[0]] {
                let frames = decoded(&file, wanted).unwrap();
                assert_eq!(frames.iter().map(|frame| frame.0).collect::<Vec<_>>(), wanted);
                for (index, image) in frames {
                    assert_eq!(image.dimensions(), SIZE);
                    assert!(image.iter().all(|sample| *sample == 20 * index as u8));
                }
            }
        }
    }

    #[test]
    fn stills_and_nothing_are_refused() {
        let mut still_file = Vec::new();
        let encoder = WebPEncoder::new_lossless(&mut still_file);
        encoder.encode(&still(1), SIZE.0, SIZE.1, ExtendedColorType::Rgba8).unwrap();
        assert_eq!(opened(&still_file).unwrap_err(), VideoError::NotAnimated);
        assert_eq!(opened(&webp(&[])).unwrap_err(), VideoError::NoFrames);
        assert_eq!(opened(b"GIF89a\x01\0\x01\0\0\0\0;").unwrap_err(), VideoError::NoFrames);
        assert!(matches!(opened(b"GIF89a\0\0\x01\0\0\0\0;"), Err(VideoError::Malformed(_))));
        assert_eq!(opened(&gif(&[100])).unwrap().times.num_frames(), 1);
    }

    #[test]
    fn refuses_by_headers() {
        let limits = VideoLimits { max_frames: 3, ..Default::default() };
        for file in [gif(&[100; 4]), webp(&[100; 4])] {
            let error = Animation::open(Format::of(&file).unwrap(), &file, &limits).unwrap_err();
            assert_eq!(error, VideoError::TooManyFrames { frames: 4, max: 3 });
        }
        let mut large = gif(&[100; 2]);
        large[6..10].fill(0xFF);
        assert!(matches!(
            opened(&large),
            Err(VideoError::FrameTooLarge { width: 65_535, height: 65_535, .. })
        ));
        // Frames larger than the screen that they are on cost what they are.
        let limits =
            VideoLimits { max_decoded_pixels: 3 * 96 - 1, max_frame_pixels: 96, ..Default::default() };
        let mut small = gif(&[100; 3]);
        small[6..10].copy_from_slice(&[1, 0, 1, 0]);
        let error = Animation::open(Format::Gif, &small, &limits).unwrap_err();
        assert_eq!(error, VideoError::TooManyPixels { pixels: 288, max: 287 });
    }

    #[test]
    fn a_file_that_is_cut_short_is_refused() {
        for file in [gif(&[100; 3]), webp(&[100; 3])] {
            for end in 12..file.len() {
                assert!(decoded(&file[..end], &[0, 1, 2]).is_err(), "cut at {end} of {}", file.len());
            }
        }
    }

    #[test]
    fn broken_files_are_decoded_or_refused() {
        let mut rng = StdRng::seed_from_u64(8);
        for whole in [gif(&[100; 3]), webp(&[100; 3])] {
            for _ in 0..2000 {
                let mut file = whole.clone();
                for _ in 0..rng.random_range(1..5) {
                    let at = rng.random_range(12..file.len());
                    file[at] = rng.random();
                }
                for (_, image) in decoded(&file, &[0, 2]).unwrap_or_default() {
                    assert!(image.width() > 0);
                }
            }
        }
    }
}

//! Picture files to RGB pixels, in safe Rust, header first.

use std::error::Error;
use std::io::{self, Cursor};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits};

use super::jpeg::check_markers;
use super::picture::PictureError;
use super::webp;

/// Formats that are decoded.
const FORMATS: [ImageFormat; 6] = [
    ImageFormat::Png,
    ImageFormat::Jpeg,
    ImageFormat::WebP,
    ImageFormat::Gif,
    ImageFormat::Bmp,
    ImageFormat::Tiff,
];
/// Pixels of more bytes than this, which a few formats have, count as several, so that memory is bounded too.
const PIXEL_BYTES: u64 = 4;
/// What decoders may allocate beside the pixels themselves.
const DECODER_SLACK_BYTES: u64 = 64 << 20;

/// What the header of a picture file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The file's format.
    pub format: ImageFormat,
    /// Width in pixels, after the orientation is applied.
    pub width: u32,
    /// Height in pixels, after the orientation is applied.
    pub height: u32,
}

/// A picture whose header has been read and whose pixels have not.
pub(super) struct Source<'a> {
    pub(super) header: Header,
    file: &'a [u8],
    decoder: Box<dyn ImageDecoder + 'a>,
    orientation: Orientation,
}

impl<'a> Source<'a> {
    /// Reads the header.
    pub(super) fn open(file: &'a [u8], max_source_pixels: u64) -> Result<Self, PictureError> {
        if file.is_empty() {
            return Err(PictureError::Empty);
        }
        let mut reader = ImageReader::new(Cursor::new(file))
            .with_guessed_format()
            .map_err(|error| PictureError::Malformed(error.to_string()))?;
        let format = reader.format().ok_or(PictureError::NotAPicture)?;
        if !FORMATS.contains(&format) {
            return Err(PictureError::UnsupportedFormat(format!("{format:?}")));
        }
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(max_source_pixels * PIXEL_BYTES + DECODER_SLACK_BYTES);
        reader.limits(limits);
        let mut decoder = Box::new(reader.into_decoder().map_err(decode_error)?);
        let (width, height) = decoder.dimensions();
        if width == 0 || height == 0 {
            return Err(PictureError::Malformed(format!("its header says {width} x {height} pixels")));
        }
        let bytes_per_pixel = u64::from(decoder.color_type().bytes_per_pixel());
        let max = max_source_pixels * PIXEL_BYTES / bytes_per_pixel.max(PIXEL_BYTES);
        if u64::from(width) * u64::from(height) > max {
            return Err(PictureError::TooManyPixels { width, height, max });
        }
        if format == ImageFormat::WebP && !webp::is_within(file, width, height) {
            return Err(PictureError::Malformed("what is in it is larger than its header says".into()));
        }
        // A broken orientation is none, as in the reference.
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let (width, height) = if swaps_sides(orientation) { (height, width) } else { (width, height) };
        Ok(Self { header: Header { format, width, height }, file, decoder, orientation })
    }

    /// Decodes the pixels: rows top to bottom, three bytes each, the orientation applied, transparency laid on white.
    pub(super) fn decode(self) -> Result<Vec<u8>, PictureError> {
        if self.header.format == ImageFormat::Jpeg {
            check_markers(self.file).map_err(|fault| PictureError::Malformed(fault.to_string()))?;
        }
        let mut image = DynamicImage::from_decoder(self.decoder).map_err(decode_error)?;
        image.apply_orientation(self.orientation);
        Ok(to_rgb8(image))
    }
}

/// Reads and decodes a picture of at most `max_source_pixels`: its header, and its pixels as the header says.
///
/// # Errors
/// A file that is no picture, is over the bound, or is broken.
pub fn decode_picture(file: &[u8], max_source_pixels: u64) -> Result<(Header, Vec<u8>), PictureError> {
    let source = Source::open(file, max_source_pixels)?;
    Ok((source.header, source.decode()?))
}

fn swaps_sides(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

fn decode_error(error: ImageError) -> PictureError {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        let io = inner.downcast_ref::<io::Error>();
        if io.is_some_and(|io| io.kind() == io::ErrorKind::UnexpectedEof) {
            return PictureError::Malformed("it ends before its pixels do".into());
        }
        cause = inner.source();
    }
    PictureError::Malformed(error.to_string())
}

/// Of samples of 16 bits the upper 8 count, as in Pillow, which the reference decodes with.
fn to_rgb8(image: DynamicImage) -> Vec<u8> {
    let high = |sample: &u16| (sample >> 8) as u8;
    match image {
        DynamicImage::ImageRgb8(pixels) => pixels.into_raw(),
        DynamicImage::ImageLuma8(pixels) => pixels.iter().flat_map(|l| [*l; 3]).collect(),
        DynamicImage::ImageLumaA8(pixels) => {
            pixels.pixels().flat_map(|pixel| [on_white(pixel[0], pixel[1]); 3]).collect()
        }
        DynamicImage::ImageRgb16(pixels) => pixels.iter().map(high).collect(),
        DynamicImage::ImageLuma16(pixels) => pixels.iter().flat_map(|l| [high(l); 3]).collect(),
        DynamicImage::ImageLumaA16(pixels) => {
            pixels.pixels().flat_map(|pixel| [on_white(high(&pixel[0]), high(&pixel[1])); 3]).collect()
        }
        DynamicImage::ImageRgba16(pixels) => {
            pixels.pixels().flat_map(|pixel| rgb_on_white(pixel.0.map(|sample| high(&sample)))).collect()
        }
        other => other.into_rgba8().pixels().flat_map(|pixel| rgb_on_white(pixel.0)).collect(),
    }
}

/// Blends a pixel with white.
pub(super) fn rgb_on_white([r, g, b, alpha]: [u8; 4]) -> [u8; 3] {
    [r, g, b].map(|sample| on_white(sample, alpha))
}

/// Blends a sample with white, rounded to nearest, as Pillow's `paste` with a mask does.
fn on_white(sample: u8, alpha: u8) -> u8 {
    let (sample, alpha) = (u32::from(sample), u32::from(alpha));
    ((255 * (255 - alpha) + sample * alpha + 127) / 255) as u8
}

#[cfg(test)]
mod tests {
    use image::codecs::gif::GifEncoder;
    use image::{Frame, ImageBuffer, LumaA, Rgb, Rgba};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const MAX_PIXELS: u64 = 1 << 20;

    fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut file = Cursor::new(Vec::new());
        image.write_to(&mut file, format).unwrap();
        file.into_inner()
    }

    fn decoded(file: &[u8]) -> Result<(Header, Vec<u8>), PictureError> {
        decode_picture(file, MAX_PIXELS)
    }

    fn noise(width: u32, height: u32) -> DynamicImage {
        let pixel = |x: u32, y: u32, c: u32| (x * 37 + y * 101 + c * 59 + x * y * 7) as u8;
        ImageBuffer::from_fn(width, height, |x, y| Rgb([0, 1, 2].map(|c| pixel(x, y, c)))).into()
    }

    #[test]
    fn lossless_formats_keep_every_pixel() {
        let image = noise(31, 17);
        for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Tiff] {
            let (header, pixels) = decoded(&encoded(&image, format)).unwrap();
            assert_eq!(header, Header { format, width: 31, height: 17 });
            assert_eq!(pixels, image.as_bytes(), "{format:?}");
        }
    }

    #[test]
    fn every_format_that_is_cut_short_is_refused() {
        let image = noise(64, 48);
        for format in FORMATS {
            let file = if format == ImageFormat::Gif {
                encoded(&image.to_rgba8().into(), format)
            } else {
                encoded(&image, format)
            };
            assert!(decoded(&file).is_ok(), "{format:?}");
            // The last bytes of some formats are not needed: a GIF's trailer, a PNG's checksum.
            for percent in [1, 5, 20, 50, 80, 90] {
                let cut = &file[..file.len() * percent / 100];
                assert!(decoded(cut).is_err(), "{format:?} at {percent}%");
            }
        }
    }

    #[test]
    fn refuses_what_is_no_picture() {
        assert!(matches!(decoded(b""), Err(PictureError::Empty)));
        assert!(matches!(decoded(b"%PDF-1.7 hello"), Err(PictureError::NotAPicture)));
        assert!(matches!(decoded(b"P6 1 1 255 abc"), Err(PictureError::UnsupportedFormat(_))));
        let mislabelled = [b"\x89PNG\r\n\x1a\n", &encoded(&noise(9, 9), ImageFormat::Jpeg)[..]].concat();
        assert!(matches!(decoded(&mislabelled), Err(PictureError::Malformed(_))));
    }

    #[test]
    fn refuses_by_the_header_before_decoding() {
        let mut bmp = encoded(&noise(8, 8), ImageFormat::Bmp);
        bmp[18..22].copy_from_slice(&60_000_u32.to_le_bytes());
        bmp[22..26].copy_from_slice(&60_000_u32.to_le_bytes());
        let error = decoded(&bmp).unwrap_err();
        assert_eq!(error, PictureError::TooManyPixels { width: 60_000, height: 60_000, max: MAX_PIXELS });
    }

    #[test]
    fn samples_of_16_bits_count_twice() {
        let image = ImageBuffer::from_pixel(1024, 600, Rgba([0_u16; 4])).into();
        let error = decoded(&encoded(&image, ImageFormat::Png)).unwrap_err();
        assert_eq!(error, PictureError::TooManyPixels { width: 1024, height: 600, max: MAX_PIXELS / 2 });
    }

    #[test]
    fn of_an_animation_the_first_frame_counts() {
        let mut file = Vec::new();
        let frame = |shade| Frame::new(ImageBuffer::from_pixel(5, 4, Rgba([shade, shade, shade, 255])));
        GifEncoder::new(&mut file).encode_frames([frame(10), frame(200)]).unwrap();
        let (header, pixels) = decoded(&file).unwrap();
        assert_eq!((header.width, header.height), (5, 4));
        assert_eq!(pixels, [10; 60]);
    }

    /// Files with a few bytes changed decode to something or are refused; they never bring the decoder down, and never
    /// give another number of pixels than their header says.
    #[test]
    fn broken_files_are_decoded_or_refused() {
        let image = noise(40, 30);
        let mut rng = StdRng::seed_from_u64(6);
        for format in FORMATS {
            let image = if format == ImageFormat::Gif { image.to_rgba8().into() } else { image.clone() };
            let whole = encoded(&image, format);
            for _ in 0..400 {
                let mut file = whole.clone();
                for _ in 0..rng.random_range(1..6) {
                    // Half of the changes are in the header, where they do most.
                    let end = if rng.random() { file.len().min(64) } else { file.len() };
                    file[rng.random_range(0..end)] = rng.random();
                }
                if let Ok((header, pixels)) = decoded(&file) {
                    assert_eq!(pixels.len(), header.width as usize * header.height as usize * 3);
                }
            }
        }
    }

    #[test]
    fn lays_transparency_on_white() {
        let image =
            ImageBuffer::from_fn(4, 1, |x, _| Rgba([200_u8, 100, 0, [0, 255, 128, 1][x as usize]])).into();
        let (_, pixels) = decoded(&encoded(&image, ImageFormat::Png)).unwrap();
        assert_eq!(pixels, [255, 255, 255, 200, 100, 0, 227, 177, 127, 255, 254, 254]);
        let gray = ImageBuffer::from_fn(2, 1, |x, _| LumaA([60_u8, [255, 0][x as usize]])).into();
        let (_, pixels) = decoded(&encoded(&gray, ImageFormat::Png)).unwrap();
        assert_eq!(pixels, [60, 60, 60, 255, 255, 255]);
    }

    #[test]
    fn takes_the_upper_half_of_wide_samples() {
        let image = ImageBuffer::from_pixel(1, 1, Rgb([0x01FF_u16, 0x80FF, 0xFF00])).into();
        let (_, pixels) = decoded(&encoded(&image, ImageFormat::Png)).unwrap();
        assert_eq!(pixels, [0x01, 0x80, 0xFF]);
    }

    /// Orientation 6: the file's rows are the picture's columns, right to left.
    #[test]
    fn applies_the_orientation() {
        let image = noise(3, 2);
        let exif = &b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"[..];
        let plain = encoded(&image, ImageFormat::Jpeg);
        let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
        let file = [&plain[..2], &[0xFF, 0xE1], &length, exif, &plain[2..]].concat();
        let (header, pixels) = decoded(&file).unwrap();
        assert_eq!((header.width, header.height), (2, 3));
        let (_, upright) = decoded(&plain).unwrap();
        let pixel = |pixels: &[u8], index: usize| pixels[index * 3..][..3].to_vec();
        for y in 0..3 {
            for x in 0..2 {
                assert_eq!(pixel(&pixels, y * 2 + x), pixel(&upright, (1 - x) * 3 + y));
            }
        }
    }

    #[test]
    fn blends_as_the_exact_quotient_rounded() {
        for sample in 0..=255_u8 {
            for alpha in 0..=255_u8 {
                let exact = 255.0 + (f64::from(sample) - 255.0) * f64::from(alpha) / 255.0;
                assert_eq!(f64::from(on_white(sample, alpha)), exact.round());
            }
        }
    }
}

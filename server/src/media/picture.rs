//! Picture files to what the model takes: measured, admitted, decoded, resized, hashed.

use std::sync::Arc;

use bytes::Bytes;

use super::decode::{Header, Source};
use super::medium::{self, MediaKind};
use super::resize::resize;
use super::size::{PictureOptions, PictureProcessor, PictureSize, SizeError};
use crate::workers::{Workers, WorkersError};

/// Pictures that are decoded at once. What decoding holds beside files and pixels is bounded by this and by
/// [`PictureLimits::max_source_pixels`], so that no request reserves it.
const DECODING_AT_ONCE: usize = 4;
/// Pictures that may wait to be decoded.
const WAITING_TO_DECODE: usize = 256;
/// Files whose headers are read at once. They do not wait behind decoding: what a request costs is told at once.
const READING_AT_ONCE: usize = 4;
/// Files that may wait for that.
const WAITING_TO_READ: usize = 256;

/// What pictures are admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PictureLimits {
    /// Bytes of the file.
    pub max_file_bytes: usize,
    /// Pixels that the file's header says.
    pub max_source_pixels: u64,
    /// Tokens in the prompt.
    pub max_tokens: u64,
}

impl Default for PictureLimits {
    /// 32 MiB, 64 megapixels, and the tokens of the largest picture that Qwen2.5-VL's own processor makes.
    fn default() -> Self {
        Self { max_file_bytes: 32 << 20, max_source_pixels: 64 << 20, max_tokens: 16_384 }
    }
}

/// Why a picture is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    /// No bytes.
    #[error("the picture is empty")]
    Empty,
    /// More bytes than are looked at.
    #[error("the picture's file has {bytes} bytes; at most {max}")]
    TooManyBytes {
        /// Size of the file.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// The file begins like no picture.
    #[error("this is not a picture: give PNG, JPEG, WebP, GIF, BMP or TIFF")]
    NotAPicture,
    /// A picture of a format that is not decoded.
    #[error("a picture of the format {0} is not supported: give PNG, JPEG, WebP, GIF, BMP or TIFF")]
    UnsupportedFormat(String),
    /// The header says more pixels than are decoded.
    #[error("the picture has {width} x {height} pixels; at most {max} in all")]
    TooManyPixels {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// The bound.
        max: u64,
    },
    /// The picture would take more of the prompt than is admitted.
    #[error(
        "the picture takes {tokens} tokens at {width} x {height} pixels; at most {max}: lower max_pixels"
    )]
    TooManyTokens {
        /// What it would take.
        tokens: u64,
        /// Its width for the model.
        width: u32,
        /// Its height for the model.
        height: u32,
        /// The bound.
        max: u64,
    },
    /// The picture has no size for the model, or the options are wrong.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The file is cut short or broken.
    #[error("the picture cannot be decoded: {0}")]
    Malformed(String),
    /// Too many pictures wait, or decoding panicked.
    #[error(transparent)]
    Workers(#[from] WorkersError),
}

impl PictureError {
    /// The fields of the public API's `Image` that are at fault, each with what is wrong. Empty if the picture is not
    /// at fault.
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Size(SizeError::Options(faults)) => {
                faults.iter().map(|fault| (fault.field, fault.problem.clone())).collect()
            }
            Self::Workers(WorkersError::Overloaded { .. }) => Vec::new(),
            // A decoder that panics does so because of the file.
            Self::Workers(WorkersError::Panicked { .. }) => {
                vec![("data", "the picture cannot be decoded".into())]
            }
            other => vec![("data", other.to_string())],
        }
    }
}

/// What a picture is and costs, told by its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// The file's header.
    pub source: Header,
    /// What the model will see.
    pub size: PictureSize,
}

/// A picture as the model takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// What it is and costs.
    pub measure: Measure,
    /// Rows top to bottom, three bytes (red, green, blue) each: height x width x 3.
    pub pixels: Bytes,
    /// BLAKE3 of kind, grid and pixels.
    pub hash: [u8; 32],
}

/// Prepares the pictures of one checkpoint, off the async threads, a bounded number at a time.
#[derive(Debug, Clone)]
pub struct PicturePreparer {
    rules: Arc<Rules>,
    readers: Workers,
    decoders: Workers,
}

#[derive(Debug)]
struct Rules {
    processor: PictureProcessor,
    limits: PictureLimits,
}

impl PicturePreparer {
    /// A preparer for a checkpoint's processor.
    pub fn new(processor: PictureProcessor, limits: PictureLimits) -> Self {
        Self {
            rules: Arc::new(Rules { processor, limits }),
            readers: Workers::new("reading pictures", READING_AT_ONCE, WAITING_TO_READ),
            decoders: Workers::new("decoding pictures", DECODING_AT_ONCE, WAITING_TO_DECODE),
        }
    }

    /// The checkpoint's processor.
    pub fn processor(&self) -> &PictureProcessor {
        &self.rules.processor
    }

    /// What is admitted.
    pub fn limits(&self) -> &PictureLimits {
        &self.rules.limits
    }

    /// Reads the header of a file that is to be a picture.
    pub async fn inspect(&self, file: Bytes) -> Result<Header, PictureError> {
        let rules = Arc::clone(&self.rules);
        self.readers.run(move || rules.open(&file).map(|source| source.header)).await?
    }

    /// What a picture would cost, from its header. Refuses what [`Self::prepare`] refuses before decoding.
    pub async fn measure(&self, file: Bytes, options: PictureOptions) -> Result<Measure, PictureError> {
        let rules = Arc::clone(&self.rules);
        self.readers.run(move || rules.admit(&file, &options).map(|(_, measure)| measure)).await?
    }

    /// Measures, admits, decodes, resizes and hashes a picture.
    pub async fn prepare(&self, file: Bytes, options: PictureOptions) -> Result<Picture, PictureError> {
        let rules = Arc::clone(&self.rules);
        self.decoders.run(move || rules.prepare(&file, &options)).await?
    }

    /// The header of a frame of a video, in this thread.
    pub(super) fn frame_header(&self, file: &[u8]) -> Result<Header, PictureError> {
        Ok(self.rules.open(file)?.header)
    }

    /// Decodes a frame of a video, and resizes it to `size`, width and height, in this thread.
    pub(super) fn frame(&self, file: &[u8], size: (u32, u32)) -> Result<Vec<u8>, PictureError> {
        decoded(self.rules.open(file)?, size)
    }
}

/// A picture's pixels at `size`.
fn decoded(source: Source, size: (u32, u32)) -> Result<Vec<u8>, PictureError> {
    let from = (source.header.width, source.header.height);
    resize(source.decode()?, from, size).map_err(PictureError::Malformed)
}

impl Rules {
    /// Reads a picture's header.
    fn open<'a>(&self, file: &'a [u8]) -> Result<Source<'a>, PictureError> {
        let limits = &self.limits;
        if file.len() > limits.max_file_bytes {
            return Err(PictureError::TooManyBytes { bytes: file.len(), max: limits.max_file_bytes });
        }
        Source::open(file, limits.max_source_pixels)
    }

    fn admit<'a>(
        &self,
        file: &'a [u8],
        options: &PictureOptions,
    ) -> Result<(Source<'a>, Measure), PictureError> {
        let limits = &self.limits;
        let source = self.open(file)?;
        let size = self.processor.size(source.header.width, source.header.height, options)?;
        if size.num_tokens > limits.max_tokens {
            let PictureSize { width, height, num_tokens: tokens, .. } = size;
            return Err(PictureError::TooManyTokens { tokens, width, height, max: limits.max_tokens });
        }
        let measure = Measure { source: source.header, size };
        Ok((source, measure))
    }

    fn prepare(&self, file: &[u8], options: &PictureOptions) -> Result<Picture, PictureError> {
        let (source, measure) = self.admit(file, options)?;
        let size = measure.size;
        let pixels = decoded(source, (size.width, size.height))?;
        let hash = medium::hash(MediaKind::Image, size.grid, 0.0, &pixels);
        Ok(Picture { measure, pixels: pixels.into(), hash })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{ImageFormat, RgbImage};

    use super::*;

    fn png(width: u32, height: u32) -> Bytes {
        let mut file = Cursor::new(Vec::new());
        let image = RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 7]));
        image.write_to(&mut file, ImageFormat::Png).unwrap();
        file.into_inner().into()
    }

    fn preparer() -> PicturePreparer {
        let limits = PictureLimits { max_file_bytes: 1 << 20, max_source_pixels: 1 << 20, max_tokens: 16 };
        PicturePreparer::new(PictureProcessor { min_pixels: 784, ..Default::default() }, limits)
    }

    #[tokio::test]
    async fn prepares_a_picture() {
        let picture = preparer().prepare(png(70, 30), PictureOptions::default()).await.unwrap();
        let Measure { source, size } = picture.measure;
        assert_eq!((size.width, size.height, size.grid), (56, 28, [1, 2, 4]));
        assert_eq!((source.width, source.height), (70, 30));
        assert_eq!((size.num_tokens, picture.pixels.len()), (2, 56 * 28 * 3));
        let measure = preparer().measure(png(70, 30), PictureOptions::default()).await.unwrap();
        assert_eq!(measure, picture.measure);
    }

    #[tokio::test]
    async fn refuses_by_cost_and_names_the_field() {
        let options = |max_pixels| PictureOptions { max_pixels, ..Default::default() };
        let error = preparer().prepare(png(140, 140), options(None)).await.unwrap_err();
        assert!(matches!(error, PictureError::TooManyTokens { tokens: 25, max: 16, .. }), "{error}");
        assert_eq!(error.faults()[0].0, "data");
        assert!(preparer().prepare(png(140, 140), options(Some(12_544))).await.is_ok());
        let error = preparer().prepare(png(140, 140), options(Some(0))).await.unwrap_err();
        assert_eq!(error.faults()[0].0, "max_pixels");
        let error = preparer().prepare(vec![0; (1 << 20) + 1].into(), options(None)).await.unwrap_err();
        assert!(matches!(error, PictureError::TooManyBytes { .. }));
    }
}

//! A picture or a video, whichever it is.

use bytes::Bytes;

use super::picture::{Measure, Picture, PictureError, PicturePreparer};
use super::size::PictureOptions;
use super::video::{PrepareError, VideoInput, VideoPreparer};

/// Picture or video.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MediaKind {
    /// A picture.
    Image,
    /// A video.
    Video,
}

/// A medium as it was sent, and how the model shall see it.
#[derive(Debug, Clone, PartialEq)]
pub enum MediumInput {
    /// A picture's file.
    Image(Bytes, PictureOptions),
    /// A video's file, or its frames.
    Video(VideoInput),
}

/// What a medium is for the model, told by its headers.
#[derive(Debug, Clone, PartialEq)]
pub struct MediumInfo {
    /// Picture or video.
    pub kind: MediaKind,
    /// Width and height in pixels of what was sent, upright.
    pub source: (u32, u32),
    /// Width and height in pixels as the model sees it.
    pub size: (u32, u32),
    /// Patches in time, height and width.
    pub grid: [u32; 3],
    /// Tokens in the prompt.
    pub num_tokens: u64,
    /// The second at which each frame that is taken of a video is shown; none for a picture.
    pub timestamps_s: Vec<f64>,
    /// Seconds between two temporal patches; 0 for a picture.
    pub seconds_per_grid_t: f64,
    /// Pixels to be decoded: of a video's file those of all frames, taken or not.
    pub decoded_pixels: u64,
}

impl MediumInfo {
    /// Bytes of the pixels at the model's size: red, green and blue.
    pub fn pixel_bytes(&self) -> u64 {
        let frames = self.timestamps_s.len().max(1) as u64;
        (u64::from(self.size.0) * u64::from(self.size.1) * 3).saturating_mul(frames)
    }
}

/// A medium as the model takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Medium {
    /// What it is.
    pub info: MediumInfo,
    /// Frames in order, rows top to bottom, three bytes (red, green, blue) a pixel.
    pub pixels: Bytes,
    /// BLAKE3 of kind, grid, seconds between temporal patches, and pixels.
    pub hash: [u8; 32],
}

/// Why a medium is not taken.
#[derive(Debug, thiserror::Error)]
pub enum MediaError {
    /// A picture.
    #[error(transparent)]
    Image(#[from] PictureError),
    /// A video.
    #[error(transparent)]
    Video(#[from] PrepareError),
}

/// What to tell a client of a medium that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blame {
    /// These fields of the public API's `Part`, each with what is wrong.
    Fields(Vec<(String, String)>),
    /// Too much is asked of this server for now.
    Load(String),
    /// A fault of our own.
    Server(String),
}

impl MediaError {
    /// Who or what is at fault.
    pub fn blame(&self) -> Blame {
        let (part, faults) = match self {
            Self::Image(error) => {
                let faults = error.faults();
                ("image", faults.into_iter().map(|(field, problem)| (field.to_owned(), problem)).collect())
            }
            Self::Video(error) => match error.blame() {
                Blame::Fields(faults) => ("video", faults),
                other => return other,
            },
        };
        if faults.is_empty() {
            return Blame::Load(self.to_string());
        }
        Blame::Fields(
            faults.into_iter().map(|(field, problem)| (format!("{part}.{field}"), problem)).collect(),
        )
    }
}

/// Prepares pictures and videos.
#[derive(Debug, Clone)]
pub struct MediaPreparer {
    /// For pictures, and for frames that are given one by one.
    pub pictures: PicturePreparer,
    /// For videos.
    pub videos: VideoPreparer,
}

impl MediaPreparer {
    /// Checks that a file begins as a medium of its kind does.
    pub async fn inspect(&self, kind: MediaKind, file: Bytes) -> Result<(), MediaError> {
        match kind {
            MediaKind::Image => self.pictures.inspect(file).await.map(|_| ())?,
            MediaKind::Video => self.videos.inspect(file).await?,
        }
        Ok(())
    }

    /// What a medium would cost, from its headers. Refuses what [`Self::prepare`] refuses before decoding.
    pub async fn measure(&self, medium: MediumInput) -> Result<MediumInfo, MediaError> {
        Ok(match medium {
            MediumInput::Image(file, options) => self.pictures.measure(file, options).await?.into(),
            MediumInput::Video(video) => self.videos.measure(&self.pictures, video).await?,
        })
    }

    /// Measures, admits, decodes, resizes and hashes a medium. Dropping the future ends the process that decodes a video.
    pub async fn prepare(&self, medium: MediumInput) -> Result<Medium, MediaError> {
        Ok(match medium {
            MediumInput::Image(file, options) => self.pictures.prepare(file, options).await?.into(),
            MediumInput::Video(video) => self.videos.prepare(&self.pictures, video).await?,
        })
    }
}

impl From<Measure> for MediumInfo {
    fn from(Measure { source, size }: Measure) -> Self {
        Self {
            kind: MediaKind::Image,
            source: (source.width, source.height),
            size: (size.width, size.height),
            grid: size.grid,
            num_tokens: size.num_tokens,
            timestamps_s: Vec::new(),
            seconds_per_grid_t: 0.0,
            decoded_pixels: u64::from(source.width) * u64::from(source.height),
        }
    }
}

impl From<Picture> for Medium {
    fn from(picture: Picture) -> Self {
        Self { info: picture.measure.into(), pixels: picture.pixels, hash: picture.hash }
    }
}

/// The hash of a medium. Two media of the same bytes and another kind, shape or time are different.
pub(super) fn hash(kind: MediaKind, grid: [u32; 3], seconds_per_grid_t: f64, pixels: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[kind as u8]);
    for patches in grid {
        hasher.update(&patches.to_le_bytes());
    }
    hasher.update(&seconds_per_grid_t.to_le_bytes());
    hasher.update(pixels);
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_covers_kind_grid_and_time() {
        let base = hash(MediaKind::Video, [1, 2, 4], 1.0, &[0; 24]);
        assert_eq!(base, hash(MediaKind::Video, [1, 2, 4], 1.0, &[0; 24]));
        for other in [
            hash(MediaKind::Image, [1, 2, 4], 1.0, &[0; 24]),
            hash(MediaKind::Video, [1, 4, 2], 1.0, &[0; 24]),
            hash(MediaKind::Video, [1, 2, 4], 1.0 + f64::EPSILON, &[0; 24]),
            hash(MediaKind::Video, [1, 2, 4], 1.0, &[1; 24]),
        ] {
            assert_ne!(base, other);
        }
    }
}

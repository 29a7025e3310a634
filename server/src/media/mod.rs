//! Pictures and videos: from the bytes of a file to pixels at the size that the model sees.
//!
//! Headers are read first and tell what a medium costs; only a medium that is admitted is decoded.

mod decode;
#[cfg(test)]
mod golden_tests;
mod jpeg;
mod library;
mod medium;
mod picture;
mod resize;
mod size;
pub mod video;
mod webp;

pub use decode::{Header, decode_picture};
pub use library::{MediaId, MediaLibrary, TooLarge};
pub use medium::{Blame, MediaError, MediaKind, MediaPreparer, Medium, MediumInfo, MediumInput};
pub use picture::{Measure, Picture, PictureError, PictureLimits, PicturePreparer};
pub use size::{OptionFault, PictureOptions, PictureProcessor, PictureSize, SizeError, smart_resize};

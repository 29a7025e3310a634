//! Pictures: from the bytes of a file to pixels at the size that the model sees.
//!
//! The header is read first and tells what a picture costs; only a picture that is admitted is decoded.

mod decode;
#[cfg(test)]
mod golden_tests;
mod jpeg;
mod library;
mod picture;
mod resize;
mod size;

pub use decode::Header;
pub use library::{MediaId, MediaKind, MediaLibrary, TooLarge};
pub use picture::{Measure, Picture, PictureError, PictureLimits, PicturePreparer};
pub use size::{OptionFault, PictureOptions, PictureProcessor, PictureSize, SizeError, smart_resize};

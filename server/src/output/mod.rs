//! From tokens back to text: incremental detokenization and stop strings.

mod detokenizer;
mod stop;
mod stream;

pub use detokenizer::Detokenizer;
pub use stop::{StopError, StopStrings};
pub use stream::{OutputStream, Piece};

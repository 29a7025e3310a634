//! Layers that own tensor parallelism: each knows its slice of the checkpoint and whether its result is one
//! addend of a sum over ranks.

pub mod draw;
pub mod linear;
pub mod mlp;
pub mod partition;
pub mod patch;
pub mod truncation;
pub mod vocabulary;

pub use draw::Drawn;
pub use linear::{ColumnParallel, LinearSpec, QkvParallel, RowParallel};
pub use mlp::{GatedMlp, MLP_CHUNK_ROWS};
pub use partition::{HeadRange, Parallel};
pub use patch::PatchEmbed;
pub use vocabulary::{Drawing, VocabParallelEmbedding, VocabParallelHead, VocabSlice};

//! All tests of a rank but one, in one program: the model is compiled for it once. `memory.rs` is alone in its process.

mod common;
mod epochs;
mod flips;
mod goldens;
mod loading;
mod model;
mod not_finite;
mod oracle;
mod positions;
mod ranks;
mod regroup;
mod repeatable;
mod service;

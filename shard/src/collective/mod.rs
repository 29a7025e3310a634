//! How ranks meet: all-reduce, all-gather and barrier.

pub mod api;

pub use api::*;

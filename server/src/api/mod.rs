//! The public API: protobuf stops here.

pub mod convert;
pub mod fault;
pub mod respond;
pub mod service;

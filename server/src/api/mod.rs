//! The public API: protobuf stops here.

pub mod convert;
pub mod fault;
pub mod metered;
pub mod respond;
pub mod service;

//! The public API: protobuf stops here.

pub mod caller;
pub mod convert;
pub mod expired;
pub mod fault;
pub mod metered;
pub mod respond;
pub mod service;
pub mod timeout;
pub mod upload;

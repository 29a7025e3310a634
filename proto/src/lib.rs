//! The protobuf packages of Lockstep and their generated code.
//!
//! [`v1`] is the public API that clients speak; [`shard`] is the internal protocol between the server and its shards.
//! There is no logic here, but for the bound on what a request may take when it is decoded ([`codec`]).

#![forbid(unsafe_code)]

pub mod codec;

/// The public API, package `lockstep.v1`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("lockstep.v1");
}

/// The internal protocol between server and shards, package `lockstep.shard.v1`.
#[allow(missing_docs, clippy::all)]
pub mod shard {
    tonic::include_proto!("lockstep.shard.v1");
}

/// The encoded `FileDescriptorSet` of both packages, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

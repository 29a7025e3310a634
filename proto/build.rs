//! Compiles the `.proto` files with a protobuf compiler written in Rust, so that no `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let files = ["lockstep/v1/inference.proto", "lockstep/shard/v1/shard.proto"];
    let descriptors = protox::compile(files, [&root])?;
    let public = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(public, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    for file in files {
        println!("cargo:rerun-if-changed={}", root.join(file).display());
    }
    Ok(())
}

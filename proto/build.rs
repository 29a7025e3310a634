//! Compiles the `.proto` files with a protobuf compiler written in Rust, so that no `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;
use prost_types::field_descriptor_proto::Type;
use tonic_prost_build::{Config, FileDescriptorSet};

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let files = ["lockstep/v1/inference.proto", "lockstep/shard/v1/shard.proto"];
    let descriptors = protox::compile(files, [&root])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    fs::write(out.join("fields.rs"), fields(&descriptors))?;
    let mut config = Config::new();
    config.enable_type_names();
    let builder = tonic_prost_build::configure().bytes(".").codec_path("crate::codec::BoundedCodec");
    builder.compile_fds_with_config(descriptors, config)?;
    for file in files {
        println!("cargo:rerun-if-changed={}", root.join(file).display());
    }
    Ok(())
}

/// Rust: of each message, by its full name, what `codec.rs` has to know of its fields.
fn fields(descriptors: &FileDescriptorSet) -> String {
    let mut messages = Vec::new();
    for file in &descriptors.file {
        let name = |name: &str| format!("{}.{name}", file.package());
        // The entries of maps are messages, too, and lie in those that have them: they hold no others.
        for message in &file.message_type {
            let fields = message.field.iter().map(|field| {
                let of = field.type_name().trim_start_matches('.');
                let kind = match field.r#type() {
                    Type::Message if file.message_type.iter().any(|message| name(message.name()) == of) => {
                        format!("Kind::Message({of:?})")
                    }
                    Type::Message | Type::String | Type::Bytes => "Kind::Other".to_owned(),
                    _ => "Kind::Numbers".to_owned(),
                };
                format!("Field {{ number: {}, name: {:?}, kind: {kind} }}", field.number(), field.name())
            });
            let fields: Vec<_> = fields.collect();
            messages.push(format!("({:?}, &[{}])", name(message.name()), fields.join(", ")));
        }
    }
    messages.sort();
    format!("static FIELDS: &[(&str, &[Field])] = &[{}];\n", messages.join(",\n"))
}

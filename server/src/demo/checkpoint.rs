//! The demonstration checkpoint, which is part of the binary.

use std::path::Path;

use anyhow::Context;

macro_rules! files {
    ($($name:literal),+ $(,)?) => {
        [$(($name, include_bytes!(concat!("../../../tests/checkpoints/shapes/", $name)))),+]
    };
}

/// Names and contents.
const FILES: [(&str, &[u8]); 7] = files![
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Writes the checkpoint into a folder, in the Hugging Face layout.
///
/// # Errors
/// A file cannot be written.
pub fn write(folder: &Path) -> anyhow::Result<()> {
    for (name, content) in FILES {
        std::fs::write(folder.join(name), content).with_context(|| format!("writing {name}"))?;
    }
    Ok(())
}

//! What unit tests read of the repository's goldens.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use sha2::{Digest, Sha256};

/// A file, by its path from the repository's root.
pub(crate) fn path(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

pub(crate) fn json(file: &str) -> Value {
    serde_json::from_slice(&fs::read(path(file)).unwrap()).unwrap()
}

/// The cases of a file, each with a name to say which one failed.
pub(crate) fn cases(file: &str) -> Vec<Value> {
    json(file)["cases"].as_array().unwrap().clone()
}

/// The checkpoints that have goldens of whole answers.
pub(crate) const CHECKPOINTS: [&str; 7] = ["a", "b", "c", "d", "e", "f", "g"];

/// A folder with the full tokenizer, unpacked, and the released checkpoint's small files.
pub(crate) fn full_tokenizer_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut packed = fs::read(path("tests/tokenizer/tokenizer.json.xz")).map(std::io::Cursor::new).unwrap();
    let mut unpacked =
        std::io::BufWriter::new(fs::File::create(folder.path().join("tokenizer.json")).unwrap());
    lzma_rs::xz_decompress(&mut packed, &mut unpacked).unwrap();
    std::io::Write::flush(&mut unpacked).unwrap();
    for entry in fs::read_dir(path("tests/tokenizer/model")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

pub(crate) fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as u32).collect()
}

pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

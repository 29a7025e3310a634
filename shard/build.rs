//! Hashes what server and shards must have in common, for the build id.

use std::{env, error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let shard = env::var("CARGO_MANIFEST_DIR")?;
    let shard = Path::new(&shard);
    let mut hash = Fnv::default();
    for part in [shard.join("src"), shard.join("../proto/lockstep/shard"), shard.join("Cargo.toml")] {
        println!("cargo:rerun-if-changed={}", part.display());
        hash_tree(&part, &mut hash)?;
    }
    println!("cargo:rustc-env=LOCKSTEP_BUILD_HASH={:016x}", hash.0);
    Ok(())
}

/// Hashes names and contents of all files under `path`, in the order of their names.
fn hash_tree(path: &Path, hash: &mut Fnv) -> Result<(), Box<dyn Error>> {
    hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
    if path.is_dir() {
        let mut children =
            fs::read_dir(path)?.map(|e| Ok(e?.path())).collect::<Result<Vec<_>, std::io::Error>>()?;
        children.sort();
        children.iter().try_for_each(|child| hash_tree(child, hash))
    } else {
        hash.update(&fs::read(path)?);
        Ok(())
    }
}

/// FNV-1a, 64 bits: a build script needs no defence against forgers.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn update(&mut self, bytes: &[u8]) {
        // The length keeps a name and the content behind it apart.
        for byte in bytes.len().to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

//! Checksums that were published beside a checkpoint. Its own format has none, so that a bit that flipped on the way here or on the
//! disk is a weight like any other.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs, io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use sha2::{Digest, Sha256};

use super::checkpoint::{Checkpoint, CheckpointFault};

/// As `sha256sum *.safetensors > SHA256SUMS` writes it.
const SUMS_FILE: &str = "SHA256SUMS";

impl Checkpoint {
    /// Reads all files that `SHA256SUMS` in the checkpoint's folder lists, and compares. Nothing is read where there is no such
    /// file. Returns what is wrong.
    pub fn compare_with_sums(&self) -> Vec<CheckpointFault> {
        let of_file = |file: &str, problem: String| CheckpointFault::File { file: file.into(), problem };
        let sums = match fs::read_to_string(self.dir().join(SUMS_FILE)) {
            Ok(text) => read_sums(&text).map_err(|problem| of_file(SUMS_FILE, problem)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => Err(of_file(SUMS_FILE, error.to_string())),
        };
        let sums = match sums {
            Ok(sums) => sums,
            Err(fault) => return vec![fault],
        };
        let listed: Vec<_> =
            self.files().filter_map(|(name, bytes)| Some((name, bytes, sums.get(name)?))).collect();
        tracing::info!(files = listed.len(), "compares files with {SUMS_FILE}");
        let (next, faults) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let compare = || {
            while let Some((name, bytes, expected)) = listed.get(next.fetch_add(1, Ordering::Relaxed)) {
                let found = hex(&Sha256::digest(bytes));
                if found != **expected {
                    let problem = format!("its SHA-256 is {found}, {SUMS_FILE} says {expected}");
                    faults.lock().unwrap_or_else(PoisonError::into_inner).push(of_file(name, problem));
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..thread::available_parallelism().map_or(1, usize::from).min(listed.len()) {
                scope.spawn(compare);
            }
            compare();
        });
        faults.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sums by file: lines of `HEX  NAME`, or `HEX *NAME`.
fn read_sums(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut sums = BTreeMap::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let parts = line
            .split_once(' ')
            .filter(|(sum, _)| sum.len() == 64 && sum.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let (sum, name) = parts.ok_or_else(|| format!("line {} is not a sum and a name", i + 1))?;
        let name = name.trim_start_matches([' ', '*']).trim_end();
        sums.insert(name.strip_prefix("./").unwrap_or(name).to_owned(), sum.to_ascii_lowercase());
    }
    Ok(sums)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_read_as_they_are_written() {
        let (a, b) = ("0A".repeat(32), "ff".repeat(32));
        let sums = read_sums(&format!("{a}  ./model.safetensors\n\n{b} *other file\n")).expect("valid");
        assert_eq!(sums["model.safetensors"], "0a".repeat(32));
        assert_eq!(sums["other file"], b);
        for wrong in ["model.safetensors", "0a  model", &format!("{}  model", "0g".repeat(32))] {
            assert_eq!(read_sums(&format!("{b}  x\n{wrong}")).unwrap_err(), "line 2 is not a sum and a name");
        }
    }
}

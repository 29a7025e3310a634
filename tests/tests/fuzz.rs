//! The fuzz targets on their corpora, and on seeded changes of each file: `tests/fuzz/README.md`.

use std::path::Path;

use lockstep::fuzzing::{self, Prompts};
use lockstep_tests::golden::root;
use lockstep_tests::hostile;
use prost::Message;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Changed files made of each file.
const CHANGES: usize = 30;
const SEED: u64 = 1;
/// Larger files are fed as they are, but not changed: they take long.
const MAX_CHANGED_BYTES: usize = 20_000;

/// The files of folders, in the order of their names.
fn files(folders: &[&str]) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut paths = Vec::new();
    for folder in folders {
        let folder = root().join(folder);
        if folder.is_dir() {
            paths.extend(std::fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path())));
        }
    }
    paths.sort();
    let files = paths.iter().filter(|path| path.is_file());
    files.map(|path| Ok(std::fs::read(path)?)).collect()
}

/// A file with a few bytes changed, a piece left out or doubled, or its end cut off.
fn changed(file: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let mut file = file.to_vec();
    for _ in 0..rng.random_range(1..5) {
        if file.is_empty() {
            break;
        }
        // Headers decide most.
        let end = if rng.random() { file.len().min(256) } else { file.len() };
        let at = rng.random_range(0..end);
        let length = rng.random_range(0..=(file.len() - at).min(40));
        match rng.random_range(0..6) {
            0 => drop(file.drain(at..at + length)),
            1 => {
                let piece = file[at..at + length].to_vec();
                file.splice(at..at, piece);
            }
            2 => file.truncate(at),
            3 => file[at] = [0, 1, 0x7F, 0x80, 0xFE, 0xFF][rng.random_range(0..6)],
            _ => file[at] = rng.random(),
        }
    }
    file
}

fn feed(files: &[Vec<u8>], target: impl Fn(&[u8])) {
    assert!(!files.is_empty());
    let mut rng = StdRng::seed_from_u64(SEED);
    for file in files {
        target(file);
        if file.len() <= MAX_CHANGED_BYTES {
            (0..CHANGES).for_each(|_| target(&changed(file, &mut rng)));
        }
    }
}

#[test]
fn pictures() -> anyhow::Result<()> {
    feed(&files(&["tests/fuzz/corpus/picture", "tests/pictures", "tests/hostile"])?, fuzzing::picture);
    Ok(())
}

#[test]
fn videos() -> anyhow::Result<()> {
    feed(&files(&["tests/fuzz/corpus/video", "tests/videos", "tests/hostile"])?, fuzzing::video);
    Ok(())
}

/// Writes the short requests of the catalogue, for coverage-guided runs to begin with: one for each length.
#[test]
#[ignore = "writes files"]
fn corpus_of_requests() -> anyhow::Result<()> {
    let requests = hostile::catalogue()?.into_iter().map(|case| case.request.encode_to_vec());
    for request in requests.filter(|request| request.len() < 256) {
        std::fs::write(root().join(format!("tests/fuzz/corpus/request/{:03}", request.len())), request)?;
    }
    Ok(())
}

#[test]
fn requests() -> anyhow::Result<()> {
    let mut requests = files(&["tests/fuzz/corpus/request"])?;
    requests.extend(hostile::catalogue()?.into_iter().map(|case| case.request.encode_to_vec()));
    feed(&requests, fuzzing::request);
    Ok(())
}

#[test]
fn prompts() -> anyhow::Result<()> {
    let prompts = Prompts::open(Path::new(&root().join("tests/checkpoints/a")));
    feed(&files(&["tests/fuzz/corpus/prompt"])?, |texts| prompts.check(texts));
    Ok(())
}

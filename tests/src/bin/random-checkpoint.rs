//! Writes a checkpoint of random weights with the dimensions of a released one and the real tokenizer: for benches, never for answers.
//!
//! `random-checkpoint --config 7b /dev/shm/7b`. The file is written in pieces by all processors at once, so that nothing of size is held in
//! memory; its bytes follow from the seed alone.

#![forbid(unsafe_code)]

use std::{
    fs::{self, File},
    io::BufReader,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use lockstep_shard::{config::Config, weights::random::RandomModel};
use serde_json::{Map, Value, json};

/// Elements of a piece: the unit of work, and of random numbers.
const PIECE_ELEMENTS: usize = 2 << 20;

/// Bytes of an element of bf16.
const ELEMENT_BYTES: usize = 2;

/// The files beside the weights, which are those of the 7B checkpoint.
const TEXT_FILES: [&str; 4] =
    ["chat_template.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"];

/// Writes a checkpoint of random weights.
#[derive(Parser)]
struct Args {
    /// Whose dimensions
    #[arg(long, value_enum)]
    config: Dimensions,
    /// Seed of the weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder that has the tokenizer [default: tests/tokenizer of the source tree]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Folder to make
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dimensions {
    /// Qwen2.5-VL-7B-Instruct
    #[value(name = "7b")]
    Of7B,
    /// Qwen2.5-VL-3B-Instruct
    #[value(name = "3b")]
    Of3B,
    /// Few, narrow layers with heads as wide as those of the 7B model, to try a command on
    Small,
}

impl Dimensions {
    /// The configuration: that of the 7B model, with what differs from it.
    fn apply(self, config: &mut Value) {
        let set = |config: &mut Value, fields: Value| {
            let Value::Object(fields) = fields else { return };
            fields.into_iter().for_each(|(name, value)| config[name.as_str()] = value);
        };
        match self {
            Dimensions::Of7B => {}
            Dimensions::Of3B => {
                let text = json!({
                    "hidden_size": 2048,
                    "intermediate_size": 11008,
                    "max_window_layers": 70,
                    "num_attention_heads": 16,
                    "num_hidden_layers": 36,
                    "num_key_value_heads": 2,
                    "tie_word_embeddings": true,
                    "vocab_size": 151_936,
                });
                set(config, text);
                set(&mut config["vision_config"], json!({ "out_hidden_size": 2048 }));
            }
            Dimensions::Small => {
                let text = json!({
                    "hidden_size": 512,
                    "intermediate_size": 688,
                    "num_attention_heads": 4,
                    "num_hidden_layers": 2,
                    "num_key_value_heads": 2,
                });
                set(config, text);
                let vision = json!({
                    "depth": 2,
                    "fullatt_block_indexes": [1],
                    "hidden_size": 160,
                    "intermediate_size": 212,
                    "num_heads": 2,
                    "out_hidden_size": 512,
                });
                set(&mut config["vision_config"], vision);
            }
        }
    }
}

/// A tensor's place in the file.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    first_byte: u64,
}

impl Tensor {
    fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Norms are one; biases are small; matrices keep the variance of their input. Activations stay finite in bf16.
    fn bound(&self) -> Option<f32> {
        let is_norm = self.name.contains("norm") || self.name.ends_with("ln_q.weight");
        let fan_in: usize = self.shape[1..].iter().product();
        match self.shape.len() {
            _ if is_norm => None,
            1 => Some(0.02),
            _ => Some((3.0 / fan_in as f32).sqrt()),
        }
    }
}

/// Elements `first..first + count` of a tensor.
struct Piece {
    tensor: usize,
    first: usize,
    count: usize,
}

fn main() -> Result<()> {
    let Args { config: dimensions, seed, tokenizer, out } = Args::parse();
    let tokenizer = tokenizer.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tokenizer"));
    let start = Instant::now();
    fs::create_dir_all(&out)?;
    write_texts(dimensions, &tokenizer, &out).with_context(|| tokenizer.display().to_string())?;
    let bytes = write_weights(&Config::open(&out)?, seed, &out.join("model.safetensors"))?;
    println!("{}: {bytes} bytes of weights in {:.1} s", out.display(), start.elapsed().as_secs_f64());
    Ok(())
}

fn write_texts(dimensions: Dimensions, tokenizer: &Path, out: &Path) -> Result<()> {
    let model = tokenizer.join("model");
    for name in TEXT_FILES {
        fs::copy(model.join(name), out.join(name)).context(name)?;
    }
    let mut config = serde_json::from_slice(&fs::read(model.join("config.json"))?)?;
    dimensions.apply(&mut config);
    fs::write(out.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    let mut packed = BufReader::new(File::open(tokenizer.join("tokenizer.json.xz"))?);
    let mut plain = Vec::new();
    lzma_rs::xz_decompress(&mut packed, &mut plain).context("tokenizer.json.xz")?;
    Ok(fs::write(out.join("tokenizer.json"), plain)?)
}

/// Names and shapes of all tensors of a configuration, as the released checkpoints have them.
fn shapes(config: &Config, seed: u64) -> Vec<(String, Vec<usize>)> {
    let Config { text, vision, .. } = config;
    let model = RandomModel {
        vocab_size: text.vocab_size,
        hidden_size: text.hidden_size,
        num_hidden_layers: text.num_hidden_layers,
        num_attention_heads: text.num_attention_heads,
        num_key_value_heads: text.num_key_value_heads,
        intermediate_size: text.intermediate_size,
        vision_hidden_size: vision.hidden_size,
        vision_depth: vision.depth,
        vision_num_heads: vision.num_heads,
        vision_intermediate_size: vision.intermediate_size,
        seed,
    };
    let mut shapes = model.shapes();
    shapes.retain(|(name, _)| !(config.tie_word_embeddings && name == "lm_head.weight"));
    shapes
}

/// Writes all tensors to one file; the bytes of their elements.
fn write_weights(config: &Config, seed: u64, path: &Path) -> Result<usize> {
    let (mut header, mut end) = (Map::new(), 0);
    let mut tensors = Vec::new();
    for (name, shape) in shapes(config, seed) {
        let (first, count) = (end, shape.iter().product::<usize>());
        end += ELEMENT_BYTES * count;
        header.insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [first, end] }));
        tensors.push(Tensor { name, shape, first_byte: first as u64 });
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let first_byte = (8 + header.len()) as u64;
    tensors.iter_mut().for_each(|tensor| tensor.first_byte += first_byte);

    // Under its name when it is whole.
    let unfinished = path.with_extension("part");
    let file = File::create(&unfinished)?;
    file.set_len(first_byte + end as u64)?;
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0)?;
    file.write_all_at(&header, 8)?;
    let pieces: Vec<Piece> = (0..tensors.len()).flat_map(|tensor| pieces(&tensors, tensor)).collect();
    let next = AtomicUsize::new(0);
    let worker = || -> Result<()> {
        let mut bytes = Vec::with_capacity(ELEMENT_BYTES * PIECE_ELEMENTS);
        while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < pieces.len()) {
            let Piece { tensor, first, count } = pieces[index];
            let seed = seed.wrapping_mul(1 << 32).wrapping_add(index as u64);
            fill(&tensors[tensor], seed, count, &mut bytes);
            file.write_all_at(&bytes, tensors[tensor].first_byte + (ELEMENT_BYTES * first) as u64)?;
        }
        Ok(())
    };
    let num_threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..num_threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    ensure!(file.metadata()?.len() == first_byte + end as u64, "the file has another length");
    fs::rename(unfinished, path)?;
    Ok(end)
}

fn pieces(tensors: &[Tensor], tensor: usize) -> impl Iterator<Item = Piece> {
    let total = tensors[tensor].num_elements();
    let firsts = (0..total).step_by(PIECE_ELEMENTS);
    firsts.map(move |first| Piece { tensor, first, count: PIECE_ELEMENTS.min(total - first) })
}

/// The bytes of `count` elements.
fn fill(tensor: &Tensor, seed: u64, count: usize, bytes: &mut Vec<u8>) {
    bytes.clear();
    let Some(bound) = tensor.bound() else {
        bytes.extend([0x80, 0x3f].repeat(count));
        return;
    };
    let scale = bound / f32::from(i16::MAX);
    let mut state = seed;
    while bytes.len() < ELEMENT_BYTES * count {
        let word = split_mix_64(&mut state);
        for lane in 0..4 {
            let value = f32::from((word >> (16 * lane)) as i16) * scale;
            bytes.extend(rounded(value).to_le_bytes());
        }
    }
    bytes.truncate(ELEMENT_BYTES * count);
}

/// The bf16 nearest to a number that is not too large, even where two are.
fn rounded(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Sebastiano Vigna's SplitMix64 (public domain, 2015): a word of random bits in a nanosecond.
fn split_mix_64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_bytes_for_the_same_seed() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tokenizer");
        write_texts(Dimensions::Small, &tokenizer, folder.path())?;
        let mut config = Config::open(folder.path())?;
        // Without what is largest and says nothing.
        config.text.vocab_size = 1000;
        let write = |name: &str, seed: u64| -> Result<Vec<u8>> {
            write_weights(&config, seed, &folder.path().join(name))?;
            Ok(fs::read(folder.path().join(name))?)
        };
        let one = write("one", 1)?;
        assert_eq!(one, write("two", 1)?);
        assert_ne!(one, write("three", 2)?);
        Ok(())
    }

    #[test]
    fn elements_are_within_their_bound() {
        let tensor =
            |name: &str, shape: &[usize]| Tensor { name: name.into(), shape: shape.into(), first_byte: 0 };
        let values = |tensor: &Tensor, count: usize| -> Vec<f32> {
            let mut bytes = Vec::new();
            fill(tensor, 7, count, &mut bytes);
            let bits = bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
            bits.map(|bits| f32::from_bits(u32::from(bits) << 16)).collect()
        };
        assert_eq!(values(&tensor("norm.weight", &[5]), 5), [1.0; 5]);
        let matrix = values(&tensor("o_proj.weight", &[100, 300]), 30_001);
        assert_eq!(matrix.len(), 30_001);
        let variance = matrix.iter().map(|x| x * x).sum::<f32>() / matrix.len() as f32;
        assert!((variance * 300.0 - 1.0).abs() < 0.05, "{variance}");
        assert!(matrix.iter().all(|x| x.abs() <= 0.1005));
    }
}

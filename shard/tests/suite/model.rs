//! The model on CPU ranks, against a plain forward over candle tensors.

use super::common::repository;
use super::oracle::Oracle;
use super::ranks::{NORMALIZATION, Picture, Prompt, on_ranks};
use lockstep_shard::device::{Activations, DType, Device};
use rand::{Rng, SeedableRng, rngs::SmallRng};

const CHECKPOINTS: [&str; 7] = ["a", "b", "c", "d", "e", "f", "g"];

fn picture(grid: [usize; 3], seed: usize) -> Picture {
    let [t, h, w] = grid;
    // A still picture has one frame, of which the patch repeats the last.
    let frames = if t == 1 { 1 } else { 2 * t };
    let pixels =
        (0..frames * h * w * 14 * 14 * 3).map(|i| ((i * 31 + seed * 7) % 251 + i / 999 % 5) as u8).collect();
    Picture { pixels, grid }
}

/// Text, the pictures, and text again. The positions differ between axes; that they are not those of a real
/// prompt is no matter here.
fn prompt(image_token_id: u32, pictures: Vec<Picture>, num_text: usize, seed: usize) -> Prompt {
    let text = |i: usize| ((i * 37 + seed * 11) % 400) as u32;
    let num_pads: usize = pictures.iter().map(Picture::num_tokens).sum();
    let before = num_text / 2;
    let mut token_ids: Vec<u32> = (0..num_text).map(text).collect();
    token_ids.splice(before..before, std::iter::repeat_n(image_token_id, num_pads));
    let positions = (0..token_ids.len() as u32).map(|i| [i, i / 2 + seed as u32 % 3, (i * i) % 50]).collect();
    Prompt { token_ids, positions, pictures }
}

fn max_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn flat(tensor: &candle_core::Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|x| x.to_vec1()).expect("floats")
}

/// Two sequences share steps of uneven chunks. At every world size all features, hidden states and
/// log-probabilities are the oracle's, and all ranks have the same bits.
#[test]
fn is_the_oracle_at_every_world_size() {
    for name in CHECKPOINTS {
        let dir = repository(&format!("tests/checkpoints/{name}"));
        let oracle = Oracle::load(&dir, NORMALIZATION);
        let image_token_id = lockstep_shard::config::Config::open(&dir).expect("valid").image_token_id;
        let pictures = vec![picture([1, 10, 6], 1), picture([2, 4, 12], 2)];
        let first = prompt(image_token_id, pictures, 21, 3);
        let second = prompt(image_token_id, Vec::new(), 50, 4);
        let features: Vec<f32> =
            first.pictures.iter().flat_map(|picture| flat(&oracle.features(picture))).collect();
        let (first_hidden, second_hidden) = (oracle.hidden(&first), oracle.hidden(&second));
        let last = second_hidden.narrow(0, second.token_ids.len() - 1, 1).expect("a row");
        let logprobs = oracle.logprobs(&last).remove(0);
        let mut best: Vec<u32> = (0..logprobs.len() as u32).collect();
        best.sort_by(|&a, &b| logprobs[b as usize].total_cmp(&logprobs[a as usize]));

        for world_size in 1..=8 {
            let hashes = on_ranks(&dir, world_size, DType::F32, |rank| {
                let mut one = rank.admit(&first, first.token_ids.len());
                let mut two = rank.admit(&second, second.token_ids.len());
                let error = max_error(&rank.features_of(&one), &features);
                assert!(error < 1e-4, "{name}, {world_size} ranks: features differ by {error}");
                let (mut of_one, mut of_two, mut hash) = (Vec::new(), Vec::new(), 0);
                let (len_one, len_two) = (first.token_ids.len(), second.token_ids.len());
                for (chunk_one, chunk_two) in [(13, 40), (30, 1), (len_one - 43, len_two - 41)] {
                    let steps = &mut [(&mut one, chunk_one), (&mut two, chunk_two)];
                    let hidden = rank.step(steps, |rows| rows.collect());
                    hash ^= rank.device.hash(&hidden, 0..hidden.rows()).expect("a hash").rotate_left(1);
                    let hidden = rank.device.download(&hidden).expect("downloaded");
                    let (a, b) = hidden.split_at(chunk_one * rank.config.text.hidden_size);
                    of_one.extend_from_slice(a);
                    of_two.extend_from_slice(b);
                }
                for (found, expected) in [(&of_one, &first_hidden), (&of_two, &second_hidden)] {
                    let error = max_error(found, &flat(expected));
                    assert!(error < 2e-4, "{name}, {world_size} ranks: hidden states differ by {error}");
                }
                let hidden = &of_two[of_two.len() - rank.config.text.hidden_size..];
                let hidden = rank.device.upload(1, hidden.len(), hidden).expect("uploaded");
                let drawn = rank.draw(&hidden, 5);
                assert_eq!(drawn.token_id, best[0], "{name}, {world_size} ranks");
                assert_eq!(drawn.top[0], (drawn.token_id, drawn.logprob.expect("asked for")));
                for (&(id, logprob), &expected) in drawn.top.iter().zip(&best[..5]) {
                    assert_eq!(id, expected, "{name}, {world_size} ranks");
                    assert!((logprob - logprobs[id as usize]).abs() < 1e-4);
                }
                hash
            });
            assert!(hashes.iter().all(|&hash| hash == hashes[0]), "{name}: ranks of {world_size} differ");
        }
    }
}

/// More patches of one picture than are worked on at once, also on a rank that embeds only some of them.
#[test]
fn large_media_are_worked_on_in_pieces() {
    let dir = repository("tests/checkpoints/e");
    let large = picture([1, 96, 50], 5);
    let expected = flat(&Oracle::load(&dir, NORMALIZATION).features(&large));
    let image_token_id = lockstep_shard::config::Config::open(&dir).expect("valid").image_token_id;
    let prompt = prompt(image_token_id, vec![large], 2, 1);
    for world_size in [1, 2, 3] {
        on_ranks(&dir, world_size, DType::F32, |rank| {
            let sequence = rank.admit(&prompt, 1);
            let error = max_error(&rank.features_of(&sequence), &expected);
            assert!(error < 1e-4, "{world_size} ranks: features differ by {error}");
        });
    }
}

/// However the work is cut, the features have the same bits: at every stage's edge, within stages, within windows, and
/// where a piece has no window at all.
#[test]
fn pieces_of_encoding_give_the_bits_of_the_whole() {
    let grids = [[1, 2, 2], [1, 10, 6], [2, 4, 12], [3, 8, 8], [2, 22, 10], [1, 6, 34]];
    for (name, world_sizes) in [("a", &[1, 2, 8][..]), ("b", &[3]), ("c", &[5]), ("d", &[2]), ("e", &[1, 4])]
    {
        let dir = repository(&format!("tests/checkpoints/{name}"));
        let image_token_id = lockstep_shard::config::Config::open(&dir).expect("valid").image_token_id;
        let prompts: Vec<Prompt> = (0..)
            .zip(grids)
            .map(|(seed, grid)| prompt(image_token_id, vec![picture(grid, seed)], 2, seed))
            .collect();
        for &world_size in world_sizes {
            on_ranks(&dir, world_size, DType::Bf16, |rank| {
                for (seed, prompt) in (0..).zip(&prompts) {
                    let whole = rank.admit(prompt, 1);
                    let expected = rank.features_of(&whole);
                    // The same on every rank.
                    let mut rng = SmallRng::seed_from_u64(seed);
                    for round in 0..8 {
                        rank.clear();
                        // What another medium left in the memory that is kept must not matter.
                        rank.admit(&prompts[(seed as usize + round) % prompts.len()], 1);
                        let ends = |work: u64| match round {
                            0 => (1..work).collect(),
                            _ => {
                                let mut ends: Vec<u64> =
                                    (0..round * round).map(|_| rng.random_range(1..work)).collect();
                                ends.sort_unstable();
                                ends.dedup();
                                ends
                            }
                        };
                        let pieces = rank.admit_in_pieces(prompt, 1, ends);
                        let found = rank.features_of(&pieces);
                        let same = found.iter().map(|x| x.to_bits()).eq(expected.iter().map(|x| x.to_bits()));
                        assert!(same, "{name}, {world_size} ranks, {:?}", prompt.pictures[0].grid);
                    }
                    rank.clear();
                }
            });
        }
    }
}

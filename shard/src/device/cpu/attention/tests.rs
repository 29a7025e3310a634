use super::super::testing::*;
use super::super::{CpuDevice, Tensor};
use crate::device::{AttentionHeads, DType, Device, SequenceRows, StepRows};

/// Keys and values of one sequence, `[token][kv head][head_dim]`, as they were before rounding.
struct Sequence {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    num_tokens: usize,
}

impl Sequence {
    fn new(seed: u64, heads: &AttentionHeads, num_tokens: usize) -> Self {
        let mut numbers = Numbers::new(seed);
        let mut wide = |len| numbers.vec(len).into_iter().map(|x| 3.0 * x).collect();
        let kv_len = num_tokens * heads.num_kv * heads.head_dim;
        Self {
            queries: wide(num_tokens * heads.num_query() * heads.head_dim),
            keys: wide(kv_len),
            values: wide(kv_len),
            num_tokens,
        }
    }

    /// Rows of qkv for some tokens.
    fn qkv(&self, heads: &AttentionHeads, tokens: std::ops::Range<usize>) -> Vec<f32> {
        let (queries, kv) = (heads.num_query() * heads.head_dim, heads.num_kv * heads.head_dim);
        let mut out = Vec::new();
        for token in tokens {
            out.extend(&self.queries[token * queries..(token + 1) * queries]);
            out.extend(&self.keys[token * kv..(token + 1) * kv]);
            out.extend(&self.values[token * kv..(token + 1) * kv]);
        }
        out
    }

    fn expected(&self, heads: &AttentionHeads, dtype: DType) -> Vec<f64> {
        let head_dim = heads.head_dim;
        let (keys, values) = (round(dtype, self.keys.clone()), round(dtype, self.values.clone()));
        let mut out = Vec::new();
        for token in 0..self.num_tokens {
            for (head, &kv) in heads.kv_of_query.iter().enumerate() {
                let query = &self.queries[(token * heads.num_query() + head) * head_dim..][..head_dim];
                let at = |t: usize| (t * heads.num_kv + kv) * head_dim;
                let scores: Vec<f64> = (0..=token)
                    .map(|t| {
                        let products = query.iter().zip(&keys[at(t)..]);
                        products.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>()
                            / (head_dim as f64).sqrt()
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
                for d in 0..head_dim {
                    let weighted = scores.iter().enumerate();
                    let weighted = weighted.map(|(t, s)| (s - largest).exp() * f64::from(values[at(t) + d]));
                    out.push(weighted.sum::<f64>() / sum);
                }
            }
        }
        out
    }
}

fn heads(kv_of_query: &[usize], num_kv: usize, head_dim: usize) -> AttentionHeads {
    AttentionHeads { kv_of_query: kv_of_query.to_vec(), num_kv, head_dim }
}

/// Runs one step over pieces of sequences: appends them without rotation and attends.
fn step(
    device: &CpuDevice,
    cache: &mut <CpuDevice as Device>::KvCache,
    heads: &AttentionHeads,
    pieces: &[(&Sequence, &[u32], std::ops::Range<usize>)],
) -> Tensor {
    let (mut data, mut slots, mut rows) = (Vec::new(), Vec::new(), Vec::new());
    for (sequence, blocks, tokens) in pieces {
        let start = slots.len();
        data.extend(sequence.qkv(heads, tokens.clone()));
        slots.extend(tokens.clone().map(|t| blocks[t / 32] * 32 + t as u32 % 32));
        rows.push(SequenceRows {
            rows: start..slots.len(),
            num_computed_tokens: tokens.start,
            block_table: blocks.to_vec(),
        });
    }
    let (n, half) = (slots.len(), heads.head_dim / 2);
    let cols = (heads.num_query() + 2 * heads.num_kv) * heads.head_dim;
    let mut qkv = device.upload(n, cols, &data).expect("room");
    let cos = device.upload(n, half, &vec![1.0; n * half]).expect("room");
    let sin = device.upload(n, half, &vec![0.0; n * half]).expect("room");
    let step = StepRows { token_ids: &slots, drawn: &[], slots: &slots, sequences: &rows, heads, cos, sin };
    let step = device.rows(step).expect("room");
    device.rotary_append(&mut qkv, heads, &step, cache, 1).expect("it appends");
    device.paged_attention(&qkv, heads, &step, cache, 1).expect("room")
}

fn shapes() -> Vec<AttentionHeads> {
    vec![
        heads(&[0], 1, 8),
        heads(&[0, 0, 0, 1, 1], 2, 20),
        heads(&[0; 7], 1, 128),
        heads(&[0, 1, 1], 2, 80),
        heads(&[0; 13], 1, 16),
        heads(&[], 0, 16),
    ]
}

#[test]
fn agrees_with_f64_in_one_chunk_and_with_other_sequences() {
    let devices = exact_devices();
    for dtype in [DType::F32, DType::Bf16] {
        for heads in shapes() {
            let (a, b) = (Sequence::new(1, &heads, 75), Sequence::new(2, &heads, 32));
            let mut expected = a.expected(&heads, dtype);
            expected.extend(b.expected(&heads, dtype));
            let mut first: Option<Vec<f32>> = None;
            for (name, device) in &devices {
                let what = format!("{heads:?} {dtype:?} {name}");
                let mut cache = device.kv_cache(dtype, 2, &heads, 8).expect("room");
                let pieces = [(&a, &[5, 0, 7][..], 0..75), (&b, &[2][..], 0..32)];
                let out = step(device, &mut cache, &heads, &pieces);
                assert_close(&expected, out.data(), 3e-5, &what);
                assert_same_bits(first.get_or_insert_with(|| out.data().to_vec()), out.data(), &what);
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_however_its_prompt_was_chunked() {
    for (name, device) in devices() {
        for dtype in [DType::F32, DType::Bf16] {
            for heads in shapes() {
                let sequence = Sequence::new(3, &heads, 70);
                let other = Sequence::new(4, &heads, 40);
                let blocks = [4, 1, 2];
                let mut cache = device.kv_cache(dtype, 2, &heads, 8).expect("room");
                let whole = step(&device, &mut cache, &heads, &[(&sequence, &blocks, 0..70)]);
                let cols = heads.num_query() * heads.head_dim;
                for size in [1, 7, 32, 33] {
                    let mut cache = device.kv_cache(dtype, 2, &heads, 8).expect("room");
                    let mut start = 0;
                    while start < 70 {
                        let tokens = start..(start + size).min(70);
                        let mut pieces = vec![(&sequence, &blocks[..], tokens.clone())];
                        if tokens.end <= 40 {
                            pieces.push((&other, &[6, 3][..], tokens.clone()));
                        }
                        let part = step(&device, &mut cache, &heads, &pieces);
                        assert_same_bits(
                            &whole.data()[start * cols..tokens.end * cols],
                            &part.data()[..tokens.len() * cols],
                            &format!("{name} {dtype:?} {heads:?}, chunks of {size}, tokens {tokens:?}"),
                        );
                        start = tokens.end;
                    }
                }
            }
        }
    }
}

#[test]
fn what_an_earlier_owner_left_in_a_block_is_not_seen() {
    let heads = heads(&[0, 0], 1, 24);
    for (name, device) in exact_devices() {
        let sequence = Sequence::new(5, &heads, 37);
        let mut clean = device.kv_cache(DType::Bf16, 2, &heads, 2).expect("room");
        let mut dirty = device.kv_cache(DType::Bf16, 2, &heads, 2).expect("room");
        dirty.region.as_mut_slice::<u16>().fill(0x7fc0);
        let expected = step(&device, &mut clean, &heads, &[(&sequence, &[0, 1], 0..37)]);
        let got = step(&device, &mut dirty, &heads, &[(&sequence, &[0, 1], 0..37)]);
        assert_same_bits(expected.data(), got.data(), &name);
    }
}

#[test]
fn copied_blocks_serve_like_their_source() {
    let heads = heads(&[0, 0, 1], 2, 10);
    let (_, device) = devices().pop().expect("there is a device");
    for dtype in [DType::F32, DType::Bf16] {
        let sequence = Sequence::new(6, &heads, 40);
        let mut cache = device.kv_cache(dtype, 3, &heads, 6).expect("room");
        step(&device, &mut cache, &heads, &[(&sequence, &[0, 1], 0..39)]);
        device.copy_blocks(&mut cache, &[(0, 3), (1, 5)]).expect("it copies");
        let expected = step(&device, &mut cache, &heads, &[(&sequence, &[0, 1], 39..40)]);
        let got = step(&device, &mut cache, &heads, &[(&sequence, &[3, 5], 39..40)]);
        assert_same_bits(expected.data(), got.data(), "copied blocks");
    }
}

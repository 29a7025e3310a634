//! Attention of steps that decode, on a device: contexts that are cut into other pieces than when a graph was made.

use std::sync::Arc;

use half::bf16;
use lockstep_shard::{
    collective::Alone,
    device::{
        Angles, AttentionHeads, DType, Device, KV_BLOCK_TOKENS, Result, SequenceRows, StepRows,
        cuda::{CudaDevice, CudaOptions, Gpu, KvCache, Rows, Sizes, Sums, Tensor, libraries, modules},
    },
    progress::Progress,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::gpu;

const HEAD_DIM: usize = 64;
const MAX_CONTEXT: usize = 512;
const BLOCKS_EACH: usize = MAX_CONTEXT / KV_BLOCK_TOKENS;

fn device(use_graphs: bool) -> CudaDevice {
    let ordinal = gpu::real().unwrap_or(0);
    libraries::driver().unwrap();
    let gpu = Gpu::open(ordinal as i32).unwrap();
    let arch = libraries::gpu(ordinal).unwrap().0.arch;
    let cubins = modules::modules(arch, None, &|| ()).unwrap();
    CudaDevice::new(CudaOptions {
        gpu,
        cubins: cubins.into_iter().map(|module| (module.name.to_owned(), module.cubin)).collect(),
        sizes: Sizes {
            world_size: 1,
            max_step_tokens: 2 * MAX_CONTEXT,
            max_step_sequences: 2,
            max_context_tokens: MAX_CONTEXT,
            most_sharing: 3,
            num_query: 5,
            num_kv: 2,
            head_dim: HEAD_DIM,
            num_ids: 64,
            frame_bytes: 0,
        },
        workspace_bytes: 32 << 20,
        collective: Box::new(Alone),
        sums: Sums::Host,
        has_nccl: false,
        use_cublas_lt: false,
        is_repeatable: true,
        use_graphs,
        overlap_kernels: true,
        progress: Arc::new(Progress::new(1)),
    })
    .unwrap()
}

fn heads() -> AttentionHeads {
    AttentionHeads { kv_of_query: vec![0, 0, 0, 1, 1], num_kv: 2, head_dim: HEAD_DIM }
}

/// Queries, keys and values of so many rows, always the same.
fn activations(device: &CudaDevice, rows: usize) -> Tensor {
    let cols = (5 + 2 * 2) * HEAD_DIM;
    let mut rng = SmallRng::seed_from_u64(1);
    let x: Vec<f32> =
        (0..rows * cols).map(|_| bf16::from_f32(rng.random_range(-2.0_f32..2.0)).to_f32()).collect();
    device.upload(rows, cols, &x).unwrap()
}

/// The last `rows` tokens of two sequences of so many.
fn rows(device: &CudaDevice, contexts: [usize; 2], rows: usize) -> Rows {
    let first_block = |i: usize| (i * BLOCKS_EACH) as u32;
    let sequences = [0, 1].map(|i| SequenceRows {
        rows: i * rows..(i + 1) * rows,
        num_computed_tokens: contexts[i] - rows,
        block_table: (first_block(i)..first_block(i + 1)).collect(),
    });
    let slots: Vec<u32> = (0..2 * rows)
        .map(|row| (row / rows * MAX_CONTEXT + contexts[row / rows] - rows + row % rows) as u32)
        .collect();
    let (frequencies, positions) = (vec![(0.7, 0); HEAD_DIM / 2], vec![[1; 3]; 2 * rows]);
    let angles = Angles { frequencies: &frequencies, scale: 1.0, positions: &positions };
    let (cos, sin) = device.angles(&angles).unwrap();
    let (token_ids, sequences, heads) = (&vec![1; 2 * rows], &sequences, &heads());
    device.rows(StepRows { token_ids, drawn: &[], slots: &slots, sequences, heads, cos, sin }).unwrap()
}

/// A cache in which both sequences have all of their tokens.
fn filled_cache(device: &CudaDevice) -> KvCache {
    let mut cache = device.kv_cache(DType::Bf16, 1, &heads(), 2 * BLOCKS_EACH).unwrap();
    let all = rows(device, [MAX_CONTEXT; 2], MAX_CONTEXT);
    let mut qkv = activations(device, 2 * MAX_CONTEXT);
    device.rotary_append(&mut qkv, &heads(), &all, &mut cache, 0).unwrap();
    cache
}

/// What attention gives in steps of one row for each of two contexts, and how many steps were no graph.
fn attend(use_graphs: bool, steps: &[[usize; 2]]) -> Result<(Vec<Vec<f32>>, usize)> {
    let device = device(use_graphs);
    let (cache, qkv) = (filled_cache(&device), activations(&device, 2));
    let (mut results, mut computed) = (Vec::new(), 0);
    for &contexts in steps {
        let step = rows(&device, contexts, 1);
        let out = device.replay(&step, || {
            computed += 1;
            device.paged_attention(&qkv, &heads(), &step, &cache, 0)
        })?;
        results.push(device.download(&out)?);
    }
    Ok((results, computed))
}

#[test]
fn a_graph_attends_to_contexts_that_are_cut_otherwise() {
    // Of 9 to 16 pieces each, in tiles of 32 tokens.
    let steps = [[250, 230], [300, 40], [420, 3], [1, 479], [33, 300], [256, 224], [480, 32]];
    let (expected, computed) = attend(false, &steps).unwrap();
    assert_eq!(computed, steps.len());
    let (found, computed) = attend(true, &steps).unwrap();
    assert_eq!(computed, 2, "the others are what the second one gave the stream");
    for ((found, expected), contexts) in found.iter().zip(&expected).zip(steps) {
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(found), bits(expected), "{contexts:?}");
    }
    assert!(expected.windows(2).all(|pair| pair[0] != pair[1]));
}

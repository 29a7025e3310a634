//! What is asked of ranks on GPUs, and how their answers are compared.

use lockstep_shard::{
    device::{DType, DeviceKind},
    runner::step::{Grid, MediaHash, MediaSpan, SampledToken},
    service::gpu::{GpuOptions, Sums},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    common::{Group, Picture, Request, greedy, json},
    gpu,
};

/// Its heads are as wide as kernels are compiled for.
pub const CHECKPOINT: &str = "tests/checkpoints/shapes";

/// A group on GPUs: one for each rank where they sum by NCCL, else one for all.
pub fn on_gpus(world_size: usize, sums: Sums) -> Group {
    let ordinals = gpu::of_ranks(world_size, sums);
    let group = Group::new(CHECKPOINT, world_size, DType::Bf16);
    let gpu = GpuOptions { ordinals, memory: 0.9, sums, kernel_cache: gpu::kernel_cache(), ..group.gpu };
    Group { device: DeviceKind::Cuda, gpu, ..group }
}

/// Seeded requests: text of several lengths, with a picture in every other one.
pub fn requests(count: usize) -> Vec<Request> {
    let mut rng = SmallRng::seed_from_u64(7);
    let config = json(&format!("{CHECKPOINT}/config.json"));
    let id = |name: &str| config[name].as_u64().unwrap() as u32;
    let (start, pad, end) = (id("vision_start_token_id"), id("image_token_id"), id("vision_end_token_id"));
    let request = |i: usize| {
        let mut text = |len: usize| -> Vec<u32> { (0..len).map(|_| rng.random_range(0..300)).collect() };
        let mut token_ids = text(5 + 9 * i);
        let (mut media, mut pictures) = (Vec::new(), Vec::new());
        if i % 2 == 1 {
            let grid = Grid { t: 1, h: 8 + 2 * i as u32, w: 10 };
            let hash = MediaHash([i as u8; 32]);
            token_ids.push(start);
            media.push(MediaSpan { hash, first_token: token_ids.len(), grid, seconds_per_grid_t: None });
            token_ids.extend(vec![pad; grid.num_patches() as usize / 4]);
            token_ids.push(end);
            let bytes = grid.num_patches() as usize * 14 * 14 * 3;
            let pixels = (0..bytes).map(|k| (k * 31 / 7 % 251) as u8).collect();
            pictures.push(Picture { hash, grid, pixels });
        }
        token_ids.extend(text(4));
        Request { token_ids, media, pictures, sampling: greedy() }
    };
    (0..count).map(request).collect()
}

/// The largest difference of the log-probabilities of the five best tokens of `expected`, as far as answers are the same.
pub fn difference(got: &[SampledToken], expected: &[SampledToken]) -> f32 {
    let mut most = 0.0_f32;
    for (got, expected) in got.iter().zip(expected) {
        for (id, logprob) in &expected.top[..5] {
            let found = got.top.iter().find(|(other, _)| other == id);
            most = most.max(found.map_or(f32::INFINITY, |(_, found)| (found - logprob).abs()));
        }
        if got.token_id != expected.token_id {
            break;
        }
    }
    most
}

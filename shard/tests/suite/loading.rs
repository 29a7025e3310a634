//! What loading checks, reads and plans.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType as CandleType, Device as CandleDevice, Tensor};
use lockstep_shard::collective::Alone;
use lockstep_shard::config::Config;
use lockstep_shard::device::cpu::{CpuDevice, CpuOptions};
use lockstep_shard::device::plan::PlanDevice;
use lockstep_shard::device::{DType, Device, DeviceKind, RowSampling, SequenceRows};
use lockstep_shard::model::{Batch, LoadError, Model, Normalization, Parallel};
use lockstep_shard::progress::Progress;
use lockstep_shard::weights::Checkpoint;

use super::common::repository;
use super::ranks::Picture;

const NORMALIZATION: Normalization = Normalization { mean: [0.5; 3], std: [0.25; 3] };
const ALONE: Parallel = Parallel { rank: 0, world_size: 1 };

fn cpu(workspace_bytes: usize) -> CpuDevice {
    let options = CpuOptions {
        threads: 1,
        cpus: Vec::new(),
        workspace_bytes,
        instruction_set: None,
        collective: Box::new(Alone),
        progress: Arc::new(Progress::new(1)),
    };
    CpuDevice::new(options).expect("a device")
}

fn load<D: Device>(
    device: &D,
    dir: &Path,
    parallel: Parallel,
    dtype: DType,
) -> Result<(Model<D>, u64), LoadError> {
    let config = Config::open(dir).expect("a valid configuration");
    let checkpoint = Checkpoint::open(dir).expect("a checkpoint");
    let mut bytes = 0;
    let model = Model::load(device, &checkpoint, &config, NORMALIZATION, parallel, dtype, &mut |so_far| {
        bytes = so_far;
        Ok(())
    })?;
    Ok((model, bytes))
}

/// A copy of checkpoint `e`, changed, in one file, with the names that transformers 5 gives to tensors in
/// memory.
fn changed(change: impl FnOnce(&mut HashMap<String, Tensor>)) -> tempfile::TempDir {
    let (from, to) = (repository("tests/checkpoints/e"), tempfile::tempdir().expect("a folder"));
    std::fs::copy(from.join("config.json"), to.path().join("config.json")).expect("copied");
    let mut tensors =
        candle_core::safetensors::load(from.join("model.safetensors"), &CandleDevice::Cpu).expect("tensors");
    change(&mut tensors);
    let renamed = tensors.into_iter().map(|(name, tensor)| {
        let name = match name.strip_prefix("model.") {
            Some(rest) => format!("model.language_model.{rest}"),
            None if name.starts_with("visual.") => format!("model.{name}"),
            None => name,
        };
        (name, tensor)
    });
    let tensors: HashMap<String, Tensor> = renamed.collect();
    candle_core::safetensors::save(&tensors, to.path().join("model.safetensors")).expect("saved");
    to
}

#[test]
fn all_faults_of_tensors_are_told_at_once() {
    let dir = changed(|tensors| {
        for missing in ["model.layers.1.mlp.up_proj.weight", "visual.merger.mlp.0.bias"] {
            assert!(tensors.remove(missing).is_some());
        }
        let misshapen = "visual.blocks.0.attn.qkv.weight";
        let transposed = tensors[misshapen].t().and_then(|tensor| tensor.contiguous()).expect("transposed");
        tensors.insert(misshapen.to_owned(), transposed);
        let mistyped = "model.norm.weight";
        let doubles = tensors[mistyped].to_dtype(CandleType::F64).expect("converted");
        tensors.insert(mistyped.to_owned(), doubles);
    });
    let Err(LoadError::Checkpoint(error)) = load(&cpu(0), dir.path(), ALONE, DType::Bf16) else {
        panic!("a faulty checkpoint was loaded");
    };
    let mut faults: Vec<String> = error.faults.iter().map(ToString::to_string).collect();
    faults.sort();
    assert_eq!(
        faults,
        [
            "tensor model.layers.1.mlp.up_proj.weight is missing",
            "tensor model.norm.weight is of type F64; BF16, F16 and F32 are read",
            "tensor visual.blocks.0.attn.qkv.weight has shape [24, 72] instead of [72, 24]",
            "tensor visual.merger.mlp.0.bias is missing",
        ]
    );
    assert!(error.to_string().contains(&dir.path().display().to_string()));
}

/// Features of a fixed picture.
fn features(dir: &Path, dtype: DType) -> Vec<f32> {
    let device = cpu(8 << 20);
    let config = Config::open(dir).expect("a valid configuration");
    let (model, _) = load(&device, dir, ALONE, dtype).expect("loads");
    let mut frame = model.vision_frame(&device, 16).expect("room");
    let mut features = device.features(128, 1).expect("features");
    let pixels: Vec<u8> = (0..56 * 56 * 3).map(|i| (i * 37 % 256) as u8).collect();
    let picture = Picture { pixels, grid: [1, 4, 4] };
    picture.encode(&device, (&model, &config), &mut frame, (&mut features, &[0, 1, 2, 3]), &[]);
    let mut x = device.empty(4, 128).expect("activations");
    device.insert_features(&mut x, &features, &[(0, 0), (1, 1), (2, 2), (3, 3)], false).expect("inserted");
    device.download(&x).expect("downloaded")
}

#[test]
fn checkpoints_of_f16_bf16_and_f32_hold_the_same_weights() {
    // Weights that all three types hold exactly: multiples of 1/64 below 1.
    let as_type = |dtype| {
        changed(|tensors| {
            for tensor in tensors.values_mut() {
                let rounded = (tensor.to_dtype(CandleType::F32).expect("converted") * 64.0)
                    .and_then(|tensor| tensor.round()?.clamp(-63.0, 63.0)? / 64.0)
                    .and_then(|tensor| tensor.to_dtype(dtype));
                *tensor = rounded.expect("converted");
            }
        })
    };
    let expected = features(as_type(CandleType::F32).path(), DType::F32);
    assert!(expected.iter().any(|&x| x != 0.0) && expected.iter().all(|x| x.is_finite()));
    for dtype in [CandleType::F16, CandleType::BF16] {
        assert_eq!(features(as_type(dtype).path(), DType::F32), expected, "{dtype:?}");
    }
    // Weights of bf16 are the same numbers, computed with in another order.
    let in_bf16 = features(as_type(CandleType::F16).path(), DType::Bf16);
    let error = in_bf16.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let largest = expected.iter().map(|x| x.abs()).fold(0.0, f32::max);
    assert!(error < 0.05 * largest, "{error} of {largest}");
}

#[test]
fn each_rank_reads_its_slices_only() {
    let dir = repository("tests/checkpoints/a");
    let (_, alone) = load(&PlanDevice::new(DeviceKind::Cpu), &dir, ALONE, DType::Bf16).expect("loads");
    let file = std::fs::metadata(dir.join("model.safetensors")).expect("there").len();
    assert!(alone <= file && alone > file * 9 / 10, "{alone} of {file} bytes");
    for rank in 0..8 {
        let parallel = Parallel { rank, world_size: 8 };
        let (_, planned) =
            load(&PlanDevice::new(DeviceKind::Cpu), &dir, parallel, DType::Bf16).expect("loads");
        assert!(planned < alone / 2, "rank {rank} reads {planned} of {alone} bytes");
    }
}

/// Encodes a picture, computes a step of two sequences, and draws.
fn work<D: Device>(device: &D, dir: &Path, dtype: DType, parallel: Parallel) {
    let config = Config::open(dir).expect("a valid configuration");
    let (model, _) = load(device, dir, parallel, dtype).expect("loads");
    let mut frame = model.vision_frame(device, 240).expect("room");
    let mut cache = device.kv_cache(dtype, config.text.num_hidden_layers, model.heads(), 4).expect("a cache");
    let mut features = device.features(config.text.hidden_size, 1).expect("features");
    let slots: Vec<u32> = (0..60).collect();
    let picture = Picture { pixels: vec![7; 12 * 20 * 14 * 14 * 3], grid: [1, 12, 20] };
    picture.encode(device, (&model, &config), &mut frame, (&mut features, &slots), &[]);
    let sequence = |rows: std::ops::Range<usize>, block| SequenceRows {
        rows,
        num_computed_tokens: 0,
        block_table: vec![block, block + 1],
    };
    let batch = Batch {
        token_ids: (0..70).collect(),
        drawn: Vec::new(),
        positions: (0..70).map(|i| [i; 3]).collect(),
        slots: (0..30).chain(64..104).collect(),
        features: vec![(3, 5), (4, 6)],
        sequences: vec![sequence(0..30, 0), sequence(30..70, 2)],
        sample_rows: vec![29, 69],
    };
    let (hidden, _) = model.forward(device, &batch, &mut cache, &features).expect("a step");
    let row = RowSampling { logprobs: Some(3), ..RowSampling::default() };
    model.sample(device, &hidden, &[row.clone(), row]).expect("drawn");
}

#[test]
fn a_plan_is_what_the_same_work_needs() {
    for name in ["a", "b", "c", "d", "e", "f", "g"] {
        let dir = repository(&format!("tests/checkpoints/{name}"));
        for dtype in [DType::F32, DType::Bf16] {
            let plan = PlanDevice::new(DeviceKind::Cpu);
            work(&plan, &dir, dtype, ALONE);
            assert!(plan.weights_bytes() > 0 && plan.kv_bytes() > 0 && plan.features_bytes() > 0);
            let device = cpu(plan.workspace_bytes() as usize);
            work(&device, &dir, dtype, ALONE);
            assert_eq!(device.peak_workspace_bytes() as u64, plan.workspace_bytes(), "{name}");
        }
    }
}

#[test]
fn a_rank_of_eight_plans_for_its_slices() {
    let dir = repository("tests/checkpoints/a");
    let bytes = |parallel| {
        let plan = PlanDevice::new(DeviceKind::Cpu);
        work(&plan, &dir, DType::Bf16, parallel);
        (plan.weights_bytes(), plan.kv_bytes(), plan.workspace_bytes())
    };
    let alone = bytes(ALONE);
    assert_eq!(alone, bytes(ALONE));
    let one_of_eight = bytes(Parallel { rank: 0, world_size: 8 });
    // 28 heads in 4 groups: a rank of 8 keeps one head of keys and values.
    assert_eq!(one_of_eight.1 * 4, alone.1);
    assert!(one_of_eight.0 < alone.0 / 2 && one_of_eight.2 < alone.2);
}

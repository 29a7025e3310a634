//! A sequence whose logits are not finite fails by itself: nobody in its company, and nobody who gets its blocks, notices.

use std::{collections::HashMap, fs};

use super::common::{Group, Request, Script, bits, greedy, repository};
use candle_core::{Device, Tensor};
use lockstep_shard::{
    device::DType,
    runner::{
        Step,
        step::{Admission, Chunk, DrawFailure, SampledToken, Sampling, SeqId},
    },
};

const HEALTHY: &str = "tests/checkpoints/a";
/// The token whose embedding is not a number.
const BROKEN_TOKEN: u32 = 17;
const SCRIPT: Script = Script { chunk: 4096, new_tokens: 4 };

/// The checkpoint with one broken embedding. Its head is another tensor, and is healthy.
fn broken_checkpoint() -> tempfile::TempDir {
    let (from, to) = (repository(HEALTHY), tempfile::tempdir().unwrap());
    for file in ["config.json", "preprocessor_config.json"] {
        fs::copy(from.join(file), to.path().join(file)).unwrap();
    }
    let mut tensors: HashMap<String, Tensor> =
        candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
    let (_, table) = tensors.iter_mut().find(|(name, _)| name.ends_with("embed_tokens.weight")).unwrap();
    let mut rows: Vec<Vec<f32>> = table.to_dtype(candle_core::DType::F32).unwrap().to_vec2().unwrap();
    rows[BROKEN_TOKEN as usize].fill(f32::NAN);
    *table = Tensor::new(rows, &Device::Cpu).unwrap().to_dtype(table.dtype()).unwrap();
    candle_core::safetensors::save(&tensors, to.path().join("model.safetensors")).unwrap();
    to
}

fn text(token_ids: impl IntoIterator<Item = u32>) -> Request {
    Request {
        token_ids: token_ids.into_iter().collect(),
        media: vec![],
        pictures: vec![],
        sampling: greedy(),
    }
}

fn admission(id: u64, request: &Request, sampling: Sampling) -> Admission {
    let token_ids = request.token_ids.clone();
    Admission {
        id: SeqId(id),
        num_prompt_tokens: token_ids.len(),
        token_ids,
        media: vec![],
        sampling,
        num_computed_tokens: 0,
        blocks: vec![],
    }
}

fn chunk(id: u64, start: usize, length: usize, new_blocks: &[u32]) -> Chunk {
    Chunk { id: SeqId(id), start, length, new_blocks: new_blocks.to_vec(), max_new_tokens: 1 }
}

/// The steps of `first` alone, joined by a sequence 7 that is broken, and then by sequence 8, `later`, in the blocks of 7.
fn disturbed(
    group: &Group,
    first: &Request,
    broken: &Request,
    later: &Request,
    sampling: Sampling,
) -> Vec<Step> {
    let mut steps = SCRIPT.steps(group, std::slice::from_ref(first));
    let length = later.token_ids.len();
    steps[1].admissions.push(admission(7, broken, sampling));
    steps[1].chunks.push(chunk(7, 0, broken.token_ids.len(), &[100, 101]));
    steps[2].releases.push(SeqId(7));
    steps[2].admissions.push(admission(8, later, greedy()));
    steps[2].chunks.push(chunk(8, 0, length, &[101]));
    for (i, step) in steps[3..5].iter_mut().enumerate() {
        step.chunks.insert(0, chunk(8, length + i, 1, &[]));
    }
    steps
}

#[test]
fn a_broken_sequence_fails_alone() {
    let folder = broken_checkpoint();
    let healthy = |seed: u32, length: u32| text((0..length).map(|i| 20 + (i * 37 + seed) % 400));
    let (first, later) = (healthy(1, 50), healthy(2, 9));
    let broken = text((0..40).map(|i| if i == 36 { BROKEN_TOKEN } else { 30 + i }));
    for (world_size, dtype) in [(1, DType::F32), (3, DType::F32), (2, DType::Bf16)] {
        let group = Group::new(&folder.path().display().to_string(), world_size, dtype);
        let alone = |request: &Request| group.answers(std::slice::from_ref(request), &SCRIPT).remove(0);
        let (alone_first, alone_later) = (alone(&first), alone(&later));
        for temperature in [None, Some(0.8)] {
            let sampling = Sampling { temperature, repetition_penalty: 1.3, ..greedy() };
            let steps = disturbed(&group, &first, &broken, &later, sampling);
            let (mut answers, mut failures): (HashMap<u64, Vec<SampledToken>>, _) = (HashMap::new(), vec![]);
            for (step, result) in group.run(&[], &steps).into_iter().enumerate() {
                for sampled in result.sampled {
                    answers.entry(sampled.id.0).or_default().extend(sampled.tokens);
                    failures.extend(sampled.failure.map(|failure| (step, sampled.id.0, failure)));
                }
            }
            assert_eq!(failures, [(1, 7, DrawFailure::LogitsNotFinite)], "{world_size} ranks, {dtype:?}");
            assert!(answers[&7].is_empty());
            assert_eq!(bits(&answers[&0]), bits(&alone_first), "{world_size} ranks, {dtype:?}");
            assert_eq!(bits(&answers[&8]), bits(&alone_later[..3]), "{world_size} ranks, {dtype:?}");
        }
    }
}

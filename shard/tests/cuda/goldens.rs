//! Answers of the checkpoint whose heads are as wide as the family's are the reference's, as far as bf16 may tell.

use lockstep_shard::{
    device::{DType, DeviceKind},
    runner::step::SampledToken,
    service::gpu::{GpuOptions, Sums},
};
use serde_json::Value;

use super::{
    common::{Group, Request, Script, floats, ids, json, request},
    gpu,
};

/// On stand-ins, where a token takes a while. A real GPU is asked all.
const CASES: [&str; 5] =
    ["text_unicode", "picture_after_text", "many_windows", "two_pictures", "three_pictures_between_text"];

/// How much farther than the reference's own bf16 answers may be from its f32: as on CPUs.
const TIMES: f32 = 2.0;

/// How far a case's answer may be: of one case alone it is chance how far the reference's own is, so that no bound is below that of the
/// mean.
fn bound(case: &Value, all: &[Value]) -> f32 {
    let own = |case: &Value| case["full_bf16_max_error"].as_f64().unwrap() as f32;
    TIMES * own(case).max(all.iter().map(own).sum::<f32>() / all.len() as f32)
}

/// Of a case, the largest difference of log-probabilities from the reference's f32: of its tokens, as far as they are drawn, and of
/// the most probable ones at first. The token that is drawn in place of one of its tokens must have been about as probable.
fn error(case: &Value, answer: &[SampledToken], bound: f32) -> f32 {
    let of_tokens = ids(&case["greedy"]).into_iter().zip(floats(&case["logprobs"]));
    let of_first = ids(&case["first_logprobs"]["ids"]).into_iter();
    let of_first = of_first.zip(floats(&case["first_logprobs"]["logprobs"]));
    let mut error = of_first
        // A token at the edge of the best 20 may fall out of them.
        .filter_map(|(id, expected)| Some((logprob(&answer[0], id)? - expected).abs()))
        .fold(0.0, f32::max);
    for (token, (id, expected)) in answer.iter().zip(of_tokens) {
        let found = logprob(token, id).unwrap_or(f32::NEG_INFINITY);
        if token.token_id != id {
            let best = logprob(token, token.token_id).expect("its own");
            assert!(best - found <= 2.0 * bound, "{}: {} in place of {id}", case["name"], token.token_id);
            break;
        }
        error = error.max((found - expected).abs());
    }
    error
}

fn logprob(token: &SampledToken, id: u32) -> Option<f32> {
    token.top.iter().find(|(other, _)| *other == id).map(|(_, logprob)| *logprob)
}

#[test]
fn answers_are_the_references() {
    let golden = json("tests/goldens/g.json");
    let checkpoint = golden["checkpoint"].as_str().unwrap();
    let is_asked = |case: &&Value| gpu::real().is_some() || CASES.iter().any(|name| case["name"] == *name);
    let all = golden["cases"].as_array().unwrap();
    let cases: Vec<&Value> = all.iter().filter(is_asked).collect();
    assert!(cases.len() >= CASES.len());
    let requests: Vec<Request> = cases.iter().map(|case| request(checkpoint, case)).collect();
    for (world_size, sums) in [(1, Sums::Host), (2, Sums::Host)] {
        let group = Group::new(checkpoint, world_size, DType::Bf16);
        let gpu = GpuOptions {
            ordinals: gpu::of_ranks(world_size, sums),
            memory: 0.9,
            sums,
            kernel_cache: gpu::kernel_cache(),
            ..group.gpu
        };
        let group = Group { device: DeviceKind::Cuda, gpu, ..group };
        let answers = group.answers(&requests, &Script { chunk: 4096, new_tokens: 20 });
        for (case, answer) in cases.iter().zip(&answers) {
            let bound = bound(case, all);
            let error = error(case, answer, bound);
            println!("{world_size} ranks, {}: {error} of {bound}", case["name"]);
            assert_eq!(answer.len(), 20);
            assert!(error <= bound, "{world_size} ranks, {}: {error} is more than {bound}", case["name"]);
        }
    }
}

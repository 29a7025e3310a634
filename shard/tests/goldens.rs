//! Whole answers through the runner are the reference's, at every world size.

mod common;

use common::{Group, Request, Script, floats, ids, json, request, token_ids};
use lockstep_shard::{device::DType, runner::step::SampledToken};
use serde_json::Value;

const WHOLE: Script = Script { chunk: 4096, new_tokens: 20, preempt_after: None };

/// The golden file of a checkpoint: its cases and their requests.
fn golden(name: &str) -> (String, Vec<Value>, Vec<Request>) {
    let golden = json(&format!("tests/goldens/{name}.json"));
    let checkpoint = golden["checkpoint"].as_str().unwrap().to_owned();
    let cases = golden["cases"].as_array().unwrap().clone();
    let requests = cases.iter().map(|case| request(&checkpoint, case)).collect();
    (checkpoint, cases, requests)
}

fn check_logprobs(case: &Value, answer: &[SampledToken], context: &str) {
    for (token, expected) in answer.iter().zip(floats(&case["logprobs"])) {
        let actual = token.logprob.unwrap();
        assert!((actual - expected).abs() < 1e-4, "{context}: {actual} {expected}");
    }
    let first = &case["first_logprobs"];
    for ((id, expected), (actual_id, actual)) in
        ids(&first["ids"]).into_iter().zip(floats(&first["logprobs"])).zip(&answer[0].top)
    {
        assert!((actual - expected).abs() < 1e-4, "{context}: token {id} {expected}, {actual_id} {actual}");
    }
}

fn agree(name: &str, world_sizes: &[usize]) {
    let (checkpoint, cases, mut requests) = golden(name);
    // Every case twice in one batch: plain, and with a penalty.
    let penalized = requests.clone().into_iter().map(|mut request| {
        request.sampling.repetition_penalty = 1.3;
        request
    });
    requests.extend(penalized.collect::<Vec<_>>());
    for &world_size in world_sizes {
        let answers = Group::new(&checkpoint, world_size, DType::F32).answers(&requests, &WHOLE);
        for (i, case) in cases.iter().enumerate() {
            let context = format!("{name}, {}, world size {world_size}", case["name"]);
            assert_eq!(token_ids(&answers[i]), ids(&case["greedy"]), "{context}");
            assert_eq!(token_ids(&answers[cases.len() + i]), ids(&case["greedy_rp"]), "{context}, penalized");
            check_logprobs(case, &answers[i], &context);
        }
    }
}

#[test]
fn checkpoint_a_agrees_with_the_reference() {
    agree("a", &[1, 2, 3, 5, 8]);
}

#[test]
fn checkpoint_b_agrees_with_the_reference() {
    agree("b", &[1, 2, 3, 5, 8]);
}

#[test]
fn checkpoint_c_agrees_with_the_reference() {
    agree("c", &[1, 2, 3, 5, 8]);
}

#[test]
fn checkpoint_d_agrees_with_the_reference() {
    agree("d", &[1, 2, 3, 5, 8]);
}

#[test]
fn checkpoint_e_agrees_with_the_reference() {
    agree("e", &[1, 2, 3, 5, 8]);
}

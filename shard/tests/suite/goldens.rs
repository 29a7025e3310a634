//! Whole answers are the reference's, at every world size.

use super::common::{Group, Request, Script, floats, ids, json, repository, request, token_ids};
use super::ranks::{Picture, Prompt, on_ranks};
use lockstep_shard::device::DType;
use serde_json::Value;

const WHOLE: Script = Script { chunk: 4096, new_tokens: 20 };

/// The golden file of a checkpoint: its cases and their requests.
fn golden(name: &str) -> (String, Vec<Value>, Vec<Request>) {
    let golden = json(&format!("tests/goldens/{name}.json"));
    let checkpoint = golden["checkpoint"].as_str().unwrap().to_owned();
    let cases = golden["cases"].as_array().unwrap().clone();
    let requests = cases.iter().map(|case| request(&checkpoint, case)).collect();
    (checkpoint, cases, requests)
}

/// The largest difference of log-probabilities from the reference's: those of `chosen`, and those that the reference tells
/// for the first token, which are looked up in `first`.
fn error(case: &Value, first: &[(u32, f32)], chosen: impl Iterator<Item = f32>) -> f32 {
    let golden = &case["first_logprobs"];
    let of_first = ids(&golden["ids"]).into_iter().zip(floats(&golden["logprobs"])).map(|(id, expected)| {
        let found = first.iter().find(|(other, _)| *other == id);
        (found.unwrap_or_else(|| panic!("token {id} is not among the first")).1 - expected).abs()
    });
    let of_chosen = chosen.zip(floats(&case["logprobs"])).map(|(actual, expected)| (actual - expected).abs());
    of_first.chain(of_chosen).fold(0.0, f32::max)
}

fn agree(name: &str) {
    let (checkpoint, cases, mut requests) = golden(name);
    // Every case twice in one batch: plain, and with a penalty.
    let penalized = requests.clone().into_iter().map(|mut request| {
        request.sampling.repetition_penalty = 1.3;
        request
    });
    requests.extend(penalized.collect::<Vec<_>>());
    for world_size in 1..=8 {
        let answers = Group::new(&checkpoint, world_size, DType::F32).answers(&requests, &WHOLE);
        for (i, case) in cases.iter().enumerate() {
            let context = format!("{name}, {}, world size {world_size}", case["name"]);
            assert_eq!(token_ids(&answers[i]), ids(&case["greedy"]), "{context}");
            assert_eq!(token_ids(&answers[cases.len() + i]), ids(&case["greedy_rp"]), "{context}, penalized");
            let chosen = answers[i].iter().map(|token| token.logprob.unwrap());
            let error = error(case, &answers[i][0].top, chosen);
            assert!(error < 1e-4, "{context}: log-probabilities differ by {error}");
        }
    }
}

#[test]
fn checkpoint_a_agrees_with_the_reference() {
    agree("a");
}

#[test]
fn checkpoint_b_agrees_with_the_reference() {
    agree("b");
}

#[test]
fn checkpoint_c_agrees_with_the_reference() {
    agree("c");
}

#[test]
fn checkpoint_d_agrees_with_the_reference() {
    agree("d");
}

#[test]
fn checkpoint_e_agrees_with_the_reference() {
    agree("e");
}

#[test]
fn checkpoint_f_with_yarn_agrees_with_the_reference() {
    agree("f");
}

#[test]
fn checkpoint_g_with_heads_of_gpus_agrees_with_the_reference() {
    agree("g");
}

/// The reference's tokens, forced: the error from its f32 is at most twice what its own bf16 has.
#[test]
fn bf16_is_about_as_exact_as_the_reference() {
    for name in ["a", "b", "c", "d", "e", "f", "g"] {
        let (checkpoint, cases, requests) = golden(name);
        for world_size in [1, 3] {
            on_ranks(&repository(&checkpoint), world_size, DType::Bf16, |rank| {
                for (case, request) in cases.iter().zip(&requests) {
                    let forced = ids(&case["greedy"]);
                    let told = rank.force(&prompt(case, request), &forced);
                    let chosen = told.iter().zip(&forced).map(|(all, forced)| {
                        all.iter().find(|(id, _)| id == forced).expect("all tokens are told").1
                    });
                    let bound = 2.0 * case["full_bf16_max_error"].as_f64().unwrap() as f32;
                    let error = error(case, &told[0], chosen);
                    let context = format!("{name}, {}, {world_size} ranks", case["name"]);
                    assert!(error <= bound, "{context}: {error} > {bound}");
                }
            });
        }
    }
}

/// A request with the reference's positions.
fn prompt(case: &Value, request: &Request) -> Prompt {
    let [t, h, w] = [0, 1, 2].map(|axis| ids(&case["positions"][axis]));
    let pictures = request.pictures.iter().map(|picture| Picture {
        pixels: picture.pixels.clone(),
        grid: picture.grid.to_array().map(|n| n as usize),
    });
    Prompt {
        token_ids: request.token_ids.clone(),
        positions: (0..t.len()).map(|i| [t[i], h[i], w[i]]).collect(),
        pictures: pictures.collect(),
    }
}

//! A request's tokens do not depend on how its prompt was chunked, on its company, on threads, or on being computed again.

use super::common::{Group, Request, Script, bits, json, request, token_ids};
use lockstep_shard::{
    device::{DType, KV_BLOCK_TOKENS, Truncation},
    runner::{
        Step,
        step::{Admission, Chunk, Encode, SampledToken, Sampling, SeqId},
    },
};

const WHOLE: Script = Script { chunk: 4096, new_tokens: 12 };
const CHECKPOINT: &str = "tests/checkpoints/a";

/// Some requests: text, one picture, several pictures, many windows.
fn requests() -> Vec<Request> {
    let golden = json("tests/goldens/a.json");
    let wanted = ["text_unicode", "one_picture", "many_windows", "sizes_each_its_own", "pictures_over_turns"];
    let cases = golden["cases"].as_array().unwrap().iter();
    let cases = cases.filter(|case| wanted.contains(&case["name"].as_str().unwrap()));
    let requests: Vec<_> = cases.map(|case| request(CHECKPOINT, case)).collect();
    assert_eq!(requests.len(), wanted.len());
    requests
}

/// Ways to draw: plainly, from the best tokens only, and with every penalty.
fn samplings() -> [Sampling; 3] {
    let plain = Sampling { temperature: Some(0.9), seed: 11, logprobs: Some(3), ..Sampling::default() };
    let truncated = Sampling { truncation: Truncation::new(40, 0.9, 0.01), ..plain.clone() };
    let penalized = Sampling {
        temperature: Some(1.4),
        truncation: Truncation::new(0, 0.8, 0.0),
        repetition_penalty: 1.2,
        presence_penalty: 0.5,
        frequency_penalty: 0.4,
        logit_bias: vec![(7, 2.0), (300, -4.0)],
        ..plain.clone()
    };
    [plain, truncated, penalized]
}

#[test]
fn chunks_of_any_size_give_the_same_bits() {
    for (dtype, world_size) in [(DType::F32, 1), (DType::Bf16, 2)] {
        let group = Group::new(CHECKPOINT, world_size, dtype);
        for request in requests() {
            let request = [request];
            let run = |chunk| group.run(&request, &Script { chunk, ..WHOLE }.steps(&group, &request));
            let whole = run(4096);
            for chunk in [1, 7, 32, 33] {
                let chunked = run(chunk);
                let drawn = |results: &[lockstep_shard::runner::StepResult]| {
                    let tokens =
                        results.iter().flat_map(|result| &result.sampled).flat_map(|one| one.tokens.clone());
                    bits(&tokens.collect::<Vec<_>>())
                };
                assert_eq!(drawn(&chunked), drawn(&whole), "{dtype:?}, chunks of {chunk}");
                // Hidden state and lengths after the last step.
                assert_eq!(chunked.last().unwrap().state_hash, whole.last().unwrap().state_hash);
            }
        }
    }
}

#[test]
fn company_and_threads_change_nothing() {
    for (dtype, world_size) in [(DType::F32, 3), (DType::Bf16, 1)] {
        let group = Group::new(CHECKPOINT, world_size, dtype);
        let requests = requests();
        let together = group.answers(&requests, &WHOLE);
        let threaded =
            Group { threads: 3, ..group.clone() }.answers(&requests, &Script { chunk: 19, ..WHOLE });
        for (i, request) in requests.iter().enumerate() {
            let alone = group.answers(std::slice::from_ref(request), &WHOLE);
            assert_eq!(bits(&together[i]), bits(&alone[0]), "{dtype:?}, request {i} in company");
            assert_eq!(bits(&threaded[i]), bits(&alone[0]), "{dtype:?}, request {i} on three threads");
        }
    }
}

/// A picture is encoded in pieces while another sequence goes on, and a first attempt at it is given up half-way.
#[test]
fn pieces_of_encoding_between_steps_give_the_same_bits() {
    for (dtype, world_size) in [(DType::F32, 3), (DType::Bf16, 2)] {
        let group = Group::new(CHECKPOINT, world_size, dtype);
        let all = requests();
        let many_windows = all.iter().find(|request| request.pictures.len() == 1).unwrap().clone();
        let requests = [all[0].clone(), many_windows];
        assert!(requests[0].pictures.is_empty());
        let whole = WHOLE.steps(&group, &requests);
        let expected = group.run(&requests, &whole);

        let encode = whole[0].encodes[0].clone();
        let none = |encode: &Encode| Encode { feature_blocks: vec![], ..encode.clone() };
        let mut steps = vec![Step { encodes: vec![], ..whole[0].clone() }];
        let given_up = encode.to / 2;
        let mut pieces =
            vec![Step { encodes: vec![Encode { to: given_up, ..encode.clone() }], ..Step::default() }];
        pieces.push(Step { evictions: vec![encode.hash], ..Step::default() });
        for from in 0..7 {
            let (from, to) = (encode.to * from / 7, encode.to * (from + 1) / 7);
            let piece = if from == 0 { encode.clone() } else { none(&encode) };
            pieces.push(Step { encodes: vec![Encode { from, to, ..piece }], ..Step::default() });
        }
        // The first sequence draws one token in each of these steps, from what it has computed of its own.
        let of_first = whole[1..].iter().map(|step| step.chunks.iter().filter(|chunk| chunk.id.0 == 0));
        let of_first: Vec<Vec<Chunk>> = of_first.map(|chunks| chunks.cloned().collect()).collect();
        assert!(pieces.len() < of_first.len());
        for (i, chunks) in of_first.into_iter().enumerate() {
            let step = pieces.get(i).cloned().unwrap_or_default();
            steps.push(Step { chunks, ..step });
        }
        // Then the second one, alone.
        for step in &whole[1..] {
            let chunks = step.chunks.iter().filter(|chunk| chunk.id.0 == 1).cloned().collect();
            steps.push(Step { chunks, ..Step::default() });
        }
        let found = group.run(&requests, &steps);
        for id in 0..2 {
            let drawn = |results: &[lockstep_shard::runner::StepResult]| {
                let sampled = results.iter().flat_map(|result| &result.sampled).filter(|one| one.id.0 == id);
                bits(&sampled.flat_map(|one| one.tokens.clone()).collect::<Vec<_>>())
            };
            assert_eq!(drawn(&found), drawn(&expected), "sequence {id}, {dtype:?}, world size {world_size}");
        }
    }
}

#[test]
fn preempted_sequences_draw_the_same() {
    let group = Group::new(CHECKPOINT, 2, DType::F32);
    let mut requests = requests();
    for (i, request) in requests.iter_mut().enumerate() {
        request.sampling = Sampling { seed: i as u64, ..samplings()[i % 3].clone() };
    }
    let undisturbed = group.answers(&requests, &WHOLE);
    for after in [1, 4, 9] {
        for chunk in [4096, 11] {
            let script = Script { chunk, ..WHOLE };
            let steps = script.steps_with_preemption(&group, &requests, after, &undisturbed);
            let preempted = group.drawn(&requests, &steps);
            for (one, other) in preempted.iter().zip(&undisturbed) {
                assert_eq!(bits(one), bits(other), "after {after} steps, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn draws_are_the_same_at_every_world_size() {
    let requests: Vec<Request> = requests()
        .into_iter()
        .flat_map(|request| {
            (0..6).map(move |branch| {
                let sampling = Sampling { branch, ..samplings()[branch as usize / 2].clone() };
                Request { sampling, ..request.clone() }
            })
        })
        .collect();
    let draw = |world_size| -> Vec<Vec<u32>> {
        let answers = Group::new(CHECKPOINT, world_size, DType::F32).answers(&requests, &WHOLE);
        answers.iter().map(|answer| token_ids(answer)).collect()
    };
    let alone = draw(1);
    assert_ne!(alone[0], alone[1], "branches draw their own tokens");
    for world_size in [2, 3, 5, 8] {
        assert_eq!(draw(world_size), alone, "world size {world_size}");
    }
}

#[test]
fn a_replay_goes_on_with_the_same_tokens() {
    let group = Group::new(CHECKPOINT, 2, DType::F32);
    for sampling in samplings() {
        let requests: Vec<Request> =
            requests().into_iter().map(|request| Request { sampling: sampling.clone(), ..request }).collect();
        let answers = group.answers(&requests, &WHOLE);
        let known = 5;
        let longer: Vec<Request> = requests
            .iter()
            .zip(&answers)
            .map(|(request, answer)| {
                let token_ids = [request.token_ids.clone(), token_ids(&answer[..known])].concat();
                Request { token_ids, ..request.clone() }
            })
            .collect();
        let mut steps = Script { chunk: 50, new_tokens: WHOLE.new_tokens - known }.steps(&group, &longer);
        for (admission, request) in steps[0].admissions.iter_mut().zip(&requests) {
            admission.num_prompt_tokens = request.token_ids.len();
        }
        let mut replayed: Vec<Vec<SampledToken>> = vec![Vec::new(); requests.len()];
        for sampled in group.run(&longer, &steps).into_iter().flat_map(|result| result.sampled) {
            replayed[sampled.id.0 as usize].extend(sampled.tokens);
        }
        for (replayed, answer) in replayed.iter().zip(&answers) {
            assert_eq!(bits(replayed), bits(&answer[known..]), "{sampling:?}");
        }
    }
}

/// Sequence 0 computes the prompt of `request`; then `forks` more of it begin with its blocks and draw as other branches.
/// With `abandoned`, sequence 0 leaves when they enter.
fn forked(group: &Group, request: &Request, forks: usize, abandoned: bool, new_tokens: usize) -> Vec<Step> {
    let prompt = request.token_ids.len();
    let script = Script { chunk: 4096, new_tokens: 1 };
    let mut steps = script.steps(group, std::slice::from_ref(request));
    let mut num_blocks = prompt.div_ceil(KV_BLOCK_TOKENS);
    let mut tables: Vec<usize> = vec![num_blocks];
    let (shared, rest) = ((prompt - 1) / KV_BLOCK_TOKENS, (prompt - 1) % KV_BLOCK_TOKENS);
    let mut enter = Step::default();
    for id in 1..=forks {
        let mut blocks: Vec<u32> = (0..shared as u32).collect();
        if rest > 0 {
            enter.copies.push((shared as u32, num_blocks as u32));
            blocks.push(num_blocks as u32);
            num_blocks += 1;
        }
        tables.push(blocks.len());
        enter.admissions.push(Admission {
            id: SeqId(id as u64),
            num_computed_tokens: prompt - 1,
            blocks,
            sampling: Sampling { branch: id as u32, ..request.sampling.clone() },
            ..steps[0].admissions[0].clone()
        });
    }
    enter.releases.extend(abandoned.then_some(SeqId(0)));
    for i in 0..new_tokens {
        let mut step = if i == 0 { enter.clone() } else { Step::default() };
        for (id, table) in tables.iter_mut().enumerate().skip(usize::from(abandoned)) {
            let start = prompt + i - usize::from(id > 0);
            let missing = (start + 1).div_ceil(KV_BLOCK_TOKENS) - *table;
            let new_blocks = (num_blocks as u32..(num_blocks + missing) as u32).collect();
            (*table, num_blocks) = (*table + missing, num_blocks + missing);
            let id = SeqId(id as u64);
            step.chunks.push(Chunk { id, start, length: 1, new_blocks, max_new_tokens: 1 });
        }
        steps.push(step);
    }
    steps
}

#[test]
fn forks_draw_what_they_would_alone() {
    const FORKS: usize = 3;
    const NEW: usize = 40;
    let mut asked = requests();
    let long: Vec<u32> = (0..70).map(|i| (i * 37) % 400).collect();
    // The last block of what is shared: full, nearly empty, nearly full, and none at all.
    asked.extend([65, 66, 64, 1].map(|length| Request {
        token_ids: long[..length].to_vec(),
        media: vec![],
        pictures: vec![],
        sampling: Sampling::default(),
    }));
    for (dtype, world_size) in [(DType::F32, 1), (DType::Bf16, 2)] {
        let group = Group::new(CHECKPOINT, world_size, dtype);
        for (i, request) in asked.iter().enumerate() {
            let request = Request { sampling: samplings()[i % 3].clone(), ..request.clone() };
            let branch = |branch| Request {
                sampling: Sampling { branch, ..request.sampling.clone() },
                ..request.clone()
            };
            let branches: Vec<Request> = (0..=FORKS as u32).map(branch).collect();
            let alone = group.answers(&branches, &Script { new_tokens: NEW, ..WHOLE });
            for abandoned in [false, true] {
                let steps = forked(&group, &request, FORKS, abandoned, NEW);
                let mut drawn = vec![Vec::new(); FORKS + 1];
                let results = group.run(std::slice::from_ref(&request), &steps);
                for sampled in results.into_iter().flat_map(|result| result.sampled) {
                    drawn[sampled.id.0 as usize].extend(sampled.tokens);
                }
                for (branch, (drawn, alone)) in drawn.iter().zip(&alone).enumerate() {
                    let common = if abandoned && branch == 0 { 1 } else { NEW };
                    assert!(drawn.len() >= common);
                    assert_eq!(
                        bits(&drawn[..common]),
                        bits(&alone[..common]),
                        "{dtype:?}, request {i}, branch {branch}, abandoned: {abandoned}"
                    );
                }
            }
            assert_ne!(token_ids(&alone[1]), token_ids(&alone[2]), "branches draw their own tokens");
        }
    }
}

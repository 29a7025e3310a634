//! In the repeatable mode, a token's bits do not depend on what is computed beside it, or when.

use lockstep_shard::service::gpu::Sums;

use super::{
    common::{Group, Script, bits},
    requests::{on_gpus, requests},
};

fn repeatable(world_size: usize) -> Group {
    let mut group = on_gpus(world_size, Sums::Host);
    group.gpu.is_repeatable = true;
    group
}

#[test]
fn chunks_neighbours_and_recomputation_change_no_bit() {
    let requests = requests(3);
    for world_size in [1, 2] {
        let group = repeatable(world_size);
        let whole = Script { chunk: 512, new_tokens: 5 };
        let expected = group.answers(&requests, &whole);
        let pieces = group.answers(&requests, &Script { chunk: 11, new_tokens: 5 });
        let alone = group.answers(&requests[2..], &whole);
        let again = group.drawn(&requests, &whole.steps_with_preemption(&group, &requests, 3, &expected));
        for (i, expected) in expected.iter().enumerate() {
            let expected = bits(expected);
            assert_eq!(bits(&pieces[i]), expected, "{world_size} ranks, request {i}, in pieces");
            // What was drawn before the blocks were lost comes in front.
            assert_eq!(bits(&again[i]), expected, "{world_size} ranks, request {i}, computed again");
        }
        assert_eq!(bits(&alone[0]), bits(&expected[2]), "{world_size} ranks, alone");
    }
}

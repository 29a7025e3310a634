//! Ranks that lose their group, and find another.

use std::{sync::Arc, thread};

use lockstep_shard::{
    collective::{DEFAULT_SLOT_BYTES, SharedMemory},
    service::{gate::Gate, gpu::Sums, load},
};

use super::{
    common::{Script, bits, run_steps},
    gpu,
    requests::{on_gpus, requests},
};

/// Steps of two epochs give the same bits: what was kept of steps in the first is not used in the second, whose ranks meet anew.
#[test]
fn another_epoch_is_as_good_as_the_first() {
    let requests = requests(2);
    for (world_size, sums) in [(1, Sums::Host), (2, Sums::Nccl), (2, Sums::Host)] {
        if !gpu::has(world_size, sums) {
            continue;
        }
        let group = on_gpus(world_size, sums);
        let steps = Script { chunk: 64, new_tokens: 5 }.steps(&group, &requests);
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (1..=2).map(|epoch| folder.path().join(format!("{epoch}"))).collect();
        if world_size > 1 {
            paths.iter().for_each(|path| SharedMemory::create(path, world_size, DEFAULT_SLOT_BYTES).unwrap());
        }
        let work = |rank: usize| {
            let options = group.options(rank, paths[0].clone());
            let gate = Gate::new(options.epoch, options.threads);
            let mut loaded = load::load(&options, &gate, &mut |_| ()).unwrap();
            let first = run_steps(&mut loaded, &requests, &steps).unwrap();
            gate.ask(2).unwrap();
            Arc::clone(&loaded.media).clear(2);
            loaded.rank.regroup(2, &paths[1]).unwrap();
            let second = run_steps(&mut loaded, &requests, &steps).unwrap();
            (first, second)
        };
        let answers: Vec<_> = thread::scope(|scope| {
            let ranks: Vec<_> = (0..world_size).map(|rank| scope.spawn(move || work(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        for (first, second) in &answers {
            for (first, second) in first.iter().zip(second) {
                assert_eq!(first.state_hash, second.state_hash);
                for (first, second) in first.sampled.iter().zip(&second.sampled) {
                    assert_eq!(bits(&first.tokens), bits(&second.tokens));
                }
            }
        }
    }
}

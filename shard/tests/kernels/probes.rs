//! The emulation itself: that it runs what is right, and sees what is wrong.

use super::{
    emulator::{Launch, Program, Source},
    numbers::{Numbers, to_f64},
};

const NOTHING: [u32; 4] = [0; 4];

fn launch(kernel: &str, block: usize) -> Launch {
    Launch::new(kernel, [1, 1, 1], block, 1)
}

/// The launch must fail, and the report must say this.
fn assert_seen(launch: Launch, report: &str) {
    let error = launch.run(Program::of(Source::Probes)).err().expect("a fault is seen");
    assert!(error.to_string().contains(report), "{error:#} does not contain {report:?}");
}

#[test]
fn a_missing_barrier_shows() {
    let from: Vec<u32> = (0..96).collect();
    let reversed: Vec<u32> = (0..96).rev().collect();
    for seed in 0..10 {
        for with_barrier in [true, false] {
            let mut outputs = Launch::new("reverse", [1, 1, 1], 96, seed)
                .dynamic_shared_bytes(96 * 4)
                .input(&from)
                .output(&[0_u32; 96])
                .u32(usize::from(with_barrier))
                .run(Program::of(Source::Probes))
                .unwrap();
            assert_eq!(outputs.take::<u32>() == reversed, with_barrier, "seed {seed}");
        }
    }
}

#[test]
fn an_index_beyond_a_buffer_shows() {
    let overflow = "heap-buffer-overflow";
    for index in [3, 4] {
        let shared = launch("read_shared", 4).u32(index).output(&NOTHING);
        let dynamic = launch("read_dynamic_shared", 4).dynamic_shared_bytes(16).u32(index).output(&NOTHING);
        let global = launch("read_global", 4).input(&[5_u32, 6, 7, 8]).u32(index).output(&NOTHING);
        if index == 4 {
            assert_seen(shared, overflow);
            assert_seen(dynamic, overflow);
            assert_seen(global, overflow);
        } else {
            for (launch, expected) in [(shared, 3), (dynamic, 3), (global, 8)] {
                let mut outputs = launch.run(Program::of(Source::Probes)).unwrap();
                assert_eq!(outputs.take::<u32>(), [expected; 4]);
            }
        }
    }
    let misaligned = launch("read_vector", 1).input(&[0_u32; 8]).u32(1).output(&NOTHING);
    assert_seen(misaligned, "misaligned");
}

#[test]
fn threads_that_do_not_meet_show() {
    // What is seen first depends on the order: a thread that waits, or the end of one that is waited for.
    let report = "wait";
    assert_seen(launch("barrier_in_branch", 32), report);
    assert_seen(launch("early_end", 64), report);
    assert_seen(launch("shuffle_in_branch", 32).output(&[0_u32; 32]), report);
}

#[test]
fn a_request_that_does_not_fit_its_kernel_is_refused() {
    assert_seen(launch("write_input", 4).input(&NOTHING), "a buffer that it may not change");
    assert_seen(launch("read_shared", 4).u32(0), "another number of arguments");
    assert_seen(launch("read_shared", 4).u32(0).input(&NOTHING), "no buffer to be written to");
    assert_seen(launch("read_shared", 4).u64(0).output(&NOTHING), "of another kind");
    assert_seen(launch("no_kernel", 4), "no kernel of this name");
    assert_seen(Launch::new("early_end", [0, 1, 1], 32, 1), "no grid");
}

#[test]
fn lanes_see_one_another() {
    let numbers = Numbers::new(1).u32(32);
    let mut outputs =
        launch("votes", 32).input(&numbers).output(&[0_u32; 128]).run(Program::of(Source::Probes)).unwrap();
    let vote = numbers.iter().enumerate().fold(0, |vote, (lane, number)| vote | (number % 2) << lane);
    for (lane, seen) in outputs.take::<u32>().chunks(4).enumerate() {
        let expected = [vote, numbers[lane.saturating_sub(1)], numbers[(lane + 1).min(31)], numbers[5]];
        assert_eq!(seen, expected, "lane {lane}");
    }
}

#[test]
fn halves_of_a_warp_meet_apart() {
    let numbers: Vec<u32> = (0..32).map(|lane| lane * lane).collect();
    for seed in 0..10 {
        let mut outputs = Launch::new("meet_in_halves", [1, 1, 1], 32, seed)
            .input(&numbers)
            .output(&[0_u32; 32])
            .run(Program::of(Source::Probes))
            .unwrap();
        let fours = numbers[..16].chunks(4).flat_map(|four| [four.iter().sum::<u32>(); 4]);
        let expected: Vec<u32> = numbers[16..].iter().copied().chain(fours).collect();
        assert_eq!(outputs.take::<u32>(), expected, "seed {seed}");
    }
}

#[test]
fn a_product_is_that_of_its_matrices() {
    let mut numbers = Numbers::new(2);
    let (a, b) = (numbers.bf16(16 * 16, 1.0), numbers.bf16(16 * 8, 1.0));
    let d = numbers.f32(16 * 8, 1.0);
    let mut outputs =
        launch("product", 32).input(&a).input(&b).output(&d).run(Program::of(Source::Probes)).unwrap();
    let (a, b) = (to_f64(&a), to_f64(&b));
    for (index, got) in outputs.take::<f32>().into_iter().enumerate() {
        let (row, column) = (index / 8, index % 8);
        let sum: f64 = (0..16).map(|k| a[row * 16 + k] * b[k * 8 + column]).sum();
        let expected = (f64::from(d[index]) + sum) as f32;
        assert!((got - expected).abs() <= 2.0 * f32::EPSILON * expected.abs(), "{row}, {column}");
    }
}

#[test]
fn every_thread_of_every_block_runs_once() {
    let (grid, block) = ([3, 2, 2], 40);
    let num_threads = grid.iter().product::<usize>() * block;
    let mut outputs = Launch::new("count_threads", grid, block, 3)
        .output(&[0_u32])
        .output(&vec![u32::MAX; num_threads * 2])
        .run(Program::of(Source::Probes))
        .unwrap();
    assert_eq!(outputs.take::<u32>(), [num_threads as u32]);
    let expected: Vec<u32> =
        (0..num_threads).flat_map(|thread| [(thread / block) as u32, (thread % block) as u32]).collect();
    assert_eq!(outputs.take::<u32>(), expected);
}

//! The emulation itself: that it runs what is right, and sees what is wrong.

use super::{
    emulator::{Launch, Program, Source},
    gpu::is_left_out,
    numbers::{Numbers, to_f64},
};

const PROBES: &str = "probes of the emulation";

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
    if is_left_out(PROBES) {
        return;
    }
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
    if is_left_out(PROBES) {
        return;
    }
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
    if is_left_out(PROBES) {
        return;
    }
    // What is seen first depends on the order: a thread that waits, or the end of one that is waited for.
    let report = "wait";
    assert_seen(launch("barrier_in_branch", 32), report);
    assert_seen(launch("early_end", 64), report);
    assert_seen(launch("shuffle_in_branch", 32).output(&[0_u32; 32]), report);
}

#[test]
fn a_request_that_does_not_fit_its_kernel_is_refused() {
    if is_left_out(PROBES) {
        return;
    }
    assert_seen(launch("write_input", 4).input(&NOTHING), "a buffer that it may not change");
    assert_seen(launch("read_shared", 4).u32(0), "another number of arguments");
    assert_seen(launch("read_shared", 4).u32(0).input(&NOTHING), "no buffer to be written to");
    assert_seen(launch("read_shared", 4).u64(0).output(&NOTHING), "of another kind");
    assert_seen(launch("no_kernel", 4), "no kernel of this name");
    assert_seen(Launch::new("early_end", [0, 1, 1], 32, 1), "no grid");
}

#[test]
fn lanes_see_one_another() {
    if is_left_out(PROBES) {
        return;
    }
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
    if is_left_out(PROBES) {
        return;
    }
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
    if is_left_out(PROBES) {
        return;
    }
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
fn matrices_are_loaded_by_the_rows_that_lanes_name() {
    if is_left_out(PROBES) {
        return;
    }
    let mut numbers = Numbers::new(3);
    let (rows, order) = (numbers.u32(32 * 4), numbers.order(32));
    let mut outputs = launch("matrices", 32)
        .dynamic_shared_bytes(512)
        .input(&rows)
        .input(&order)
        .output(&[0_u32; 32 * 4])
        .run(Program::of(Source::Probes))
        .unwrap();
    for (index, word) in outputs.take::<u32>().into_iter().enumerate() {
        let (lane, matrix) = (index / 4, index % 4);
        let row = order[8 * matrix + lane / 4] as usize;
        assert_eq!(word, rows[4 * row + lane % 4], "word {matrix} of lane {lane}");
    }
}

#[test]
fn copies_land_when_they_are_waited_for() {
    if is_left_out(PROBES) {
        return;
    }
    let from: Vec<u32> = (1..=12).collect();
    let mut outputs = launch("copies", 1)
        .dynamic_shared_bytes(48)
        .input(&from)
        .output(&[0_u32; 4 * 12])
        .run(Program::of(Source::Probes))
        .unwrap();
    let (first, missing, last, undefined) = (&from[..4], &[0; 4][..], &from[8..], &[u32::MAX; 4][..]);
    let expected = [
        [undefined, undefined, undefined],
        [first, undefined, undefined],
        [first, missing, undefined],
        [first, missing, last],
    ];
    assert_eq!(outputs.take::<u32>(), expected.concat().concat());
}

#[test]
fn products_of_a_warpgroup_come_when_they_are_waited_for() {
    let mut numbers = Numbers::new(4);
    let (a, b) = (numbers.bf16(64 * 16, 1.0), numbers.bf16(16 * 64, 1.0));
    let transposed: Vec<_> = (0..64 * 16).map(|i| b[i % 16 * 64 + i / 16]).collect();
    let products = |fences: usize| {
        launch("warpgroup_products", 128)
            .dynamic_shared_bytes(3 * 2048)
            .input(&a)
            .input(&transposed)
            .input(&b)
            .u32(fences)
            .output(&[0_f32; 3 * 64 * 64])
    };
    let got = products(31).run(Program::of(Source::Probes)).unwrap().take::<f32>();
    let (a, b) = (to_f64(&a), to_f64(&b));
    let (early, late) = got.split_at(64 * 64);
    assert!(early.iter().all(|sum| sum.is_nan()));
    for (index, &got) in late.iter().enumerate() {
        let (row, column) = (index / 64 % 64, index % 64);
        let sum: f64 = (0..16).map(|k| a[row * 16 + k] * b[k * 64 + column]).sum();
        // The second product is added to what there was.
        let expected = (sum + if index < 64 * 64 { 0.0 } else { 1.0 }) as f32;
        assert!((got - expected).abs() <= 2.0 * f32::EPSILON * (expected.abs() + 1.0), "{row}, {column}");
    }
    assert_seen(products(30), "registers were not fenced");
    assert_seen(products(27), "registers were not fenced");
    assert_seen(products(23), "begun with registers that are not held");
    assert_seen(products(15), "has not held the registers of a product that came");
    let unseen = products(29).run(Program::of(Source::Probes)).unwrap().take::<f32>();
    assert!(unseen.iter().all(|sum| sum.is_nan()));
    let three = launch("product_of_three_warps", 128).dynamic_shared_bytes(2 * 2048);
    assert_seen(three, "the warps of a warpgroup begin different products");
}

#[test]
fn a_block_votes() {
    if is_left_out(PROBES) {
        return;
    }
    for odd in [None, Some(0), Some(77)] {
        let mut numbers = [0_u32; 96];
        if let Some(odd) = odd {
            numbers[odd] = 5;
        }
        let any = launch("any_of_block", 96).input(&numbers).output(&[7_u32; 96]);
        let voted = any.run(Program::of(Source::Probes)).unwrap().take::<u32>();
        assert_eq!(voted, [u32::from(odd.is_some()); 96], "{odd:?}");
    }
}

#[test]
fn what_others_write_comes_while_threads_wait() {
    if is_left_out(PROBES) {
        return;
    }
    let wait = || launch("wait_for_flag", 40).output(&[0_u32]).output(&[0_u32]).output(&[7_u32; 40]);
    let mut outputs = wait()
        .written_later(1, 0, &[3_u32])
        .written_later(0, 0, &[1_u32])
        .run(Program::of(Source::Probes))
        .unwrap();
    assert_eq!([outputs.take::<u32>(), outputs.take(), outputs.take()].concat()[..3], [1, 3, 3]);
    assert_seen(wait().written_later(1, 0, &[3_u32]), "wait for what nobody writes");
}

#[test]
fn every_thread_of_every_block_runs_once() {
    if is_left_out(PROBES) {
        return;
    }
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

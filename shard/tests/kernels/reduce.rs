//! `reduce.cu`.

use anyhow::{Result, ensure};
use half::bf16;

use super::{
    emulator::{Launch, Outputs, Program, Source},
    gpu::is_left_out,
    numbers::{Numbers, ROUNDING, compare, norms, same_bits, to_f64, unwritten},
};

const BLOCK: usize = 256;
const MAX_RANKS: usize = 8;
/// Blocks that the flags have room for.
const FLAG_BLOCKS: usize = 4;

/// The ranks' parts of a sum. Those of the first two all but cancel, so that in another order a sum has other bits.
fn parts(numbers: &mut Numbers, world_size: usize, len: usize) -> Vec<Vec<bf16>> {
    let mut parts: Vec<Vec<bf16>> = (0..world_size).map(|_| numbers.bf16(len, 1.0)).collect();
    if let [first, second, ..] = &mut parts[..] {
        for (first, second) in first.iter_mut().zip(second).step_by(2) {
            *first = bf16::from_f32(first.to_f32() * 2_f32.powi(22));
            *second = -*first;
        }
    }
    parts
}

/// Added in f32, in the order of ranks.
fn sums(parts: &[Vec<bf16>]) -> Vec<bf16> {
    let sum = |i: usize| parts[1..].iter().fold(parts[0][i].to_f32(), |sum, part| sum + part[i].to_f32());
    (0..parts[0].len()).map(|i| bf16::from_f32(sum(i))).collect()
}

fn with_parts(launch: Launch, parts: &[Vec<bf16>]) -> Launch {
    parts.iter().fold(launch.pointers(parts.len()), |launch, part| launch.input(part))
}

/// Sums of any number of ranks, with the bits of that order.
pub fn check_sums(program: &Program, seed: u64) -> Result<()> {
    for world_size in 1..=MAX_RANKS {
        for count in [8, 37, 6000, 6001] {
            let parts = parts(&mut Numbers::new(seed), world_size, count);
            let mut outputs = with_parts(Launch::new("sum_ranks", [2, 1, 1], BLOCK, seed), &parts)
                .u32(world_size)
                .u64(count)
                .output(&unwritten(count))
                .run(program)?;
            same_bits(&format!("{count} of {world_size} ranks"), &outputs.take(), &sums(&parts))?;
        }
    }
    Ok(())
}

/// What is normed after a sum over ranks, and what is to come out.
struct Rows {
    rows: usize,
    cols: usize,
    parts: Vec<Vec<bf16>>,
    residual: Option<Vec<bf16>>,
    weight: Vec<f32>,
    normed: Vec<bf16>,
    sum: Vec<bf16>,
}

impl Rows {
    /// What comes out is what `residual_norm` makes of the rounded sum of ranks.
    fn new(world_size: usize, [rows, cols]: [usize; 2], with_residual: bool, seed: u64) -> Result<Self> {
        let mut numbers = Numbers::new(seed);
        let parts = parts(&mut numbers, world_size, rows * cols);
        let residual = with_residual.then(|| numbers.bf16(rows * cols, 1.0));
        let weight: Vec<f32> = numbers.f32(cols, 0.5).into_iter().map(|w| 1.0 + w).collect();
        let mut outputs = Launch::new("residual_norm", [rows, 1, 1], BLOCK, seed)
            .input(&sums(&parts))
            .optional(residual.as_deref())
            .input(&weight)
            .f32(1e-6)
            .u32(cols)
            .output(&unwritten(rows * cols))
            .output(&unwritten(rows * cols))
            .run(Program::of(Source::Rowwise))?;
        let (normed, sum) = (outputs.take(), outputs.take());
        Ok(Self { rows, cols, parts, residual, weight, normed, sum })
    }

    fn what(&self) -> String {
        let Self { rows, cols, parts, residual, .. } = self;
        format!("{rows} x {cols} of {} ranks, residual: {}", parts.len(), residual.is_some())
    }

    fn check(&self, what: &str, normed: &[bf16], sum: &[bf16]) -> Result<()> {
        same_bits(&format!("sums of {what}"), sum, &self.sum)?;
        let expected = norms(&to_f64(&self.sum), &self.weight);
        compare(&format!("norms of {what}"), normed, &expected, |i| ROUNDING * expected[i].abs())?;
        same_bits(&format!("norms of {what}"), normed, &self.normed)
    }
}

/// The sum with residual and norm: the same bits as one after the other.
pub fn check_norms(program: &Program, seed: u64) -> Result<()> {
    for (world_size, shape, with_residual) in
        [(1, [2, 64], true), (3, [3, 37], false), (4, [2, 3584], true), (8, [1, 2050], true)]
    {
        let rows = Rows::new(world_size, shape, with_residual, seed)?;
        let mut outputs =
            with_parts(Launch::new("sum_ranks_residual_norm", [rows.rows, 1, 1], BLOCK, seed), &rows.parts)
                .u32(world_size)
                .optional(rows.residual.as_deref())
                .input(&rows.weight)
                .f32(1e-6)
                .u32(rows.cols)
                .output(&unwritten(rows.sum.len()))
                .output(&unwritten(rows.sum.len()))
                .run(program)?;
        rows.check(&rows.what(), &outputs.take(), &outputs.take())?;
    }
    Ok(())
}

/// When the other ranks come to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peers {
    /// All are there before this one.
    Before,
    /// All are there, and some at the next call already.
    Ahead,
    /// Their parts and then their flags are written while this one waits.
    Later,
    /// Never.
    Never,
}

/// One rank's side of a call, in which the emulation plays the others.
#[derive(Clone, Copy, Debug)]
struct Call {
    rank: usize,
    blocks: usize,
    /// The number of the call.
    epoch: u32,
    peers: Peers,
    abort: bool,
}

/// What a call left behind beside its results.
struct After {
    flags: Vec<Vec<u32>>,
    epochs: Vec<u32>,
    status: u32,
}

impl Call {
    /// Runs `kernel`, whose arguments after those of the meeting `rest` gives; and what came out of these.
    fn run(
        self,
        program: &Program,
        kernel: &str,
        parts: &[Vec<bf16>],
        seed: u64,
        rest: impl FnOnce(Launch) -> Launch,
    ) -> Result<(After, Outputs)> {
        let (world_size, last) = (parts.len(), self.epoch.wrapping_sub(1));
        let others = || (0..world_size).filter(|&peer| peer != self.rank);
        let mut launch = Launch::new(kernel, [self.blocks, 1, 1], BLOCK, seed).pointers(world_size);
        let first_part = launch.num_arguments();
        let writes_part = kernel == GATHER;
        for (peer, part) in parts.iter().enumerate() {
            let written = if peer == self.rank { !writes_part } else { self.peers != Peers::Later };
            launch = launch.output(&if written { part.clone() } else { unwritten(part.len()) });
        }
        let mut mine = vec![last; FLAG_BLOCKS * MAX_RANKS];
        if matches!(self.peers, Peers::Before | Peers::Ahead) {
            let ahead = u32::from(self.peers == Peers::Ahead);
            let places = (0..self.blocks).flat_map(|block| others().map(move |peer| (block, peer)));
            places.for_each(|(block, peer)| mine[block * MAX_RANKS + peer] = self.epoch.wrapping_add(ahead));
        }
        launch = launch.pointers(world_size);
        let first_flags = launch.num_arguments();
        for peer in 0..world_size {
            let others = vec![last; FLAG_BLOCKS * MAX_RANKS];
            launch = launch.output(if peer == self.rank { &mine } else { &others });
        }
        launch = launch.u32(self.rank).u32(world_size).output(&[last; FLAG_BLOCKS]);
        launch = rest(launch.input(&[u32::from(self.abort)]).output(&[0_u32]));
        if self.peers == Peers::Later {
            for peer in others() {
                launch = launch.written_later(first_part + peer as u32, 0, &parts[peer]);
                for block in 0..self.blocks {
                    let slot = block * MAX_RANKS + peer;
                    launch = launch.written_later(first_flags + self.rank as u32, slot, &[self.epoch]);
                }
            }
        }
        let mut outputs = launch.run(program)?;
        for (peer, part) in parts.iter().enumerate() {
            let after: Vec<bf16> = outputs.take();
            let is_known = self.peers != Peers::Later || peer == self.rank;
            ensure!(!is_known || after == *part, "{self:?}: the part of rank {peer} is another one");
        }
        let flags = (0..world_size).map(|_| outputs.take()).collect();
        let after = After { flags, epochs: outputs.take(), status: outputs.take()[0] };
        Ok((after, outputs))
    }

    /// Whether the peers were told that every block has come, and nothing else was.
    fn check(self, after: &After) -> Result<()> {
        let last = self.epoch.wrapping_sub(1);
        for (peer, flags) in after.flags.iter().enumerate().filter(|&(peer, _)| peer != self.rank) {
            for (slot, &flag) in flags.iter().enumerate() {
                let told = slot / MAX_RANKS < self.blocks && slot % MAX_RANKS == self.rank;
                let expected = if told { self.epoch } else { last };
                ensure!(flag == expected, "{self:?}: flag {slot} of {peer} is {flag}, not {expected}");
            }
        }
        for (block, &epoch) in after.epochs.iter().enumerate() {
            let expected = if block < self.blocks { self.epoch } else { last };
            ensure!(epoch == expected, "{self:?}: block {block} counts {epoch} calls, not {expected}");
        }
        ensure!((after.status != 0) == self.abort, "{self:?}: the status is {}", after.status);
        Ok(())
    }
}

/// Sums of parts that are there and that are waited for.
pub fn check_one_shot(program: &Program, seed: u64) -> Result<()> {
    for (world_size, shape, call) in [
        (2, [5, 64], Call { rank: 1, blocks: 2, epoch: 1, peers: Peers::Later, abort: false }),
        (4, [7, 37], Call { rank: 0, blocks: 3, epoch: 0, peers: Peers::Later, abort: false }),
        (8, [2, 2048], Call { rank: 3, blocks: 1, epoch: 7, peers: Peers::Before, abort: false }),
        (4, [2, 48], Call { rank: 2, blocks: 2, epoch: u32::MAX, peers: Peers::Ahead, abort: false }),
        (1, [2, 48], Call { rank: 0, blocks: 2, epoch: 5, peers: Peers::Before, abort: false }),
    ] {
        let rows = Rows::new(world_size, shape, true, seed)?;
        let len = rows.sum.len();
        let (after, mut outputs) =
            call.run(program, "one_shot_residual_norm", &rows.parts, seed, |launch| {
                let launch = launch.optional(rows.residual.as_deref()).input(&rows.weight).f32(1e-6);
                launch.u32(rows.rows).u32(rows.cols).output(&unwritten(len)).output(&unwritten(len))
            })?;
        call.check(&after)?;
        rows.check(&format!("{}, {call:?}", rows.what()), &outputs.take(), &outputs.take())?;

        let (after, mut outputs) = call.run(program, "one_shot_sum", &rows.parts, seed + 1, |launch| {
            launch.u64(len).output(&unwritten(len))
        })?;
        call.check(&after)?;
        same_bits(&format!("{world_size} ranks, {call:?}"), &outputs.take(), &sums(&rows.parts))?;
    }
    Ok(())
}

/// The kernel that writes its rank's part itself.
const GATHER: &str = "one_shot_gather";

/// Words of all ranks, in their order, which are there or are waited for.
pub fn check_gather(program: &Program, seed: u64) -> Result<()> {
    for (world_size, words, rank, epoch, peers) in [
        (1, 5, 0, 3, Peers::Before),
        (2, 5, 0, 1, Peers::Later),
        (2, 320, 1, 2, Peers::Ahead),
        (3, 75, 2, 0, Peers::Later),
        (5, 1, 3, u32::MAX, Peers::Later),
        (8, 320, 4, 7, Peers::Later),
        (8, 257, 7, 8, Peers::Before),
    ] {
        let call = Call { rank, blocks: 1, epoch, peers, abort: false };
        let mut numbers = Numbers::new(seed);
        // A word is two numbers.
        let parts: Vec<_> = (0..world_size).map(|_| numbers.bf16(2 * words, 1.0)).collect();
        let all = parts.concat();
        let (after, mut outputs) = call.run(program, GATHER, &parts, seed, |launch| {
            launch.input(&parts[rank]).u32(words).output(&unwritten(all.len()))
        })?;
        call.check(&after)?;
        same_bits(&format!("{words} words, {call:?}"), &outputs.take(), &all)?;
    }
    Ok(())
}

#[test]
fn words_of_ranks_are_gathered() {
    for seed in 0..3 {
        check_gather(Program::of(Source::Reduce), seed).unwrap();
    }
}

#[test]
fn ranks_are_added_in_their_order() {
    check_sums(Program::of(Source::Reduce), 1).unwrap();
}

#[test]
fn sums_of_ranks_are_normed() {
    check_norms(Program::of(Source::Reduce), 1).unwrap();
}

#[test]
fn peers_are_waited_for() {
    for seed in 0..3 {
        check_one_shot(Program::of(Source::Reduce), seed).unwrap();
    }
}

#[test]
fn waiting_ends_when_it_is_aborted_and_not_before() {
    let program = Program::of(Source::Reduce);
    let parts = parts(&mut Numbers::new(1), 2, 16);
    let run = |abort| {
        let call = Call { rank: 0, blocks: 2, epoch: 9, peers: Peers::Never, abort };
        let (after, mut outputs) =
            call.run(program, "one_shot_sum", &parts, 1, |launch| launch.u64(16).output(&unwritten(16)))?;
        call.check(&after)?;
        same_bits("what is written after a wait in vain", &outputs.take(), &unwritten(16))
    };
    run(true).unwrap();
    // A GPU would wait for good.
    if is_left_out("a wait for what nobody writes") {
        return;
    }
    let error = run(false).expect_err("nobody comes");
    assert!(error.to_string().contains("wait for what nobody writes"), "{error:#}");
}

use super::super::dot::bf16_pair;
use super::super::scratch::Scratch;
use super::super::simd::Portable;
use super::super::testing::*;
use super::*;
use crate::device::{Device, HostElements, HostMatrix};

const SHAPES: [(usize, usize); 11] = [
    (16, 1),
    (16, 2),
    (33, 7),
    (64, 255),
    (48, 256),
    (17, 257),
    (160, 300),
    (304, 513),
    (0, 8),
    (24, 0),
    (130, 1030),
];
const ROWS: [usize; 10] = [0, 1, 2, 3, 4, 5, 11, 13, 25, 200];

fn expected(x: &[f32], weight: &[f32], bias: &[f32], inputs: usize) -> Vec<f64> {
    let outputs = bias.len();
    let rows = x.len().checked_div(inputs).unwrap_or(0);
    let mut out = Vec::new();
    for row in 0..rows {
        for output in 0..outputs {
            let terms =
                (0..inputs).map(|k| f64::from(x[row * inputs + k]) * f64::from(weight[output * inputs + k]));
            out.push(terms.sum::<f64>() + f64::from(bias[output]));
        }
    }
    out
}

#[test]
fn agrees_with_f64_at_every_shape_and_with_every_instruction_set() {
    let devices = devices();
    for dtype in [DType::F32, DType::Bf16] {
        for (outputs, inputs) in SHAPES {
            let mut numbers = Numbers::new((outputs * 1000 + inputs) as u64);
            let bias = numbers.vec(outputs);
            let (weight, values) = matrix(&mut numbers, outputs, inputs, dtype);
            let weight =
                PackedLinear::new(weight, Some(bias.clone()), &Counter::default()).expect("it packs");
            for rows in ROWS {
                let x = numbers.vec(rows * inputs);
                let mut expected = expected(&x, &values, &bias, inputs);
                if inputs == 0 {
                    expected = bias.iter().map(|&b| f64::from(b)).cycle().take(rows * outputs).collect();
                }
                let mut first: Option<Vec<f32>> = None;
                for (name, device) in &devices {
                    let what = format!("{dtype:?} {rows} x {inputs} -> {outputs}, {name}");
                    let input = device.upload(rows, inputs, &x).expect("room");
                    let out = device.linear(&input, &weight).expect("room");
                    let rounds =
                        device.instruction_set() == InstructionSet::Avx512Bf16 && dtype == DType::Bf16;
                    let tolerance = if rounds { 8e-3 } else { 5e-7 } * (inputs as f64).sqrt().max(1.0) * 4.0;
                    assert_close(&expected, out.data(), tolerance, &what);
                    if !rounds {
                        let first = first.get_or_insert_with(|| out.data().to_vec());
                        assert_same_bits(first, out.data(), &what);
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_company() {
    for (name, device) in devices() {
        for dtype in [DType::F32, DType::Bf16] {
            let (outputs, inputs) = (144, 700);
            let mut numbers = Numbers::new(7);
            let (weight, _) = matrix(&mut numbers, outputs, inputs, dtype);
            let weight = PackedLinear::new(weight, None, &Counter::default()).expect("it packs");
            let x = numbers.vec(230 * inputs);
            let all = device.upload(230, inputs, &x).expect("room");
            let all = device.linear(&all, &weight).expect("room");
            for (start, rows) in [(0, 1), (229, 1), (5, 2), (9, 3), (17, 4), (3, 6), (100, 12), (190, 33)] {
                let part = device.upload(rows, inputs, &x[start * inputs..][..rows * inputs]).expect("room");
                let part = device.linear(&part, &weight).expect("room");
                let what = format!("{name}, {dtype:?}, rows {start}..{}", start + rows);
                assert_same_bits(&all.data()[start * outputs..][..rows * outputs], part.data(), &what);
            }
        }
    }
}

/// A task of many rows takes seconds in a large model: whoever watches sees it move.
#[test]
fn a_call_counts_its_parts_while_it_works() {
    for (rows, least) in [(1, 25), (190, 200)] {
        let device = device(InstructionSet::detect(), 1);
        let weight = HostMatrix { rows: 3200, cols: 500, data: HostElements::F32(vec![0.5; 3200 * 500]) };
        let weight = device.pack_linear(weight, None).expect("it packs");
        let x = device.upload(rows, 500, &vec![1.0; rows * 500]).expect("room");
        let before = device.progress().work_pieces();
        device.linear(&x, &weight).expect("room");
        let pieces = device.progress().work_pieces() - before;
        assert!(pieces >= least, "{pieces} pieces of {rows} rows");
    }
}

/// The products of bf16 pairs, with instructions that every processor has.
struct EmulatedPairs;

impl Dot for EmulatedPairs {
    type S = Portable;
    type Weight = u16;
    type Pair = f32;
    type Inputs = f32;
    type Weights = [f32; 16];

    fn pair(x0: f32, x1: f32) -> f32 {
        bf16_pair(x0, x1)
    }
    unsafe fn splat(x: *const f32) -> f32 {
        // SAFETY: as this function's.
        unsafe { *x }
    }
    unsafe fn load(p: *const u16) -> [f32; 16] {
        // SAFETY: as this function's.
        unsafe { Portable::load(p.cast()) }
    }
    fn accumulate(acc: [f32; 16], x: f32, w: [f32; 16]) -> [f32; 16] {
        let halves = |x: f32| {
            let bits = x.to_bits();
            [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)]
        };
        let x = halves(x);
        std::array::from_fn(|lane| {
            let w = halves(w[lane]);
            x[0].mul_add(w[0], x[1].mul_add(w[1], acc[lane]))
        })
    }
}

/// Runs the loop that AVX512-BF16 takes, in two ways of cutting it.
#[test]
fn pairs_of_bf16_take_the_same_loop() {
    let (outputs, inputs) = (40, 515);
    let mut numbers = Numbers::new(3);
    let (weight, values) = matrix(&mut numbers, outputs, inputs, DType::Bf16);
    let bias = numbers.vec(outputs);
    let weight = PackedLinear::new(weight, Some(bias.clone()), &Counter::default()).expect("it packs");
    let scratch = Scratch::new(1, &Counter::default()).expect("room");
    for rows in [1, 3, 9, 50] {
        let x = round(DType::Bf16, numbers.vec(rows * inputs));
        let run = |rows: Range<usize>, panels: Range<usize>, out: &mut [f32]| {
            // SAFETY: there is one thread.
            let scratch = unsafe { scratch.of_thread(0) };
            let out = SharedPtr::new(out);
            let pieces = &Counter::default();
            let task = LinearTask { x: &x, weight: &weight, out, rows, panels, scratch, pieces };
            task.run_with::<EmulatedPairs>();
        };
        let mut whole = vec![0.0; rows * outputs];
        run(0..rows, 0..3, &mut whole);
        assert_close(&expected(&x, &values, &bias, inputs), &whole, 1e-4, "pairs of bf16");
        let mut pieces = vec![0.0; rows * outputs];
        for row in 0..rows {
            run(row..row + 1, 0..1, &mut pieces);
            run(row..row + 1, 1..3, &mut pieces);
        }
        assert_same_bits(&whole, &pieces, "row by row");
    }
}

//! `gemv.cu`.

use anyhow::Result;
use half::bf16;

use super::{
    emulator::{Launch, Program, Source},
    numbers::{Numbers, ROUNDING, compare, same_bits, to_f64, unwritten},
};

const BLOCK: usize = 128;
const OUTPUTS_PER_BLOCK: usize = 4;
const MAX_ROWS: usize = 8;

/// Inputs and outputs: fewer vectors than threads, one more than a whole turn of all, and those of the 7B model.
const SHAPES: [(usize, usize); 8] =
    [(8, 1), (16, 16), (128, 5), (1024, 7), (1032, 4), (3584, 10), (18944, 5), (0, 6)];

/// Products, within the rounding of the result and of sums in f32; and a row's bits do not depend on how many rows there are.
pub fn check(program: &Program, seed: u64) -> Result<()> {
    for (num_inputs, num_outputs) in SHAPES {
        let mut numbers = Numbers::new(seed);
        let weight = numbers.bf16(num_outputs * num_inputs, 1.0);
        let bias = numbers.f32(num_outputs, 1.0);
        let x = numbers.bf16(MAX_ROWS * num_inputs, 1.0);
        for with_bias in [false, true] {
            let bias = with_bias.then_some(&bias[..]);
            let (expected, sizes) = products(&x, &weight, bias, num_inputs, num_outputs);
            let mut first: Option<Vec<bf16>> = None;
            for rows in (1..=MAX_ROWS).rev() {
                let what = format!("{rows} x {num_inputs} -> {num_outputs}, bias: {with_bias}");
                let mut outputs = Launch::new(
                    format!("gemv_{rows}"),
                    [num_outputs.div_ceil(OUTPUTS_PER_BLOCK), 1, 1],
                    BLOCK,
                    seed,
                )
                .input(&x[..rows * num_inputs])
                .input(&weight)
                .optional(bias)
                .u32(num_inputs)
                .u32(num_outputs)
                .output(&unwritten(rows * num_outputs))
                .run(program)?;
                let y: Vec<bf16> = outputs.take();
                let expected = &expected[..rows * num_outputs];
                compare(&what, &y, expected, |i| ROUNDING * expected[i].abs() + 2e-7 * sizes[i] + 1e-30)?;
                let first = first.get_or_insert_with(|| y.clone());
                same_bits(&what, &y, &first[..rows * num_outputs])?;
            }
        }
    }
    Ok(())
}

/// `x W^T + bias`, and for each the sum of what was added without signs.
fn products(
    x: &[bf16],
    weight: &[bf16],
    bias: Option<&[f32]>,
    num_inputs: usize,
    num_outputs: usize,
) -> (Vec<f64>, Vec<f64>) {
    let (x, weight) = (to_f64(x), to_f64(weight));
    let mut results = (Vec::new(), Vec::new());
    for row in 0..MAX_ROWS {
        let row = &x[row * num_inputs..][..num_inputs];
        for output in 0..num_outputs {
            let weight = &weight[output * num_inputs..][..num_inputs];
            let bias = bias.map_or(0.0, |bias| f64::from(bias[output]));
            let terms = row.iter().zip(weight).map(|(x, w)| x * w);
            results.0.push(terms.clone().sum::<f64>() + bias);
            results.1.push(terms.map(f64::abs).sum::<f64>() + bias.abs());
        }
    }
    results
}

#[test]
fn few_rows_are_multiplied() {
    check(Program::of(Source::Gemv), 1).unwrap();
}

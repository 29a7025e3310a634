//! `gemv.cu`.

use anyhow::Result;
use half::bf16;

use super::{
    emulator::{Launch, Program, Source},
    numbers::{Numbers, ROUNDING, compare, products, same_bits, unwritten},
};

const BLOCK: usize = 128;
const OUTPUTS_PER_BLOCK: usize = 4;
const MAX_ROWS: usize = 8;

/// Inputs and outputs: fewer vectors than threads, one more than a whole turn of all, and those of the 7B model.
const SHAPES: [(usize, usize); 8] =
    [(8, 1), (16, 16), (128, 5), (1024, 7), (1032, 4), (3584, 10), (18944, 5), (0, 6)];

/// Shapes up to so many inputs stand for the others where results are not rounded.
const FEW_INPUTS: usize = 1024;

/// A call with as many rows as there may be, of which a kernel takes the first.
struct Call<'a> {
    num_inputs: usize,
    num_outputs: usize,
    x: &'a [bf16],
    weight: &'a [bf16],
    bias: Option<&'a [f32]>,
}

impl Call<'_> {
    fn launch(&self, kernel: &str, rows: usize) -> Launch {
        let grid = [self.num_outputs.div_ceil(OUTPUTS_PER_BLOCK), 1, 1];
        Launch::new(format!("{kernel}_{rows}"), grid, BLOCK, rows as u64)
            .input(&self.x[..rows * self.num_inputs])
            .weights(self.weight)
            .optional(self.bias)
    }

    /// The rounded results.
    fn rounded(&self, program: &Program, rows: usize) -> Result<Vec<bf16>> {
        let launch = self.launch("gemv", rows).u32(self.num_inputs).u32(self.num_outputs);
        Ok(launch.output(&unwritten(rows * self.num_outputs)).run(program)?.take())
    }

    /// What the activation makes of them, of which the first half are gates: in one kernel, and in two.
    fn gated(&self, program: &Program, rows: usize) -> Result<[Vec<bf16>; 2]> {
        let (columns, len) = (self.num_outputs / 2, rows * self.num_outputs / 2);
        let fused = self.launch("gated_gemv", rows).u32(self.num_inputs).u32(columns);
        let fused = fused.output(&unwritten(len)).run(program)?.take();
        let activation = Launch::new("gated_silu", [1, 1, 1], 256, rows as u64)
            .input(&self.rounded(program, rows)?)
            .u32(rows)
            .u32(columns)
            .output(&unwritten(len));
        Ok([fused, activation.run(Program::of(Source::Rowwise))?.take()])
    }

    fn logits(&self, program: &Program, rows: usize) -> Result<Vec<f32>> {
        let launch = self.launch("gemv_f32", rows).u32(self.num_inputs).u32(self.num_outputs);
        Ok(launch.output(&vec![f32::NAN; rows * self.num_outputs]).run(program)?.take())
    }

    fn check(&self, program: &Program) -> Result<()> {
        let Self { num_inputs, num_outputs, x, weight, bias } = *self;
        let (expected, sizes) = products(x, weight, bias, [MAX_ROWS, num_inputs, num_outputs]);
        let tolerance = |i: usize| 2e-7 * (sizes[i] + 1.0);
        let mut first: Option<Vec<bf16>> = None;
        for rows in (1..=MAX_ROWS).rev() {
            let bias = bias.is_some();
            let what = format!("{rows} x {num_inputs} -> {num_outputs}, bias: {bias}");
            let expected = &expected[..rows * num_outputs];
            let y = self.rounded(program, rows)?;
            compare(&what, &y, expected, |i| ROUNDING * expected[i].abs() + tolerance(i))?;
            let first = first.get_or_insert_with(|| y.clone());
            same_bits(&what, &y, &first[..rows * num_outputs])?;
            if num_outputs.is_multiple_of(2) {
                let [fused, apart] = self.gated(program, rows)?;
                same_bits(&format!("{what}, gated"), &fused, &apart)?;
            }
            if bias && num_inputs <= FEW_INPUTS {
                let logits = self.logits(program, rows)?;
                compare(&format!("{what}, not rounded"), &logits, expected, tolerance)?;
                let rounded: Vec<bf16> = logits.into_iter().map(bf16::from_f32).collect();
                same_bits(&format!("{what}, rounded"), &y, &rounded)?;
            }
        }
        Ok(())
    }
}

/// Products, within the rounding of the result and of sums in f32. A row's bits do not depend on how many rows there are, nor on
/// whether the activation is a kernel of its own.
pub fn check(program: &Program, seed: u64) -> Result<()> {
    for (num_inputs, num_outputs) in SHAPES {
        let mut numbers = Numbers::new(seed);
        let weight = numbers.bf16(num_outputs * num_inputs, 1.0);
        let bias = numbers.f32(num_outputs, 1.0);
        let x = numbers.bf16(MAX_ROWS * num_inputs, 1.0);
        let call = Call { num_inputs, num_outputs, x: &x, weight: &weight, bias: None };
        call.check(program)?;
        Call { bias: Some(&bias), ..call }.check(program)?;
    }
    Ok(())
}

#[test]
fn few_rows_are_multiplied() {
    check(Program::of(Source::Gemv), 1).unwrap();
}

//! `gemm.cu`.

use anyhow::Result;
use half::bf16;

use super::{
    emulator::{Element, Launch, Program, Source},
    numbers::{Numbers, ROUNDING, compare, products, same_bits, unwritten},
};

const SHARED_BYTES: usize = 49152;

/// How a kernel cuts the product.
struct Tile {
    name: &'static str,
    rows: usize,
    outputs: usize,
    threads: usize,
}

const TILES: [Tile; 3] = [
    Tile { name: "gemm_16", rows: 16, outputs: 32, threads: 64 },
    Tile { name: "gemm_64", rows: 64, outputs: 64, threads: 128 },
    Tile { name: "gemm_128", rows: 128, outputs: 128, threads: 256 },
];

/// A call, and its numbers.
struct Call {
    rows: usize,
    inputs: usize,
    outputs: usize,
    x: Vec<bf16>,
    weight: Vec<bf16>,
    bias: Option<Vec<f32>>,
}

impl Call {
    fn new([rows, inputs, outputs]: [usize; 3], with_bias: bool, seed: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let (x, weight) = (numbers.bf16(rows * inputs, 1.0), numbers.bf16(outputs * inputs, 1.0));
        let bias = with_bias.then(|| numbers.f32(outputs, 1.0));
        Self { rows, inputs, outputs, x, weight, bias }
    }

    /// The first `rows` rows of the result.
    fn run<T: Element>(
        &self,
        program: &Program,
        tile: &Tile,
        suffix: &str,
        rows: usize,
        unwritten: &[T],
    ) -> Result<Vec<T>> {
        let grid = [rows.div_ceil(tile.rows), self.outputs.div_ceil(tile.outputs), 1];
        let mut outputs = Launch::new(format!("{}{suffix}", tile.name), grid, tile.threads, rows as u64)
            .dynamic_shared_bytes(SHARED_BYTES)
            .input(&self.x[..rows * self.inputs])
            .input(&self.weight)
            .optional(self.bias.as_deref())
            .u32(rows)
            .u32(self.inputs)
            .u32(self.outputs)
            .output(unwritten)
            .run(program)?;
        Ok(outputs.take())
    }

    fn rounded(&self, program: &Program, tile: &Tile, rows: usize) -> Result<Vec<bf16>> {
        self.run(program, tile, "", rows, &unwritten(rows * self.outputs))
    }

    fn logits(&self, program: &Program, tile: &Tile) -> Result<Vec<f32>> {
        self.run(program, tile, "_f32", self.rows, &vec![f32::NAN; self.rows * self.outputs])
    }

    /// With some tiles: within the rounding of the result and of sums in f32, with the same bits, rounded and not.
    fn check(&self, program: &Program, tiles: &[Tile]) -> Result<()> {
        let what =
            format!("{} x {} -> {}, bias: {}", self.rows, self.inputs, self.outputs, self.bias.is_some());
        let (expected, sizes) =
            products(&self.x, &self.weight, self.bias.as_deref(), [self.rows, self.inputs, self.outputs]);
        let tolerance = |i: usize| 2e-7 * sizes[i] + 1e-30;
        let mut first: Option<Vec<bf16>> = None;
        for tile in tiles {
            let what = format!("{}: {what}", tile.name);
            let y = self.rounded(program, tile, self.rows)?;
            compare(&what, &y, &expected, |i| ROUNDING * expected[i].abs() + tolerance(i))?;
            same_bits(&what, &y, first.get_or_insert_with(|| y.clone()))?;
            let logits = self.logits(program, tile)?;
            compare(&format!("{what}, not rounded"), &logits, &expected, tolerance)?;
            same_bits(&format!("{what}, rounded"), &y, &rounded(&logits))?;
        }
        Ok(())
    }
}

fn rounded(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// One to five tiles of inputs, of which the last are not whole, with outputs and rows that fill no tile.
pub fn check(program: &Program, seed: u64) -> Result<()> {
    Call::new([17, 568, 37], true, seed).check(program, &TILES[..2])?;
    Call::new([3, 152, 130], true, seed + 1).check(program, &TILES[2..])
}

#[test]
fn every_rest_of_rows_inputs_and_outputs_is_multiplied() {
    let program = Program::of(Source::Gemm);
    for (index, inputs) in [8, 16, 24, 64].into_iter().enumerate() {
        for (tiles, rows, outputs) in [
            (&TILES[..], 1, 1),
            (&TILES[..2], 3, 16),
            (&TILES[..2], 16, 130),
            (&TILES[..], 17, 100),
            (&TILES[2..], 130, 1),
            (&TILES[1..], 130, 130),
        ] {
            let call = Call::new([rows, inputs, outputs], (index + rows) % 2 == 0, inputs as u64);
            call.check(program, tiles).unwrap();
        }
    }
    Call::new([3, 0, 5], true, 1).check(program, &TILES).unwrap();
}

#[test]
fn products_have_the_inputs_of_the_models() {
    let program = Program::of(Source::Gemm);
    Call::new([17, 1176, 100], true, 1).check(program, &TILES[..2]).unwrap();
    Call::new([3, 3584, 16], false, 2).check(program, &TILES[..2]).unwrap();
    Call::new([1, 1176, 130], false, 4).check(program, &TILES[2..]).unwrap();
    Call::new([16, 3584, 33], true, 3).check(program, &TILES[..1]).unwrap();
}

#[test]
fn a_rows_bits_do_not_depend_on_the_rows_or_the_tile() {
    let program = Program::of(Source::Gemm);
    let call = Call::new([130, 200, 130], true, 4);
    let expected = call.rounded(program, &TILES[2], 130).unwrap();
    for tile in &TILES {
        for rows in [1, 16, 17, 129] {
            let got = call.rounded(program, tile, rows).unwrap();
            same_bits(&format!("{} of {rows} rows", tile.name), &got, &expected[..rows * 130]).unwrap();
        }
    }
}

//! `rowwise.cu`.

use anyhow::Result;
use half::bf16;

use super::{
    emulator::{Launch, Program, Source},
    numbers::{Numbers, ROUNDING, compare, norms, same_bits, to_f64, unwritten},
};

const BLOCK: usize = 256;

/// Columns that are and are not whole vectors, fewer and more than a block has threads.
const SHAPES: [(usize, usize); 8] =
    [(1, 8), (3, 1), (2, 37), (4, 2048), (1, 3584), (2, 2050), (1, 8192), (3, 15)];

/// Norms: the sum is rounded once, the norm is that of the rounded sum, and that of `norm_rows`.
pub fn check_norms(program: &Program, seed: u64) -> Result<()> {
    for (rows, cols) in SHAPES {
        let mut numbers = Numbers::new(seed);
        let (x, residual) = (numbers.bf16(rows * cols, 1.0), numbers.bf16(rows * cols, 1.0));
        let weight: Vec<f32> = numbers.f32(cols, 0.5).into_iter().map(|w| 1.0 + w).collect();
        for residual in [None, Some(&residual[..])] {
            let what = format!("norm of {rows} x {cols}, residual: {}", residual.is_some());
            let sums: Vec<bf16> = match residual {
                Some(residual) => {
                    x.iter().zip(residual).map(|(x, r)| bf16::from_f32(x.to_f32() + r.to_f32())).collect()
                }
                None => x.clone(),
            };
            let expected = norms(&to_f64(&sums), &weight);

            let mut outputs = Launch::new("residual_norm", [rows, 1, 1], BLOCK, seed)
                .input(&x)
                .optional(residual)
                .input(&weight)
                .f32(1e-6)
                .u32(cols)
                .output(&unwritten(rows * cols))
                .output(&unwritten(rows * cols))
                .run(program)?;
            let (normed, sum): (Vec<bf16>, Vec<bf16>) = (outputs.take(), outputs.take());
            compare(&what, &normed, &expected, |i| ROUNDING * expected[i].abs())?;
            same_bits(&what, &sum, &sums)?;

            let mut outputs = Launch::new("residual_norm", [rows, 1, 1], BLOCK, seed + 1)
                .output(&x)
                .optional(residual)
                .input(&weight)
                .f32(1e-6)
                .u32(cols)
                .output(&unwritten(rows * cols))
                .same_as(0)
                .run(program)?;
            same_bits(&format!("{what}, in place"), &outputs.take(), &sums)?;
            same_bits(&format!("{what}, in place"), &outputs.take(), &normed)?;

            let mut outputs = Launch::new("norm_rows", [rows, 1, 1], BLOCK, seed + 2)
                .input(&sum)
                .input(&weight)
                .f32(1e-6)
                .u32(cols)
                .output(&unwritten(rows * cols))
                .run(program)?;
            same_bits(&format!("{what}, again"), &outputs.take(), &normed)?;
        }
    }
    Ok(())
}

/// Activations, with blocks that take several turns.
pub fn check_activations(program: &Program, seed: u64) -> Result<()> {
    for (rows, cols) in SHAPES {
        let x = Numbers::new(seed).bf16(rows * 2 * cols, 12.0);
        let exact = to_f64(&x);
        let expected: Vec<f64> = exact
            .chunks(2 * cols)
            .flat_map(|row| {
                row[..cols].iter().zip(&row[cols..]).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            })
            .collect();
        let mut outputs = Launch::new("gated_silu", [3, 1, 1], BLOCK, seed)
            .input(&x)
            .u32(rows)
            .u32(cols)
            .output(&unwritten(rows * cols))
            .run(program)?;
        compare(&format!("silu of {rows} x {cols}"), &outputs.take::<bf16>(), &expected, |i| {
            ROUNDING * expected[i].abs() + 1e-30
        })?;

        let expected: Vec<f64> = exact.iter().map(|&x| 0.5 * x * erfc(-x / 2_f64.sqrt())).collect();
        let mut outputs = Launch::new("gelu", [2, 1, 1], BLOCK, seed).output(&x).u64(x.len()).run(program)?;
        compare(&format!("gelu of {rows} x {cols}"), &outputs.take::<bf16>(), &expected, |i| {
            ROUNDING * expected[i].abs() + 1e-30
        })?;
    }
    Ok(())
}

/// The complementary error function: by its series where that is short, else by its continued fraction.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    let root = std::f64::consts::PI.sqrt();
    if x < 2.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..60 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - 2.0 * sum / root;
    }
    let fraction = (1..100).rev().fold(x, |below, n| x + f64::from(n) / 2.0 / below);
    (-x * x).exp() / root / fraction
}

/// What copies rows.
pub fn check_copies(program: &Program, seed: u64) -> Result<()> {
    for cols in [6, 64, 3584] {
        let mut numbers = Numbers::new(seed);
        let table = numbers.bf16(40 * cols, 1.0);
        let x = numbers.bf16(4 * cols, 1.0);
        let row = |index: usize| &table[index * cols..][..cols];
        let zeros = &vec![bf16::ZERO; cols][..];
        let what = |kernel: &str| format!("{kernel} of {cols} columns");

        let ids = [139_u32, 99, 100, 140, 117];
        for (num_ids, table, expected) in [
            (40, Some(&table[..]), [row(39), zeros, row(0), zeros, row(17)].concat()),
            (0, None, vec![bf16::ZERO; 5 * cols]),
        ] {
            let mut outputs = Launch::new("embedding", [ids.len(), 1, 1], BLOCK, seed)
                .optional(table)
                .u32(100)
                .u32(num_ids)
                .input(&ids)
                .u32(cols)
                .output(&unwritten(5 * cols))
                .run(program)?;
            same_bits(&what("embedding"), &outputs.take(), &expected)?;
        }

        let untouched = [&x[cols..2 * cols], &x[3 * cols..]];
        for (features, first, second) in [(Some(&table[..]), row(5), row(39)), (None, zeros, zeros)] {
            let mut outputs = Launch::new("insert_features", [2, 1, 1], BLOCK, seed)
                .output(&x)
                .optional(features)
                .input(&[2_u32, 39, 0, 5])
                .u32(cols)
                .run(program)?;
            let expected = [first, untouched[0], second, untouched[1]].concat();
            same_bits(&what("insert_features"), &outputs.take(), &expected)?;
        }

        let mut outputs = Launch::new("gather_rows", [4, 1, 1], BLOCK, seed)
            .input(&table)
            .input(&[39_u32, 0, 39, 7])
            .u32(cols)
            .output(&unwritten(4 * cols))
            .run(program)?;
        same_bits(&what("gather_rows"), &outputs.take(), &[row(39), row(0), row(39), row(7)].concat())?;

        let slots = [39_u32, 0, 3, 7];
        let mut expected = table.clone();
        for (slot, row) in slots.iter().zip(x.chunks(cols)) {
            expected[*slot as usize * cols..][..cols].copy_from_slice(row);
        }
        let mut outputs = Launch::new("scatter_rows", [4, 1, 1], BLOCK, seed)
            .input(&x)
            .input(&slots)
            .u32(cols)
            .output(&table)
            .run(program)?;
        same_bits(&what("scatter_rows"), &outputs.take(), &expected)?;
    }
    Ok(())
}

#[test]
fn rows_are_summed_and_normed() {
    for seed in 0..2 {
        check_norms(Program::of(Source::Rowwise), seed).unwrap();
    }
}

#[test]
fn activations_are_gated() {
    check_activations(Program::of(Source::Rowwise), 1).unwrap();
}

#[test]
fn rows_are_embedded_inserted_gathered_and_scattered() {
    check_copies(Program::of(Source::Rowwise), 1).unwrap();
}

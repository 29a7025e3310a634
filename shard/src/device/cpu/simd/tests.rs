//! The three implementations against each other and against f64.

use super::super::instruction_set::{InstructionSet, Kernel};
use super::*;

/// Runs an operation on each 16 elements of its input.
struct Map<'a>(&'a [f32], Function);

#[derive(Clone, Copy)]
enum Function {
    Exp,
    Silu,
    Gelu,
    ReduceAdd,
    ReduceMax,
    KeepFive,
}

impl Kernel for Map<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self) -> Vec<f32> {
        let mut out = vec![0.0; self.0.len()];
        for (x, y) in self.0.chunks(LANES).zip(out.chunks_mut(LANES)) {
            let v = S::load_slice(x);
            let result = match self.1 {
                Function::Exp => exp::<S>(v),
                Function::Silu => silu::<S>(v),
                Function::Gelu => gelu::<S>(v),
                Function::ReduceAdd => S::splat(S::reduce_add(v)),
                Function::ReduceMax => S::splat(S::reduce_max(v)),
                Function::KeepFive => S::keep_first(v, 5, S::splat(-7.0)),
            };
            S::store_slice(y, result);
        }
        out
    }
}

fn inputs() -> Vec<f32> {
    let dense = (-20_000..20_000).map(|i| i as f32 * 0.005);
    dense.chain([0.0, -0.0, f32::INFINITY, f32::MIN, 1e-30, -1e-30, 3.0]).collect()
}

/// Largest error, in the unit that `scale` gives for an expected value.
fn largest_error(function: Function, exact: impl Fn(f64) -> f64, scale: impl Fn(f64) -> f64) -> f64 {
    let x: Vec<f32> = inputs().into_iter().filter(|x| x.abs() < 86.0).collect();
    let y = InstructionSet::Portable.run(Map(&x, function));
    let errors = x.iter().zip(&y).map(|(&x, &y)| {
        let expected = exact(f64::from(x));
        (f64::from(y) - expected).abs() / scale(expected)
    });
    errors.fold(0.0, f64::max)
}

/// The error function by its series, and its complement by a continued fraction.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    if x < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - sum * 2.0 / std::f64::consts::PI.sqrt();
    }
    let fraction = (1..200).rev().fold(x, |tail, n| x + f64::from(n) / 2.0 / tail);
    (-x * x).exp() / fraction / std::f64::consts::PI.sqrt()
}

#[test]
fn functions_have_the_precision_of_f32() {
    let exp_error = largest_error(Function::Exp, f64::exp, |y| y);
    assert!(exp_error < 2e-7, "exp is off by {exp_error:e} of its value");
    let silu_error = largest_error(Function::Silu, |x| x / (1.0 + (-x).exp()), |y| y.abs().max(1e-30));
    assert!(silu_error < 5e-7, "silu is off by {silu_error:e} of its value");
    let gelu_error = largest_error(
        Function::Gelu,
        |x| x * 0.5 * erfc(-x / std::f64::consts::SQRT_2),
        |y| y.abs().max(1.0),
    );
    assert!(gelu_error < 2e-7, "gelu is off by {gelu_error:e}");
}

#[test]
fn exp_is_exact_at_its_ends() {
    let x = [0.0, -0.0, f32::NEG_INFINITY, -88.0, f32::INFINITY];
    let y = InstructionSet::Portable.run(Map(&x, Function::Exp));
    assert_eq!(&y[..4], [1.0, 1.0, 0.0, 0.0]);
    assert!(y[4] > 1e38);
}

/// Turns a square.
struct Transpose<'a>(&'a [f32]);

impl Kernel for Transpose<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self) -> Vec<f32> {
        let columns = S::transpose(std::array::from_fn(|i| S::load_slice(&self.0[i * LANES..])));
        let mut out = vec![0.0; LANES * LANES];
        for (to, column) in out.chunks_mut(LANES).zip(columns) {
            S::store_slice(to, column);
        }
        out
    }
}

#[test]
fn a_square_is_turned() {
    let x: Vec<f32> = (0..LANES * LANES).map(|i| i as f32).collect();
    for set in InstructionSet::available() {
        let y = set.run(Transpose(&x));
        for (i, y) in y.iter().enumerate() {
            assert_eq!(*y, x[i % LANES * LANES + i / LANES], "element {i} with {set}");
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let x = inputs();
    for set in InstructionSet::available() {
        for function in [
            Function::Exp,
            Function::Silu,
            Function::Gelu,
            Function::ReduceAdd,
            Function::ReduceMax,
            Function::KeepFive,
        ] {
            let expected = InstructionSet::Portable.run(Map(&x, function));
            let got = set.run(Map(&x, function));
            let same = expected
                .iter()
                .zip(&got)
                .all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()));
            assert!(same, "function {} differs with {set}", function as u8);
        }
    }
}

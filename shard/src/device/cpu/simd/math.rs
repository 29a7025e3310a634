//! Functions of a vector, to about the precision of f32.
//!
//! The polynomials interpolate at Chebyshev nodes and their coefficients were rounded to f32 last; the errors given are
//! measured with the rounded coefficients.

use super::Simd;

/// Adding and subtracting this rounds to an integer, which the low bits of the sum then hold.
const MAGIC: f32 = 12_582_912.0;

/// `exp(x)`: exactly 1 at 0, 0 below -87, finite above 88.
///
/// With `n` the nearest integer of `x / ln 2` and `r = x - n ln 2` in two steps, it is `2^n exp(r)`, and
/// `exp(r) = 1 + r + r^2 q(r)`, with an error of 1.1e-8 of its value before rounding.
#[inline(always)]
pub fn exp<S: Simd>(x: S::V) -> S::V {
    const Q: [f32; 5] = [0.5, 0.166_665_76, 0.041_666_556, 0.008_363_203, 0.001_392_621_3];
    let lowest = S::splat(-87.0);
    // In this order of arguments, what is not a number stays so.
    let clamped = S::min(S::splat(88.0), S::max(lowest, x));
    let magic = S::fma(clamped, S::splat(std::f32::consts::LOG2_E), S::splat(MAGIC));
    let n = S::sub(magic, S::splat(MAGIC));
    // The first 9 bits of ln 2, so that its product with n is exact, and the rest.
    let r = S::fma(n, S::splat(-0.693_359_4), clamped);
    let r = S::fma(n, S::splat(2.121_944_4e-4), r);
    let mut q = S::splat(Q[4]);
    for coefficient in [Q[3], Q[2], Q[1], Q[0]] {
        q = S::fma(q, r, S::splat(coefficient));
    }
    let e = S::add(S::fma(q, S::mul(r, r), r), S::splat(1.0));
    S::select_less(x, lowest, S::splat(0.0), S::add_exponent(e, magic))
}

/// `x / (1 + exp(-x))`.
#[inline(always)]
pub fn silu<S: Simd>(x: S::V) -> S::V {
    S::div(x, S::add(S::splat(1.0), exp::<S>(S::sub(S::splat(0.0), x))))
}

/// `x (1 + erf(x / sqrt 2)) / 2`.
///
/// With `z = |x| / sqrt 2` and `t = 1 / (1 + 0.4 z)`, `erfc(z) = t exp(-z^2) p(t)`, with an error of 5.1e-8 of its value
/// before rounding; so the tail on the left keeps its digits too.
#[inline(always)]
pub fn gelu<S: Simd>(x: S::V) -> S::V {
    const P: [f32; 9] = [
        0.225_461_13,
        0.229_118_7,
        0.184_361_35,
        0.256_977,
        -0.060_124_4,
        0.279_310_97,
        -0.075_205_155,
        -0.066_549_405,
        0.026_649_82,
    ];
    let (zero, one) = (S::splat(0.0), S::splat(1.0));
    let z = S::mul(S::max(x, S::sub(zero, x)), S::splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = S::div(one, S::fma(z, S::splat(0.4), one));
    let mut p = S::splat(P[8]);
    for i in (0..8).rev() {
        p = S::fma(p, t, S::splat(P[i]));
    }
    let gauss = exp::<S>(S::mul(S::mul(x, x), S::splat(-0.5)));
    let tail = S::mul(S::splat(0.5), S::mul(S::mul(t, p), gauss));
    S::mul(x, S::select_less(x, zero, tail, S::sub(one, tail)))
}

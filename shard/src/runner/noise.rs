//! Gumbel noise keyed by seed, branch, position and token.

/// No noise is larger: the uniform number below has 53 bits and is at most `1 - 2^-54`.
pub const MAX_GUMBEL: f32 = 37.5;

/// The noise of a token under a key: `-ln(-ln u)` of a uniform number `u` in (0, 1).
///
/// Adding it to logits and taking the largest draws a token by their softmax.
pub fn gumbel(noise_key: u64, token_id: u32) -> f32 {
    let bits = mix(noise_key ^ mix(u64::from(token_id).wrapping_add(0x9e37_79b9_7f4a_7c15)));
    let u = ((bits >> 12) as f64 + 0.5) / (1_u64 << 52) as f64;
    (-(-u.ln()).ln()) as f32
}

/// The finalizer of SplitMix64, which turns every bit into all bits.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

//! The CUDA kernels' own sources, run on the CPU under the emulation in `tests/emulation` with AddressSanitizer, against
//! plain oracles in f64; and faults planted in these sources, each of which a comparison must find.
//!
//! The oracles are not the CPU device, which keeps activations in f32: they take the numbers that the kernels get, as rounded to
//! bf16, and allow for the roundings that the kernels document. Sampling alone is compared with the CPU device: both start from
//! logits in f32, and the draws are to be the same. What is not shown here: anything about speed, and how a GPU's own
//! instructions round (its approximations of powers and the order in which a tensor core adds).
//!
//! That is what the second way is for: with `LOCKSTEP_TEST_GPU=N` the same launches go to GPU N, compiled as in production, with the same
//! oracles and tolerances. Probes of the emulation and planted faults are left out there.

mod attention;
mod attention_sm90;
mod emulator;
mod faults;
mod gemm;
mod gemv;
mod gpu;
mod hash;
#[path = "../emulation/libraries.rs"]
#[allow(dead_code)]
mod libraries;
mod numbers;
mod patches;
mod probes;
mod reduce;
mod rotary;
mod rowwise;
mod sampling;

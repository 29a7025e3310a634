//! The CUDA kernels' own sources, run on the CPU under the emulation in `tests/emulation` with AddressSanitizer, against
//! plain oracles in f64; and faults planted in these sources, each of which a comparison must find.
//!
//! The oracles are not the CPU device, which keeps activations in f32: they take the numbers that the kernels get, as rounded to
//! bf16, and allow for the roundings that the kernels document. What is not shown here: anything about speed, and how a GPU's
//! own instructions round (its approximations of powers and the order in which a tensor core adds).

mod attention;
mod emulator;
mod faults;
mod gemv;
mod numbers;
mod patches;
mod probes;
mod rotary;
mod rowwise;

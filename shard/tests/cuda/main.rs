//! A rank on a GPU: the production code, through cudarc, on stand-ins for CUDA's libraries that run the kernels' own sources on the
//! CPU; with `LOCKSTEP_TEST_GPU=N` on the real libraries and GPU N.

#[path = "../suite/common.rs"]
#[allow(dead_code)]
mod common;
#[path = "../emulation/libraries.rs"]
#[allow(dead_code)]
mod libraries;

mod ahead;
mod ahead_together;
mod answers;
mod attention;
mod goldens;
mod gpu;
mod groups;
mod memory;
mod peers;
mod processes;
mod repeatable;
mod requests;
mod shared;

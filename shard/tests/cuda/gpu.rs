//! Which GPUs tests run on: those of the stand-ins, or a real one.

use std::{env, path::PathBuf};

use lockstep_shard::{
    device::cuda::{cubin_cache, libraries as cuda},
    service::gpu::Sums,
};

use super::libraries;

/// The real GPU that tests are to run on; `None`: stand-ins. These are loaded then.
pub fn real() -> Option<usize> {
    match env::var("LOCKSTEP_TEST_GPU") {
        Ok(value) => Some(value.parse().unwrap_or_else(|error| panic!("LOCKSTEP_TEST_GPU={value}: {error}"))),
        Err(_) => {
            libraries::load();
            None
        }
    }
}

/// Why tests are left out of whose ranks some are made to fail.
pub const EACH_HAS_ONE: &str = "ranks are processes, each with a GPU, and some are made to fail";

/// Whether a test is left out on a real GPU; it then says why.
pub fn is_left_out(why: &str) -> bool {
    let is_real = real().is_some();
    if is_real {
        println!("left out on a GPU: {why}");
    }
    is_real
}

/// Where compiled kernels are kept: for a real GPU each load would compile them anew, for seconds.
pub fn kernel_cache() -> Option<PathBuf> {
    real().and_then(|_| cubin_cache::default_folder())
}

/// The GPU of each rank. Ranks whose sums do not go through NCCL, which refuses it, share one.
pub fn of_ranks(world_size: usize, sums: Sums) -> Vec<usize> {
    let first = real().unwrap_or(0);
    match sums {
        Sums::Nccl | Sums::Peers => (first..first + world_size).collect(),
        _ => vec![first; world_size],
    }
}

/// Whether there are as many GPUs as a group takes.
pub fn has(world_size: usize, sums: Sums) -> bool {
    let Some(first) = real().filter(|_| sums != Sums::Host) else { return true };
    cuda::driver().unwrap();
    let (_, count) = cuda::gpu(first).unwrap();
    first + world_size <= count
}

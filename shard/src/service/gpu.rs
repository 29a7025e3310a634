//! The GPU of a rank: which it is, what of its memory the rank may take, and whom it sums with.

use std::{collections::HashSet, path::PathBuf, rc::Rc};

use super::{options::LoadOptions, worker::LoadError};
use crate::{
    device::{
        DType,
        cuda::{
            Gpu,
            compile::Arch,
            libraries::{self, Libraries, LibraryError, Wanted},
            modules,
        },
    },
    process,
    runner::{MemoryPlan, plan::PlanError},
};

pub use crate::device::cuda::Sums;

/// A GPU that is open.
pub struct Host {
    /// The GPU.
    pub gpu: Rc<Gpu>,
    /// What kernels are compiled for.
    pub arch: Arch,
    /// Whether cuBLASLt is installed.
    pub has_cublas_lt: bool,
    /// Whether NCCL is there, and this rank's group could use it.
    pub has_nccl: bool,
}

/// What a request to load says of the GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuOptions {
    /// The GPU of each rank, counted as the driver counts those that the process may see.
    pub ordinals: Vec<usize>,
    /// Part of a GPU's memory that the ranks on it may take.
    pub memory: f64,
    /// What sums over ranks may go through.
    pub sums: Sums,
    /// Whether a token's bits must not depend on what is computed beside it.
    pub is_repeatable: bool,
    /// Whether steps that only decode are kept as graphs and launched again.
    pub use_graphs: bool,
    /// Folder for compiled kernels; without one they are compiled at each start.
    pub kernel_cache: Option<PathBuf>,
}

/// Looks for the libraries and the GPU that are asked for, opens it, and has this thread and the threads that it starts run on
/// processors near it.
///
/// # Errors
/// What is missing, and what can be done about it.
pub fn find(options: &LoadOptions) -> Result<Host, LoadError> {
    if options.dtype == DType::F32 {
        return Err(LoadError::Unsupported("dtype: GPUs compute in bf16; f32 is for the CPU".into()));
    }
    let world_size = if options.gpu.sums == Sums::Nccl { options.world_size } else { 1 };
    let ordinal = options.gpu.ordinals[options.rank];
    let libraries = Libraries::find(Wanted { ordinal, world_size }).map_err(unsupported)?;
    tracing::info!("{libraries}");
    let has_nccl = libraries.nccl.is_some() || finds_nccl(options);
    let gpu = Gpu::open(ordinal as i32)?;
    if options.cpus.is_empty() {
        let place = gpu.pci_bus_id()?;
        match process::run_near(&place) {
            Ok(cpus) => tracing::info!(place, cpus, "runs on the processors of its GPU"),
            Err(error) => tracing::warn!(place, %error, "does not know which processors are near its GPU"),
        }
    } else {
        process::run_on(&options.cpus).map_err(|error| LoadError::Unsupported(format!("cpus: {error}")))?;
    }
    let has_cublas_lt = libraries.cublas_lt.is_some();
    Ok(Host { gpu, arch: libraries.gpu.arch, has_cublas_lt, has_nccl })
}

/// Whether NCCL is there where it would help and is not needed: with GPUs that read one another's memory, for large sums.
fn finds_nccl(options: &LoadOptions) -> bool {
    let LoadOptions { world_size, gpu: GpuOptions { ordinals, sums, is_repeatable, .. }, .. } = options;
    if *sums != Sums::Peers || *world_size == 1 || *is_repeatable || !are_distinct(ordinals) {
        return false;
    }
    match libraries::nccl(*world_size) {
        Ok(version) => {
            tracing::info!(%version, "NCCL is there for large sums over GPUs");
            true
        }
        Err(error) => {
            tracing::warn!(%error, "large sums over GPUs do without NCCL, and take longer");
            false
        }
    }
}

fn unsupported(error: LibraryError) -> LoadError {
    LoadError::Unsupported(error.to_string())
}

impl Host {
    /// The kernels, compiled for the GPU.
    ///
    /// # Errors
    /// They do not compile.
    pub fn cubins(&self, options: &LoadOptions) -> Result<Vec<(String, Vec<u8>)>, LoadError> {
        let modules = modules::modules(self.arch, options.gpu.kernel_cache.as_deref())
            .map_err(|error| LoadError::Unsupported(error.to_string()))?;
        Ok(modules.into_iter().map(|module| (module.name.to_owned(), module.cubin)).collect())
    }
}

/// The memory that a rank may take of its GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Room {
    available_bytes: u64,
    free_bytes: u64,
    total_bytes: u64,
    share: f64,
}

impl Room {
    /// What a rank may take of its GPU.
    ///
    /// # Errors
    /// The driver does not tell.
    pub fn of(host: &Host, options: &LoadOptions) -> Result<Self, LoadError> {
        let (free_bytes, total_bytes) = host.gpu.memory_bytes()?;
        Ok(Self::new(free_bytes, total_bytes, options))
    }

    /// This rank's part of the share of all that was allowed, as far as it is free. Ranks that load at the same time divide what is
    /// free; where others stay, these have theirs already.
    fn new(free_bytes: u64, total_bytes: u64, options: &LoadOptions) -> Self {
        let GpuOptions { ordinals, memory, .. } = &options.gpu;
        let mine = ordinals[options.rank];
        let sharing = ordinals.iter().filter(|ordinal| **ordinal == mine).count() as u64;
        let loading = if options.loading_ranks == options.world_size { sharing } else { 1 };
        let allowed = (total_bytes as f64 * memory) as u64;
        let available_bytes = (allowed / sharing).min(free_bytes / loading);
        Self { available_bytes, free_bytes, total_bytes, share: *memory }
    }

    /// Blocks of keys and values that there is room for beside the rest of a plan for one of them.
    ///
    /// # Errors
    /// There is no room for the rest.
    pub fn kv_blocks(&self, plan: &MemoryPlan) -> Result<usize, PlanError> {
        self.check_fits(plan)?;
        // A rank without heads keeps nothing, and leaves it to the others how many there are.
        let most = u64::from(u32::MAX) / crate::device::KV_BLOCK_TOKENS as u64;
        let left = self.available_bytes - (plan.gpu_bytes() - plan.kv_bytes);
        Ok(left.checked_div(plan.kv_bytes).unwrap_or(most).min(most) as usize)
    }

    /// Checks that a plan fits.
    ///
    /// # Errors
    /// It does not.
    pub fn check_fits(&self, plan: &MemoryPlan) -> Result<(), PlanError> {
        let Self { available_bytes, free_bytes, total_bytes, share } = *self;
        let needed_bytes = plan.gpu_bytes();
        if needed_bytes <= available_bytes {
            return Ok(());
        }
        let plan = plan.clone();
        Err(PlanError::DoesNotFitGpu { needed_bytes, plan, available_bytes, share, total_bytes, free_bytes })
    }
}

/// Whether each rank has a GPU of its own.
pub fn are_distinct(ordinals: &[usize]) -> bool {
    let mut seen = HashSet::new();
    ordinals.iter().all(|ordinal| seen.insert(ordinal))
}

#[cfg(test)]
mod tests {
    use lockstep_proto::shard as pb;

    use super::*;
    use crate::service::options::tests::request;

    #[test]
    fn ranks_on_a_gpu_divide_it_also_when_one_of_them_comes_back() {
        let gpu =
            pb::GpuRequest { ordinals: vec![3, 3], memory: 0.75, sums: "host".into(), ..Default::default() };
        let request = |loading_ranks| pb::LoadRequest {
            device: "cuda".into(),
            world_size: 2,
            collective_path: "/somewhere".into(),
            loading_ranks,
            gpu: Some(gpu.clone()),
            ..request()
        };
        let available = |free_bytes, loading_ranks| {
            let options = LoadOptions::new(request(loading_ranks)).expect("valid options");
            Room::new(free_bytes, 1000, &options).available_bytes
        };
        assert_eq!(available(1000, 2), 375);
        // Somebody else has most of it.
        assert_eq!(available(600, 2), 300);
        // The other rank stays and has its half, and what is free is all this one's.
        assert_eq!(available(1000 - 375, 1), 375);
        assert_eq!(available(200, 1), 200);
    }

    #[test]
    fn the_cache_takes_what_is_left() {
        let room = Room { available_bytes: 1000, free_bytes: 1100, total_bytes: 1200, share: 0.9 };
        let plan = MemoryPlan {
            weights_bytes: 500,
            kv_bytes: 30,
            workspace_bytes: 100,
            process_bytes: 5000,
            on_gpu: true,
            ..MemoryPlan::default()
        };
        assert_eq!(room.kv_blocks(&plan).expect("room"), 13);
        let most = room.kv_blocks(&MemoryPlan { kv_bytes: 0, ..plan.clone() }).expect("room");
        assert_eq!(most, (1 << 27) - 1);
        let large = MemoryPlan { weights_bytes: 900, ..plan };
        let error = room.kv_blocks(&large).unwrap_err().to_string();
        for part in
            ["needs 1030 bytes of its GPU (weights 900,", "may have 1000", "0.9 of 1200", "1100 are free"]
        {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}

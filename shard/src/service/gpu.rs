//! The GPU of a rank: which it is, what of its memory the rank may take, and whom it sums with.

use std::{
    collections::HashSet,
    path::PathBuf,
    rc::Rc,
    thread,
    time::{Duration, Instant},
};

use super::{options::LoadOptions, worker::LoadError};
use crate::{
    device::{
        DType, DeviceError,
        cuda::{
            Gpu, PAGE_BYTES,
            compile::Arch,
            libraries::{self, Libraries, LibraryError, Wanted},
            modules,
        },
    },
    process,
    progress::Progress,
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
    /// Whether kernels may begin before the one before them has ended.
    pub overlap_kernels: bool,
    /// Folder for compiled kernels; without one they are compiled at each start.
    pub kernel_cache: Option<PathBuf>,
    /// Ranks on this rank's GPU that load at the same time, this one among them.
    pub loading_ranks: usize,
    /// Whether the group was loaded before, so that it is settled how many blocks of keys and values its ranks have.
    pub is_settled: bool,
}

impl GpuOptions {
    /// Of a rank that has no GPU.
    pub fn none() -> Self {
        Self {
            ordinals: vec![],
            memory: 1.0,
            sums: Sums::Host,
            is_repeatable: false,
            use_graphs: true,
            overlap_kernels: true,
            kernel_cache: None,
            loading_ranks: 1,
            is_settled: false,
        }
    }
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
    /// The kernels, compiled for the GPU. Each file that is compiled counts as progress.
    ///
    /// # Errors
    /// They do not compile.
    pub fn cubins(
        &self,
        options: &LoadOptions,
        progress: &Progress,
    ) -> Result<Vec<(String, Vec<u8>)>, LoadError> {
        let compiled = || progress.pieces_of(0).count();
        let modules = modules::modules(self.arch, options.gpu.kernel_cache.as_deref(), &compiled)
            .map_err(|error| LoadError::Unsupported(error.to_string()))?;
        Ok(modules.into_iter().map(|module| (module.name.to_owned(), module.cubin)).collect())
    }
}

/// Part of a GPU's memory that no rank plans to take: the driver, its libraries and whoever else is on the GPU need some. Of
/// `--gpu-memory` the ranks may leave more, but where others have much of a GPU, its share alone would leave nothing.
const KEPT_SHARE: f64 = 0.1;

/// How long a rank that is loaded again waits for the memory that the one before it had. A driver may take a moment longer than the
/// process that is gone.
pub const ROOM_TIMEOUT: Duration = Duration::from_secs(20);
/// Between two looks.
const ROOM_INTERVAL: Duration = Duration::from_millis(100);

/// The memory that a rank may take of its GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Room {
    available_bytes: u64,
    free_bytes: u64,
    kept_bytes: u64,
    total_bytes: u64,
    share: f64,
    sharing: u64,
    loading: u64,
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
        let GpuOptions { ordinals, memory, loading_ranks, is_settled, .. } = &options.gpu;
        let mine = ordinals[options.rank];
        let sharing = ordinals.iter().filter(|ordinal| **ordinal == mine).count() as u64;
        let loading = *loading_ranks as u64;
        let part = |share: f64| (total_bytes as f64 * share) as u64;
        // What a rank had before, it takes again: of what was kept, libraries have taken some by now.
        let kept_bytes = if *is_settled { 0 } else { part(KEPT_SHARE.min(1.0 - memory)) };
        let available_bytes = (part(*memory) / sharing).min(free_bytes.saturating_sub(kept_bytes) / loading);
        Self { available_bytes, free_bytes, kept_bytes, total_bytes, share: *memory, sharing, loading }
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
        // In whole pages.
        let left = left - left % PAGE_BYTES as u64;
        Ok(left.checked_div(plan.kv_block_bytes).unwrap_or(most).min(most) as usize)
    }

    /// Checks that a plan fits.
    ///
    /// # Errors
    /// It does not.
    pub fn check_fits(&self, plan: &MemoryPlan) -> Result<(), PlanError> {
        let Self { available_bytes, free_bytes, kept_bytes, total_bytes, share, sharing, loading } = *self;
        let needed_bytes = plan.gpu_bytes();
        if needed_bytes <= available_bytes {
            return Ok(());
        }
        Err(PlanError::DoesNotFitGpu {
            needed_bytes,
            plan: Box::new(plan.clone()),
            available_bytes,
            share,
            total_bytes,
            sharing,
            free_bytes,
            kept_bytes,
            loading,
        })
    }
}

/// Waits until there is room for what a rank had before, for a while. `goes_on` says whether it is still to load.
///
/// # Errors
/// There is none, or the rank is to do something else.
pub fn wait_for_room(
    look: impl Fn() -> Result<Room, LoadError>,
    plan: &MemoryPlan,
    timeout: Duration,
    goes_on: impl Fn() -> bool,
) -> Result<(), LoadError> {
    let (began, mut is_told) = (Instant::now(), false);
    while let Err(error) = look()?.check_fits(plan) {
        if began.elapsed() >= timeout {
            return Err(error.into());
        }
        if !goes_on() {
            return Err(DeviceError::GroupLost.into());
        }
        if !std::mem::replace(&mut is_told, true) {
            tracing::warn!(%error, "waits for memory of its GPU");
        }
        thread::sleep(ROOM_INTERVAL);
    }
    Ok(())
}

/// Whether each rank has a GPU of its own.
pub fn are_distinct(ordinals: &[usize]) -> bool {
    let mut seen = HashSet::new();
    ordinals.iter().all(|ordinal| seen.insert(ordinal))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use lockstep_proto::shard as pb;

    use super::*;
    use crate::service::options::tests::request;

    /// Of two ranks on a GPU of 1000 bytes.
    fn room(free_bytes: u64, memory: f64, loading_ranks: u32, is_settled: bool) -> Room {
        let gpu = pb::GpuRequest {
            ordinals: vec![3, 3],
            memory,
            sums: "host".into(),
            loading_ranks,
            is_settled,
            ..Default::default()
        };
        let request = pb::LoadRequest {
            device: "cuda".into(),
            world_size: 2,
            collective_path: "/somewhere".into(),
            loading_ranks,
            gpu: Some(gpu),
            ..request()
        };
        Room::new(free_bytes, 1000, &LoadOptions::new(request).expect("valid options"))
    }

    #[test]
    fn ranks_on_a_gpu_divide_it_and_leave_some() {
        let available = |free_bytes, memory| room(free_bytes, memory, 2, false).available_bytes;
        assert_eq!(available(1000, 0.75), 375);
        // Somebody else has some of it: a tenth is left.
        assert_eq!(available(600, 0.75), 250);
        assert_eq!(available(600, 0.9), 250);
        assert_eq!(available(80, 0.9), 0);
        // A small share is not what is left of others' part.
        assert_eq!(available(500, 0.25), 125);
        // All of it was asked for.
        assert_eq!(available(600, 1.0), 300);
    }

    #[test]
    fn a_rank_that_comes_back_takes_what_it_had() {
        let available = |free_bytes, loading| room(free_bytes, 0.75, loading, true).available_bytes;
        // The other rank stays and has its half, and what is free is all this one's, but no more than it had.
        assert_eq!(available(1000 - 375, 1), 375);
        assert_eq!(available(370, 1), 370);
        // Both come back.
        assert_eq!(available(1000, 2), 375);
        assert_eq!(available(700, 2), 350);
    }

    #[test]
    fn a_rank_that_comes_back_waits_for_memory() {
        let plan = MemoryPlan { weights_bytes: 375, on_gpu: true, ..MemoryPlan::default() };
        let looks = Cell::new(0);
        let free_at = |look: u64, most: u64| {
            looks.set(look + 1);
            Ok(room((200 + look * 100).min(most), 0.75, 1, true))
        };
        let wait = |most, timeout, goes_on: bool| {
            looks.set(0);
            wait_for_room(|| free_at(looks.get(), most), &plan, timeout, || goes_on)
        };
        wait(1000, Duration::from_secs(60), true).expect("room at last");
        assert_eq!(looks.get(), 3);
        let lost = wait(300, Duration::from_secs(60), false).unwrap_err();
        assert!(matches!(lost, LoadError::Device(DeviceError::GroupLost)), "{lost}");
        let error = wait(300, Duration::ZERO, true).unwrap_err().to_string();
        for part in ["needs 375 bytes of its GPU", "may have 200", "200 are free, of which 0 are left"] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }

    #[test]
    fn the_cache_takes_what_is_left_in_whole_pages() {
        let page = PAGE_BYTES as u64;
        let free_bytes = 110 * page;
        let room = Room {
            available_bytes: 100 * page + page / 2,
            free_bytes,
            kept_bytes: 12 * page,
            total_bytes: 120 * page,
            share: 0.9,
            sharing: 1,
            loading: 1,
        };
        let plan = MemoryPlan {
            weights_bytes: 50 * page,
            kv_bytes: page,
            kv_block_bytes: page / 3,
            workspace_bytes: 10 * page,
            process_bytes: 5000 * page,
            on_gpu: true,
            ..MemoryPlan::default()
        };
        // 40 pages.
        let blocks = room.kv_blocks(&plan).expect("room");
        assert_eq!(blocks, 120);
        let mut filled = plan.clone();
        filled.set_kv_blocks(blocks);
        assert_eq!(filled.gpu_bytes(), 100 * page);
        room.check_fits(&filled).expect("it fits");
        filled.set_kv_blocks(blocks + 1);
        room.check_fits(&filled).expect_err("one more does not");
        let without_heads = MemoryPlan { kv_bytes: 0, kv_block_bytes: 0, ..plan.clone() };
        assert_eq!(room.kv_blocks(&without_heads).expect("room"), (1 << 27) - 1);
        let error = room.kv_blocks(&MemoryPlan { weights_bytes: 90 * page, ..plan }).unwrap_err().to_string();
        for part in [
            format!("needs {} bytes of its GPU (weights {},", 101 * page, 90 * page),
            format!("may have {}: --gpu-memory 0.9 of {} bytes", 100 * page + page / 2, 120 * page),
            format!("{free_bytes} are free, of which {} are left", 12 * page),
        ] {
            assert!(error.contains(&part), "{part} in {error}");
        }
    }
}

//! What a group is started with, and how ranks share the processors.

use std::{ffi::OsString, path::PathBuf, thread, time::Duration};

use lockstep_proto::shard as pb;
use lockstep_shard::service::ListenAddress;
use rustix::thread::{CpuSet, sched_getaffinity};

use super::meeting::Meeting;

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceKind {
    /// Threads of this host.
    Cpu,
    /// GPUs of NVIDIA, one for each rank.
    Cuda,
}

impl DeviceKind {
    /// Its name in the protocol and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// The type of weights and of the cache of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DType {
    /// 16 bits, as in most checkpoints.
    Bf16,
    /// 32 bits.
    F32,
}

impl DType {
    /// Its name in the protocol and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }
}

/// Which processes are the shards.
#[derive(Clone, Debug)]
pub enum ShardSource {
    /// Children of this one.
    Children {
        /// Program and first arguments of a shard, before `shard --listen ADDRESS --parent PID`. None: this program.
        command: Option<Vec<OsString>>,
    },
    /// Processes that somebody else starts, and starts again: where each listens, by rank.
    Elsewhere(Vec<ListenAddress>),
}

/// How pixels get to the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// All ranks are on this host: the server writes a file, once, and each rank reads what it needs of it.
    Files,
    /// In chunks, into memory that each rank reserves for those that wait.
    Chunks {
        /// Bytes of it.
        waiting_bytes: u64,
    },
}

/// What a group is started with.
#[derive(Clone, Debug)]
pub struct GroupConfig {
    /// Build of this server; shards of another one refuse.
    pub build_id: String,
    /// Which processes are the shards.
    pub source: ShardSource,
    /// Folder of the checkpoint.
    pub model_dir: PathBuf,
    /// Number of ranks, from 1.
    pub world_size: u32,
    /// How long a rank may be silent: it does not answer, or nothing moves anywhere while there is work.
    pub silence: Duration,
    /// What computes.
    pub device: DeviceKind,
    /// Of weights and of the cache of keys and values.
    pub dtype: DType,
    /// Threads of each rank. None: as many as it has processors.
    pub threads: Option<u32>,
    /// The most tokens of one sequence.
    pub max_context_tokens: u32,
    /// The most tokens that one step computes.
    pub max_step_tokens: u32,
    /// The most patches of one temporal patch of a medium.
    pub max_frame_patches: u32,
    /// How pixels get to the ranks.
    pub placement: Placement,
    /// The most sequences in one step.
    pub max_step_sequences: u32,
    /// Tokens that the cache of keys and values is to hold.
    pub kv_capacity_tokens: u64,
    /// Tokens that the cache of vision features is to hold.
    pub feature_capacity_tokens: u64,
    /// Mean of red, green and blue that pictures are normalized by, of values in 0..1.
    pub image_mean: [f32; 3],
    /// Their standard deviation.
    pub image_std: [f32; 3],
    /// The GPUs; of the CPU, none.
    pub gpu: Option<GpuConfig>,
}

/// Which GPUs the ranks have.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuConfig {
    /// The GPU of each rank, as the driver counts them.
    pub ordinals: Vec<u32>,
    /// Part of a GPU's memory that the ranks on it may take.
    pub memory: f64,
    /// What sums over ranks go through.
    pub sums: Sums,
    /// Whether a token's bits must not depend on what is computed beside it.
    pub repeatable: bool,
    /// Steps that only decode are not kept as graphs.
    pub no_graphs: bool,
    /// Folder for compiled kernels, as the protocol has it.
    pub kernel_cache: String,
}

impl GpuConfig {
    fn request(&self, rank: u32, loading: &[u32], is_settled: bool) -> pb::GpuRequest {
        let of = |rank: u32| self.ordinals[rank as usize];
        pb::GpuRequest {
            ordinals: self.ordinals.clone(),
            memory: self.memory,
            sums: self.sums.as_str().into(),
            repeatable: self.repeatable,
            no_graphs: self.no_graphs,
            kernel_cache: self.kernel_cache.clone(),
            loading_ranks: loading.iter().filter(|other| of(**other) == of(rank)).count() as u32,
            is_settled,
        }
    }
}

/// What sums of activations over GPUs go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sums {
    /// The memory of the GPUs, which read one another's, and NCCL for large ones; what the GPUs cannot goes by NCCL, or by the
    /// host where there is none. With --repeatable without NCCL
    Peers,
    /// NCCL. With --repeatable, shards that run already need NCCL_ALGO=Tree NCCL_PROTO=Simple NCCL_MIN_NCHANNELS=1
    /// NCCL_MAX_NCHANNELS=1
    Nccl,
    /// The host's memory: slow; for shards that share a GPU
    Host,
}

impl Sums {
    fn as_str(self) -> &'static str {
        match self {
            Sums::Peers => "peers",
            Sums::Nccl => "nccl",
            Sums::Host => "host",
        }
    }
}

/// What NCCL is told where bits must not depend on the size of a message: one algorithm with one protocol, and one channel, for
/// another channel would add in another order.
const REPEATABLE_NCCL: [(&str, &str); 4] = [
    ("NCCL_ALGO", "Tree"),
    ("NCCL_PROTO", "Simple"),
    ("NCCL_MIN_NCHANNELS", "1"),
    ("NCCL_MAX_NCHANNELS", "1"),
];

impl GroupConfig {
    /// What the shards' processes find in their environment beside this one's: NCCL reads it at its first call.
    pub(super) fn shard_environment(&self) -> &'static [(&'static str, &'static str)] {
        let uses_nccl = |gpu: &&GpuConfig| gpu.repeatable && gpu.sums == Sums::Nccl;
        if self.gpu.as_ref().filter(uses_nccl).is_some() { &REPEATABLE_NCCL } else { &[] }
    }

    /// What each rank is asked to load for a meeting, if those that are `loading` are. `is_settled`: they have been loaded before.
    pub(super) fn load_requests(
        &self,
        meeting: &Meeting,
        loading: &[u32],
        is_settled: bool,
    ) -> Vec<pb::LoadRequest> {
        let shares = Host::detect().share(self.world_size);
        let request = |(rank, share): (u32, CpuShare)| pb::LoadRequest {
            build_id: self.build_id.clone(),
            group: meeting.group,
            epoch: meeting.epoch,
            rank,
            world_size: self.world_size,
            model_dir: self.model_dir.to_string_lossy().into_owned(),
            device: self.device.as_str().into(),
            dtype: self.dtype.as_str().into(),
            collective_path: meeting.path.clone(),
            max_context_tokens: self.max_context_tokens,
            max_step_tokens: self.max_step_tokens,
            max_frame_patches: self.max_frame_patches,
            max_step_sequences: self.max_step_sequences,
            kv_capacity_tokens: self.kv_capacity_tokens,
            feature_capacity_tokens: self.feature_capacity_tokens,
            threads: self.threads.unwrap_or(share.threads),
            // Whoever runs shards elsewhere says which processors they have.
            // A GPU has processors near it.
            cpus: if self.gpu.is_some() || matches!(self.source, ShardSource::Elsewhere(_)) {
                vec![]
            } else {
                share.cpus
            },
            image_mean: self.image_mean.into(),
            image_std: self.image_std.into(),
            loading_ranks: loading.len() as u32,
            gpu: self.gpu.as_ref().map(|gpu| gpu.request(rank, loading, is_settled)),
            waiting_pixel_bytes: match self.placement {
                Placement::Files => 0,
                Placement::Chunks { waiting_bytes } => waiting_bytes,
            },
        };
        (0..).zip(shares).map(request).collect()
    }
}

/// The processors that this process may use.
#[derive(Clone, Debug)]
pub(super) struct Host {
    cpus: Vec<u32>,
    /// How many of them a quota lets run at once.
    parallelism: u32,
}

/// The processors of one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CpuShare {
    pub threads: u32,
    /// Empty: any.
    pub cpus: Vec<u32>,
}

impl Host {
    /// This host, as far as this process may use it.
    pub fn detect() -> Self {
        let allowed = sched_getaffinity(None).unwrap_or_default();
        let cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).map(|cpu| cpu as u32).collect();
        let parallelism = thread::available_parallelism().map_or(1, |count| count.get() as u32);
        Self { cpus, parallelism }
    }

    /// Gives each rank as many neighbouring processors as every other: in lockstep the slowest counts, so that one more
    /// for some would gain nothing, and what does not divide is left to the server. Where there are more ranks than
    /// processors none is bound, and the system shares them out.
    pub fn share(&self, world_size: u32) -> Vec<CpuShare> {
        let each = self.cpus.len() / world_size.max(1) as usize;
        if each == 0 {
            return vec![CpuShare { threads: 1, cpus: vec![] }; world_size as usize];
        }
        let threads = (self.parallelism / world_size).clamp(1, each as u32);
        let shares = self.cpus.chunks(each).take(world_size as usize);
        shares.map(|cpus| CpuShare { threads, cpus: cpus.into() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(cpus: &[u32], parallelism: u32, world_size: u32) -> Vec<(u32, Vec<u32>)> {
        let host = Host { cpus: cpus.into(), parallelism };
        host.share(world_size).into_iter().map(|share| (share.threads, share.cpus)).collect()
    }

    #[test]
    fn ranks_are_told_how_many_load_on_their_gpu() {
        let gpu = GpuConfig {
            ordinals: vec![4, 4, 5],
            memory: 0.9,
            sums: Sums::Host,
            repeatable: false,
            no_graphs: false,
            kernel_cache: String::new(),
        };
        let told = |rank, loading: &[u32], is_settled| gpu.request(rank, loading, is_settled);
        assert_eq!([0, 1, 2].map(|rank| told(rank, &[0, 1, 2], false).loading_ranks), [2, 2, 1]);
        assert_eq!(told(1, &[1, 2], true).loading_ranks, 1);
        assert!(told(1, &[1, 2], true).is_settled && !told(1, &[1, 2], false).is_settled);
    }

    #[test]
    fn ranks_get_equal_and_disjoint_processors() {
        assert_eq!(shares(&[0, 1, 4, 5, 9], 5, 2), [(2, vec![0, 1]), (2, vec![4, 5])]);
        assert_eq!(shares(&[0, 1], 2, 2), [(1, vec![0]), (1, vec![1])]);
        assert_eq!(shares(&[3, 4, 5], 3, 1), [(3, vec![3, 4, 5])]);
    }

    #[test]
    fn a_quota_bounds_the_threads() {
        assert_eq!(shares(&[0, 1, 2, 3], 2, 2), [(1, vec![0, 1]), (1, vec![2, 3])]);
        assert_eq!(shares(&[0, 1, 2, 3], 1, 2), [(1, vec![0, 1]), (1, vec![2, 3])]);
    }

    #[test]
    fn more_ranks_than_processors_are_not_bound() {
        assert_eq!(shares(&[0, 1], 2, 3), vec![(1, vec![]); 3]);
    }

    #[test]
    fn this_host_has_processors() {
        let host = Host::detect();
        assert!(!host.cpus.is_empty() && host.parallelism > 0);
    }
}

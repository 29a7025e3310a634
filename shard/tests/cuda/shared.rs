//! Ranks that share a GPU and sum through NCCL, each a process. Its makers refuse that but for a setting of later versions, or where
//! the ranks say that they are on several hosts. The server refuses it, too; here it is tried, to know.

use std::{
    env,
    path::Path,
    process::{self, Child, Command, Stdio},
};

use lockstep_shard::{
    collective::{DEFAULT_SLOT_BYTES, SharedMemory},
    device::{DType, DeviceKind},
    process::die_with_parent,
    runner::Step,
    service::{
        gate::Gate,
        gpu::{GpuOptions, Sums},
        load,
    },
};

use super::{
    common::{Group, Request, Script, greedy, run_steps},
    gpu,
};

const CHECKPOINT: &str = "tests/checkpoints/shapes";

/// Set in a process that is a rank: which, of how many, and where they meet.
const RANK: &str = "LOCKSTEP_TEST_RANK";
const WORLD_SIZE: &str = "LOCKSTEP_TEST_WORLD_SIZE";
const MEETING: &str = "LOCKSTEP_TEST_MEETING";
const PARENT: &str = "LOCKSTEP_TEST_PARENT";

/// Where this is set, every rank tells NCCL that it is on a host of its own.
const HOSTS_APART: &str = "LOCKSTEP_TEST_HOSTS_APART";

/// What a rank says of its tokens, after this.
const MARK: &str = "tokens: ";

fn group(world_size: usize, sums: Sums) -> Group {
    let ordinals = vec![gpu::real().unwrap_or(0); world_size];
    let group = Group::new(CHECKPOINT, world_size, DType::Bf16);
    let gpu = GpuOptions { ordinals, memory: 0.9, sums, kernel_cache: gpu::kernel_cache(), ..group.gpu };
    Group { device: DeviceKind::Cuda, gpu, ..group }
}

fn requests() -> Vec<Request> {
    vec![Request { token_ids: (5..40).collect(), media: vec![], pictures: vec![], sampling: greedy() }]
}

fn steps(group: &Group) -> Vec<Step> {
    Script { chunk: 64, new_tokens: 4 }.steps(group, &requests())
}

fn start(rank: usize, world_size: usize, meeting: &Path) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["shared::rank_of_a_group", "--exact", "--ignored", "--nocapture"]);
    command.env(RANK, rank.to_string()).env(WORLD_SIZE, world_size.to_string()).env(MEETING, meeting);
    command.env(PARENT, process::id().to_string());
    if env::var_os(HOSTS_APART).is_some() {
        command.env("NCCL_HOSTID", format!("host-of-rank-{rank}"));
    }
    command.stdout(Stdio::piped()).spawn().unwrap()
}

/// Asks for `NCCL_MULTI_RANK_GPU_ENABLE=1` in the environment, or for `LOCKSTEP_TEST_HOSTS_APART=1` with `NCCL_SOCKET_IFNAME=lo`.
#[test]
#[ignore = "NCCL refuses ranks that share a GPU, unless it is told otherwise"]
fn ranks_that_share_a_gpu_sum_through_nccl() {
    for world_size in [2, 4] {
        let folder = tempfile::tempdir().unwrap();
        let meeting = folder.path().join("collective");
        SharedMemory::create(&meeting, world_size, DEFAULT_SLOT_BYTES).unwrap();
        let ranks: Vec<Child> = (0..world_size).map(|rank| start(rank, world_size, &meeting)).collect();
        let outputs = ranks.into_iter().map(|rank| rank.wait_with_output().unwrap());
        let said: Vec<String> = outputs
            .map(|output| {
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(output.status.success(), "a rank failed: {text}");
                text.lines().find_map(|line| line.split(MARK).nth(1)).expect("tokens").to_owned()
            })
            .collect();
        println!("{world_size} ranks: {said:?}");
        assert!(said.iter().all(|tokens| *tokens == said[0]));
    }
}

#[test]
#[ignore = "a rank of a test above"]
fn rank_of_a_group() {
    let (Ok(rank), Ok(world_size)) = (env::var(RANK), env::var(WORLD_SIZE)) else { return };
    die_with_parent(env::var(PARENT).unwrap().parse().unwrap()).unwrap();
    let group = group(world_size.parse().unwrap(), Sums::Nccl);
    let options = group.options(rank.parse().unwrap(), env::var_os(MEETING).unwrap().into());
    let gate = Gate::new(options.epoch, options.threads);
    let mut loaded = load::load(&options, &gate, &mut |_| ()).unwrap();
    let results = run_steps(&mut loaded, &requests(), &steps(&group)).unwrap();
    let drawn = results.iter().flat_map(|result| &result.sampled).flat_map(|sampled| &sampled.tokens);
    println!("\n{MARK}{:?}", drawn.map(|token| token.token_id).collect::<Vec<_>>());
}

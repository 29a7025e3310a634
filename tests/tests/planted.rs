//! What `faulty-shard` plants happens where and when it was told to, once; the rank that is left goes on beside a new one.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lockstep_proto::shard::shard_service_client::ShardServiceClient;
use lockstep_proto::shard::{self as pb, load_response::Event};
use lockstep_shard::collective::{DEFAULT_SLOT_BYTES, SharedMemory};
use lockstep_tests::faults::order;
use lockstep_tests::golden::root;
use tonic::transport::{Channel, Endpoint};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A shard's process, loaded or not.
struct Rank {
    process: Child,
    client: ShardServiceClient<Channel>,
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What ranks of a test share: sockets, files to meet in, orders.
struct World {
    folder: tempfile::TempDir,
}

impl World {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn start(&self, name: &str) -> anyhow::Result<Rank> {
        let program =
            std::env::var_os("CARGO_BIN_EXE_faulty-shard").context("run the tests with `cargo test`")?;
        let socket = self.path(name);
        let mut command = Command::new(program);
        command.arg("shard").arg("--listen").arg(format!("unix:{}", socket.display()));
        command.env("LOCKSTEP_FAULTS", self.folder.path()).stderr(Stdio::null());
        let process = command.spawn()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let begin = Instant::now();
        loop {
            match endpoint.connect().await {
                Ok(channel) => return Ok(Rank { process, client: ShardServiceClient::new(channel) }),
                Err(error) => ensure!(begin.elapsed() < PATIENCE, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Makes the file that the ranks of an epoch meet in.
    fn meet(&self, epoch: u64) -> anyhow::Result<String> {
        let path = self.path(&format!("epoch-{epoch}"));
        SharedMemory::create(&path, 2, DEFAULT_SLOT_BYTES)?;
        Ok(path.display().to_string())
    }
}

fn load_request(epoch: u64, rank: u32, loading_ranks: u32, collective_path: &str) -> pb::LoadRequest {
    pb::LoadRequest {
        build_id: lockstep_shard::build_id().into(),
        group: 9,
        epoch,
        rank,
        world_size: 2,
        model_dir: root().join("tests/checkpoints/a").display().to_string(),
        device: "cpu".into(),
        dtype: "f32".into(),
        collective_path: collective_path.into(),
        max_context_tokens: 256,
        max_step_tokens: 64,
        max_step_sequences: 4,
        kv_capacity_tokens: 512,
        threads: 1,
        image_mean: vec![0.5; 3],
        image_std: vec![0.5; 3],
        loading_ranks,
        ..Default::default()
    }
}

impl Rank {
    async fn load(&mut self, request: pb::LoadRequest) -> anyhow::Result<()> {
        let mut events = self.client.load(request).await?.into_inner();
        let mut described = false;
        while let Some(response) = events.message().await? {
            described |= matches!(response.event, Some(Event::Description(_)));
        }
        ensure!(described, "the load ended early");
        Ok(())
    }

    async fn regroup(&mut self, epoch: u64, collective_path: &str) -> anyhow::Result<()> {
        let request = pb::RegroupRequest { group: 9, epoch, collective_path: collective_path.into() };
        self.client.regroup(request).await?;
        Ok(())
    }

    /// Runs steps on a stream of their own; what each answers, until one fails.
    async fn run(&mut self, steps: Vec<pb::RunRequest>) -> Vec<pb::RunResponse> {
        let mut answered = Vec::new();
        let Ok(answers) = self.client.run(tokio_stream::iter(steps)).await else { return answered };
        let mut answers = answers.into_inner();
        while let Ok(Some(answer)) = answers.message().await {
            answered.push(answer);
        }
        answered
    }

    async fn collectives(&mut self) -> anyhow::Result<u64> {
        Ok(self.client.get_progress(pb::GetProgressRequest::default()).await?.into_inner().collectives)
    }

    /// Waits until the process is in the state that the fault leaves it in.
    fn is_broken(&mut self, kind: &str) -> anyhow::Result<bool> {
        let status = self.process.try_wait()?;
        Ok(match kind {
            "panic" => status.is_some_and(|status| status.code() == Some(101)),
            "exhaust" => status.is_some_and(|status| status.signal() == Some(6)),
            "kill" => status.is_some_and(|status| status.signal() == Some(9)),
            "stop" => {
                let line = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
                line.contains("State:\tT")
            }
            _ => status.is_none(),
        })
    }
}

/// A prompt, and one token after it in each step.
fn steps(epoch: u64) -> Vec<pb::RunRequest> {
    let sampling = pb::SamplingParams { repetition_penalty: 1.0, logprobs: Some(1), ..Default::default() };
    let admission = pb::Admission {
        sequence_id: 1,
        token_ids: (10..30).collect(),
        num_prompt_tokens: 20,
        sampling: Some(sampling),
        ..Default::default()
    };
    let step = |number: u32| {
        let (start, length) = if number == 0 { (0, 20) } else { (19 + number, 1) };
        let new_blocks = if number == 0 { vec![3] } else { vec![] };
        let chunk = pb::Chunk { sequence_id: 1, start, length, new_blocks, max_new_tokens: 1 };
        let admissions = if number == 0 { vec![admission.clone()] } else { vec![] };
        pb::RunRequest {
            group: 9,
            epoch,
            step: number.into(),
            admissions,
            chunks: vec![chunk],
            ..Default::default()
        }
    };
    (0..8).map(step).collect()
}

fn drawn(answers: &[pb::RunResponse]) -> Vec<(u32, Option<f32>)> {
    let tokens = answers.iter().flat_map(|answer| &answer.sampled).flat_map(|sampled| &sampled.tokens);
    tokens.map(|token| (token.token_id, token.logprob)).collect()
}

/// A pair of loaded ranks, and what they draw undisturbed.
async fn pair(world: &World) -> anyhow::Result<([Rank; 2], Vec<(u32, Option<f32>)>)> {
    let (mut first, mut second) = (world.start("first").await?, world.start("second").await?);
    let path = world.meet(1)?;
    tokio::try_join!(first.load(load_request(1, 0, 2, &path)), second.load(load_request(1, 1, 2, &path)))?;
    let (of_first, of_second) = tokio::join!(first.run(steps(1)), second.run(steps(1)));
    ensure!(drawn(&of_first).len() == 8);
    let hashes =
        |answers: &[pb::RunResponse]| answers.iter().map(|answer| answer.state_hash).collect::<Vec<_>>();
    ensure!(hashes(&of_first) == hashes(&of_second));
    Ok(([first, second], drawn(&of_first)))
}

async fn regroup_both(ranks: &mut [Rank; 2], epoch: u64, path: &str) -> anyhow::Result<()> {
    let [first, second] = ranks;
    tokio::try_join!(first.regroup(epoch, path), second.regroup(epoch, path))?;
    Ok(())
}

#[tokio::test]
async fn a_rank_that_breaks_is_replaced_and_the_other_keeps_its_weights() -> anyhow::Result<()> {
    let world = World { folder: tempfile::tempdir()? };
    let (mut ranks, expected) = pair(&world).await?;
    let mut epoch = 1;
    for (i, kind) in ["hang", "panic", "exhaust", "kill", "stop"].into_iter().enumerate() {
        epoch += 1;
        regroup_both(&mut ranks, epoch, &world.meet(epoch)?).await?;
        order(world.folder.path(), 1, &format!("{kind} {}", 3 + 7 * i))?;
        let [mut first, mut second] = ranks;
        let mut waiting = first.client.clone();
        let waits = tokio::spawn(async move { waiting.run(tokio_stream::iter(steps(epoch))).await });
        let _second = tokio::time::timeout(Duration::from_millis(500), second.run(steps(epoch))).await;
        let begin = Instant::now();
        while !second.is_broken(kind)? {
            ensure!(begin.elapsed() < PATIENCE, "{kind}: nothing happened");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if kind == "hang" {
            ensure!(
                first.collectives().await? == second.collectives().await? + 1,
                "who waits for whom is seen"
            );
        }
        drop(second);
        ensure!(!Path::new(&world.path("1")).exists(), "{kind}: an order is taken");

        epoch += 1;
        let path = world.meet(epoch)?;
        let mut second = world.start(&format!("second-{i}")).await?;
        tokio::try_join!(first.regroup(epoch, &path), second.load(load_request(epoch, 1, 1, &path)))?;
        let (answers, _) = tokio::join!(first.run(steps(epoch)), second.run(steps(epoch)));
        ensure!(drawn(&answers) == expected, "{kind}: {:?} instead of {expected:?}", drawn(&answers));
        waits.abort();
        ranks = [first, second];
    }
    Ok(())
}

#[tokio::test]
async fn a_flipped_bit_is_seen_in_the_hash_and_gone_after_a_regroup() -> anyhow::Result<()> {
    let world = World { folder: tempfile::tempdir()? };
    let (mut ranks, expected) = pair(&world).await?;
    for (epoch, after) in (2..).step_by(2).zip([1, 2, 9, 30, 31]) {
        regroup_both(&mut ranks, epoch, &world.meet(epoch)?).await?;
        order(world.folder.path(), 1, &format!("flip {after}"))?;
        let [first, second] = &mut ranks;
        let (of_first, of_second) = tokio::join!(first.run(steps(epoch)), second.run(steps(epoch)));
        let mut both = of_first.iter().zip(&of_second);
        ensure!(both.any(|(one, other)| one.state_hash != other.state_hash), "flip {after} was not seen");
        regroup_both(&mut ranks, epoch + 1, &world.meet(epoch + 1)?).await?;
        let [first, second] = &mut ranks;
        let (answers, _) = tokio::join!(first.run(steps(epoch + 1)), second.run(steps(epoch + 1)));
        ensure!(drawn(&answers) == expected);
    }
    Ok(())
}

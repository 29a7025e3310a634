//! A request's tokens and log-probabilities are the same, bit for bit, alone and in any company: in any batch, under any chunking, with
//! any number of threads, behind blocks that others computed, after its own blocks were lost and computed again, and after shards died.
//!
//! Requests, servers and mixtures follow from one seed; when which step begins does not. `LOCKSTEP_MIXTURE_SEED=n` takes another seed,
//! `LOCKSTEP_MIXTURES=n` runs that many.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::time::Duration;

use anyhow::Context;
use lockstep_proto::v1;
use lockstep_proto::v1::inference_service_client::InferenceServiceClient;
use lockstep_tests::answers::{self, Answer};
use lockstep_tests::golden::root;
use lockstep_tests::number;
use lockstep_tests::pool::{MOST_TOKENS, Pool};
use lockstep_tests::server::{Server, other_binary, signal};
use lockstep_tests::watched::{self, Watched};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tonic::transport::Channel;

const DEFAULT_MIXTURES: u64 = 200;
const DEFAULT_SEED: u64 = 1;
const REQUESTS: usize = 42;
/// Mixtures that one server gets, one after the other.
const SERVER_MIXTURES: u64 = 10;
/// The most requests of a mixture.
const MIXTURE_REQUESTS: usize = 16;
/// The longest time after which a request of a mixture is sent, or left.
const LATEST: Duration = Duration::from_millis(80);
/// Every so many servers is one whose shards are killed, each time in every so many of its mixtures.
const FAULTY_SERVERS: usize = 4;
const FAULTY_MIXTURES: f64 = 0.3;
/// Answers that servers write at a time: they take turns.
const MAX_RUNNING: [u32; 5] = [32, 16, 1, 8, 4];
/// Sums have an order of their own for each of these.
const WORLDS: [(&str, &str); 3] = [("2", "bf16"), ("1", "bf16"), ("3", "f32")];

type Client = InferenceServiceClient<Channel>;

/// How a server of a mixture is started.
struct Setting {
    world: (&'static str, &'static str),
    max_step_tokens: u32,
    max_running: u32,
    kv_tokens: u32,
    feature_tokens: u32,
    threads: u32,
}

impl Setting {
    fn invent(rng: &mut StdRng, world: (&'static str, &'static str), max_running: u32) -> Self {
        let budgets = [max_running, 23, 64, 150, 512, 2_048];
        Self {
            world,
            max_running,
            max_step_tokens: budgets.choose(rng).copied().unwrap_or_default().max(max_running),
            // Mostly so few that running sequences have to give theirs up.
            kv_tokens: MOST_TOKENS * [1, 1, 2, 4].choose(rng).copied().unwrap_or(1),
            feature_tokens: rng.random_range(512..4_096),
            threads: rng.random_range(1..=4),
        }
    }

    /// A server on which nobody has company.
    fn reference(world: (&'static str, &'static str)) -> Self {
        let (max_step_tokens, kv_tokens, feature_tokens) = (4_096, 8 * MOST_TOKENS, 8_192);
        Self { world, max_running: 4, max_step_tokens, kv_tokens, feature_tokens, threads: 1 }
    }

    fn start(&self, watched: &std::path::Path) -> anyhow::Result<Server> {
        let words = format!("{self} --max-context-tokens {MOST_TOKENS} --max-image-tokens 256");
        let shard = other_binary("watched-shard")?;
        let arguments: Vec<_> = words.split(' ').chain(["--shard-program", &shard]).collect();
        let environment = [(watched::FILE, watched.to_str().context("a path of words")?)];
        Server::start_in(&environment, &root().join("tests/checkpoints/a"), &arguments)
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { world: (world_size, dtype), max_step_tokens, max_running, .. } = self;
        write!(f, "--world-size {world_size} --dtype {dtype} --max-step-tokens {max_step_tokens} ")?;
        write!(f, "--max-running {max_running} --kv-tokens {} ", self.kv_tokens)?;
        write!(f, "--feature-tokens {} --threads {}", self.feature_tokens, self.threads)
    }
}

/// What a client does with its answer.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Waits for it.
    Whole,
    /// Takes it as it is written, up to so many messages.
    Streamed(usize),
    /// Goes away after this time, whatever there is.
    Left(Duration),
}

/// A request of a mixture.
struct Sent {
    index: usize,
    after: Duration,
    way: Way,
    request: v1::GenerateRequest,
}

/// What is sent, and which of the shards is killed when.
struct Mixture {
    sent: Vec<Sent>,
    kill: Option<(usize, Duration)>,
}

fn invent_mixture(rng: &mut StdRng, pool: &[v1::GenerateRequest], kill: bool) -> Mixture {
    let count = rng.random_range(1..=MIXTURE_REQUESTS);
    let latest = if rng.random_bool(0.5) { Duration::ZERO } else { LATEST };
    // Few different ones share more.
    let choice: Vec<usize> =
        (0..rng.random_range(1..=count)).map(|_| rng.random_range(0..pool.len())).collect();
    let sent = (0..count).map(|_| {
        let index = *choice.choose(rng).expect("there are some");
        let way = match rng.random_range(0..10) {
            0..3 => Way::Whole,
            3..8 => Way::Streamed(usize::MAX),
            8 => Way::Streamed(rng.random_range(0..40)),
            _ => Way::Left(LATEST.mul_f64(rng.random())),
        };
        let request = v1::GenerateRequest {
            priority: Some(rng.random_range(-1..=1)),
            cache_salt: ["one", "other"].get(rng.random_range(0..3_usize)).map(ToString::to_string),
            ..pool[index].clone()
        };
        Sent { index, after: latest.mul_f64(rng.random()), way, request }
    });
    let sent = sent.collect();
    Mixture { sent, kill: kill.then(|| (rng.random_range(0..8), LATEST.mul_f64(rng.random()))) }
}

/// Kills a shard. Streams are to see a pause.
async fn kill(server: &Server, (which, after): (usize, Duration)) -> anyhow::Result<()> {
    tokio::time::sleep(after).await;
    let shards = server.shard_pids();
    // None is there while they are started again.
    let Some(shard) = shards.get(which % shards.len().max(1)) else { return Ok(()) };
    // It may be gone by itself: the others of a group end with it.
    let _ = signal(*shard, "KILL");
    Ok(())
}

async fn connect(server: &Server) -> anyhow::Result<Client> {
    Ok(InferenceServiceClient::connect(format!("http://{}", server.address())).await?)
}

/// Every request's answers, each alone, sharing nothing.
async fn alone(
    world: (&'static str, &'static str),
    pool: &[v1::GenerateRequest],
) -> anyhow::Result<Vec<Vec<Answer>>> {
    let folder = tempfile::tempdir()?;
    let server = Setting::reference(world).start(&folder.path().join("watched"))?;
    let mut client = connect(&server).await?;
    let mut references = Vec::new();
    for (i, request) in pool.iter().enumerate() {
        let request = v1::GenerateRequest { cache_salt: Some(i.to_string()), ..request.clone() };
        let most = request.stopping.as_ref().and_then(|stopping| stopping.max_tokens).unwrap_or_default();
        let response = client.generate(request).await?.into_inner();
        let prompt = response.usage.as_ref().context("usage")?.prompt_tokens;
        assert!(prompt + most <= MOST_TOKENS, "request {i} has {prompt} + {most} tokens");
        references.push(answers::of_response(response)?);
    }
    Ok(references)
}

/// Sends a request, and compares what comes with what it gets alone. How many tokens came.
async fn compare(mut client: Client, sent: &Sent, alone: &[Answer]) -> anyhow::Result<usize> {
    tokio::time::sleep(sent.after).await;
    let request = sent.request.clone();
    let got = match sent.way {
        Way::Whole => answers::of_response(client.generate(request).await?.into_inner())?,
        Way::Streamed(most) => {
            let request = v1::StreamGenerateRequest { request: Some(request) };
            let stream = client.stream_generate(request).await?.into_inner();
            answers::of_stream(stream, alone.len(), most).await?
        }
        Way::Left(after) => match tokio::time::timeout(after, client.generate(request)).await {
            Ok(response) => answers::of_response(response?.into_inner())?,
            Err(_) => return Ok(0),
        },
    };
    anyhow::ensure!(got.len() == alone.len(), "{} answers came", got.len());
    for (n, (got, alone)) in got.iter().zip(alone).enumerate() {
        if let Some(difference) = got.difference(alone) {
            anyhow::bail!("answer {n}: {difference}");
        }
    }
    Ok(got.iter().map(|answer| answer.tokens.len()).sum())
}

/// Runs a mixture. How many tokens came.
async fn run(
    server: &Server,
    client: &Client,
    mixture: &Mixture,
    alone: &[Vec<Answer>],
) -> anyhow::Result<usize> {
    let killed = async {
        match mixture.kill {
            Some(one) => kill(server, one).await,
            None => Ok(()),
        }
    };
    let compared = mixture.sent.iter().map(|sent| async {
        let compared = compare(client.clone(), sent, &alone[sent.index]).await;
        compared
            .with_context(|| format!("request {} ({:?}, sent after {:?})", sent.index, sent.way, sent.after))
    });
    let (killed, compared) = futures::join!(killed, futures::future::join_all(compared));
    killed?;
    compared.into_iter().sum()
}

#[tokio::test]
async fn a_request_gets_the_same_bits_in_any_mixture() -> anyhow::Result<()> {
    let seed = number("LOCKSTEP_MIXTURE_SEED", DEFAULT_SEED)?;
    let mixtures = number("LOCKSTEP_MIXTURES", DEFAULT_MIXTURES)?;
    let pool = Pool::new(seed).take(REQUESTS)?;
    let mut references = HashMap::new();
    let (mut total, mut after_faults) = (Watched::default(), Watched::default());
    let (mut tokens, mut kills) = (0, 0);
    let folder = tempfile::tempdir()?;
    for first in (0..mixtures).step_by(SERVER_MIXTURES as usize) {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(1 << 32).wrapping_add(first));
        let turn = (first / SERVER_MIXTURES) as usize;
        let world = WORLDS[turn % WORLDS.len()];
        let alone = match references.entry(world) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(alone(world, &pool).await?),
        };
        let faulty = turn % FAULTY_SERVERS == 1;
        let setting = Setting::invent(&mut rng, world, MAX_RUNNING[turn % MAX_RUNNING.len()]);
        let watched = folder.path().join(first.to_string());
        let server = setting.start(&watched).with_context(|| setting.to_string())?;
        let client = connect(&server).await?;
        for index in first..mixtures.min(first + SERVER_MIXTURES) {
            let kill = faulty && rng.random_bool(FAULTY_MIXTURES);
            let mixture = invent_mixture(&mut rng, &pool, kill);
            kills += u64::from(mixture.kill.is_some());
            let ran = run(&server, &client, &mixture, alone).await;
            tokens += ran.with_context(|| format!("mixture {index} of seed {seed}, {setting}"))?;
        }
        drop(client);
        assert_eq!(server.stop()?.code, Some(0));
        let watched = Watched::read(&watched)?;
        println!("{setting}: {watched:?}");
        if faulty {
            after_faults.add(&watched)
        } else {
            total.add(&watched)
        };
    }
    println!(
        "{mixtures} mixtures, {tokens} tokens compared: {total:?}, with {kills} shards killed: {after_faults:?}"
    );
    if mixtures >= DEFAULT_MIXTURES {
        // What the bits must not depend on has happened.
        assert!(total.returned > 0 && total.shared_prompts > 0 && total.partial_chunks > 0, "{total:?}");
        assert!(total.resumed > 0 && total.evictions > 0 && total.most_sequences > 4, "{total:?}");
        assert!(after_faults.returned > 0, "{after_faults:?}");
    }
    Ok(())
}

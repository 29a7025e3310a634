//! A shard that is far away: every byte between it and its server is LOCKSTEP_DELAY_MS on its way. Its steps take at least
//! LOCKSTEP_STEP_MS.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;
use lockstep_shard::entry::serve_with;
use lockstep_shard::runner::{Step, StepError, StepResult};
use lockstep_shard::service::ListenAddress;
use lockstep_shard::service::load::load;
use lockstep_shard::service::worker::{LoadError, Rank};
use lockstep_tests::{number, shard};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

fn main() -> anyhow::Result<()> {
    let milliseconds = |name| anyhow::Ok(Duration::from_millis(number(name, 0)?));
    let (delay, least) = (milliseconds("LOCKSTEP_DELAY_MS")?, milliseconds("LOCKSTEP_STEP_MS")?);
    let mut arguments = shard::arguments();
    let ListenAddress::Unix(far) = arguments.listen else { bail!("--listen: must be unix:PATH") };
    let near = far.with_extension("near");
    arguments.listen = ListenAddress::Unix(near.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        tokio::spawn(listen(UnixListener::bind(far)?, near, delay));
        let load = Arc::new(move |options: &_, gate: &_, tell: &mut dyn FnMut(_)| {
            let mut loaded = load(options, gate, tell)?;
            loaded.rank = Box::new(Slow { rank: loaded.rank, least });
            Ok(loaded)
        });
        serve_with(arguments, load).await
    })
}

struct Slow {
    rank: Box<dyn Rank>,
    least: Duration,
}

impl Rank for Slow {
    fn run(&mut self, step: Step) -> Result<StepResult, StepError> {
        let end = Instant::now() + self.least;
        let result = self.rank.run(step);
        thread::sleep(end.saturating_duration_since(Instant::now()));
        result
    }

    fn regroup(&mut self, epoch: u64, collective_path: &Path) -> Result<(), LoadError> {
        self.rank.regroup(epoch, collective_path)
    }
}

/// Passes connections on, late.
async fn listen(listener: UnixListener, near: PathBuf, delay: Duration) {
    while let Ok((far, _)) = listener.accept().await {
        let near = loop {
            // The shard begins to listen a moment later.
            match UnixStream::connect(&near).await {
                Ok(near) => break near,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        let ((far_in, far_out), (near_in, near_out)) = (far.into_split(), near.into_split());
        tokio::spawn(pass(far_in, near_out, delay));
        tokio::spawn(pass(near_in, far_out, delay));
    }
}

/// Passes bytes on, each `delay` after it came, however many are on their way.
async fn pass(
    mut from: impl AsyncRead + Unpin + Send + 'static,
    mut to: impl AsyncWrite + Unpin,
    delay: Duration,
) {
    let (come, mut coming) = mpsc::channel::<(Instant, Vec<u8>)>(1024);
    tokio::spawn(async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            if come.send((Instant::now() + delay, buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    });
    while let Some((at, bytes)) = coming.recv().await {
        tokio::time::sleep_until(at.into()).await;
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

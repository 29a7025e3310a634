//! Shards as child processes: how they start, what they say last, and that none is left behind.

use std::{
    collections::VecDeque,
    ffi::OsString,
    io,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError, mpsc as blocking},
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

/// Lines of a shard's standard error that are kept.
const LAST_WORDS_LINES: usize = 20;
/// Bytes of a line that are kept.
const LINE_BYTES: usize = 2000;
/// How long the words of a process that ended are waited for, should something else hold its standard error open.
const WORDS_TIMEOUT: Duration = Duration::from_millis(300);

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Exit {
    pub status: String,
    pub last_words: Vec<String>,
}

/// Tells when a process has ended, and how.
pub(super) type ExitWatch = watch::Receiver<Option<Exit>>;

/// Returns when the process has ended.
pub(super) async fn ended(mut exit: ExitWatch) -> Exit {
    match exit.wait_for(Option::is_some).await {
        Ok(exit) => (*exit).clone().expect("just waited for"),
        // Whoever watched the process was stopped together with the group.
        Err(_) => Exit { status: "stopped".into(), last_words: vec![] },
    }
}

/// Starts shards, from a thread that lives as long as this value. The kernel kills a shard when the *thread* that started it ends,
/// and the runtime's own threads come and go.
pub(super) struct Nursery {
    orders: blocking::Sender<Order>,
}

/// A process to start, and where it goes.
type Order = (Command, oneshot::Sender<io::Result<Child>>);

impl Nursery {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system gives none.
    pub fn open() -> io::Result<Self> {
        let runtime = tokio::runtime::Handle::current();
        let (orders, queue) = blocking::channel::<Order>();
        thread::Builder::new().name("shards-parent".into()).spawn(move || {
            let _inside = runtime.enter();
            for (mut command, started) in queue {
                // If nobody waits for it any more, the child is dropped here, which kills it.
                let _ = started.send(command.spawn());
            }
        })?;
        Ok(Self { orders })
    }

    /// Starts `command... shard --listen unix:SOCKET --parent PID`, with `environment` beside this process's.
    ///
    /// # Errors
    /// It cannot be started.
    pub async fn start(
        &self,
        rank: u32,
        command: &[OsString],
        environment: &[(&str, &str)],
        socket: &Path,
    ) -> io::Result<ShardProcess> {
        let (tell, started) = oneshot::channel();
        let ended = || io::Error::other("the thread that starts shards ended");
        let mut command = shard_command(command, socket);
        command.envs(environment.iter().copied());
        self.orders.send((command, tell)).map_err(|_| ended())?;
        let child = started.await.map_err(|_| ended())??;
        let pid = child.id();
        let (tell, exit) = watch::channel(None);
        let (alive, stop) = mpsc::channel(1);
        tokio::spawn(watch_child(rank, child, stop, tell));
        Ok(ShardProcess { rank, pid, exit, _alive: alive })
    }
}

/// The process of a shard. Dropping it kills it.
pub(super) struct ShardProcess {
    rank: u32,
    pid: Option<u32>,
    pub exit: ExitWatch,
    /// Its end tells the one who watches the process to kill it.
    _alive: mpsc::Sender<()>,
}

impl ShardProcess {
    /// Kills it and returns when it is gone; or after `patience`, if the system does not let it go. Then it does nothing any more,
    /// but it still holds its memory.
    pub async fn kill(self, patience: Duration) {
        let Self { rank, pid, exit, _alive } = self;
        drop(_alive);
        if timeout(patience, ended(exit)).await.is_err() {
            tracing::error!(
                rank,
                pid,
                "left behind a shard that was killed and is not gone after {patience:?}"
            );
        }
    }
}

fn shard_command(command: &[OsString], socket: &Path) -> Command {
    let mut listen = OsString::from("unix:");
    listen.push(socket);
    let mut shard = Command::new(&command[0]);
    shard.args(&command[1..]).arg("shard").arg("--listen").arg(listen);
    shard.arg("--parent").arg(std::process::id().to_string());
    shard.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    shard
}

/// Waits for a process to end, or ends it when `stop` closes, and tells how it ended.
async fn watch_child(
    rank: u32,
    mut child: Child,
    mut stop: mpsc::Receiver<()>,
    tell: watch::Sender<Option<Exit>>,
) {
    let words = Arc::new(Mutex::new(LastWords::default()));
    let listener = child.stderr.take().map(|stderr| tokio::spawn(listen(rank, stderr, words.clone())));
    let status = tokio::select! {
        status = child.wait() => status,
        _ = stop.recv() => match child.kill().await {
            Ok(()) => child.wait().await,
            Err(error) => Err(error),
        },
    };
    if let Some(listener) = listener {
        let _ = timeout(WORDS_TIMEOUT, listener).await;
    }
    let last_words = words.lock().unwrap_or_else(PoisonError::into_inner).lines.drain(..).collect();
    let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
    tell.send_replace(Some(Exit { status, last_words }));
}

/// Reads lines until the end, hands them to the log, and keeps the last.
async fn listen(rank: u32, mut stderr: impl AsyncRead + Unpin, words: Arc<Mutex<LastWords>>) {
    let mut buffer = vec![0; 4096];
    let mut line = vec![];
    loop {
        let count = stderr.read(&mut buffer).await.unwrap_or(0);
        for &byte in &buffer[..count] {
            if byte == b'\n' {
                hear(rank, &mut line, &words);
            } else if line.len() < LINE_BYTES {
                line.push(byte);
            }
        }
        if count == 0 {
            hear(rank, &mut line, &words);
            return;
        }
    }
}

fn hear(rank: u32, line: &mut Vec<u8>, words: &Mutex<LastWords>) {
    let text = String::from_utf8_lossy(line).trim_end().to_owned();
    line.clear();
    if !text.is_empty() {
        tracing::info!(rank, "shard: {text}");
        words.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }
}

/// The last lines of a text that goes on.
#[derive(Default)]
struct LastWords {
    lines: VecDeque<String>,
}

impl LastWords {
    fn push(&mut self, line: String) {
        if self.lines.len() == LAST_WORDS_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Vec<OsString> {
        ["/bin/sh", "-c", script].into_iter().map(Into::into).collect()
    }

    async fn start(rank: u32, command: &[OsString]) -> io::Result<ShardProcess> {
        Nursery::open()?.start(rank, command, &[("LOCKSTEP_TEST_WORD", "hello")], "/x".as_ref()).await
    }

    #[tokio::test]
    async fn a_shard_finds_its_environment() {
        let process = start(0, &shell("printf $LOCKSTEP_TEST_WORD >&2")).await.unwrap();
        assert_eq!(ended(process.exit.clone()).await.last_words, ["hello"]);
    }

    #[tokio::test]
    async fn last_words_are_kept_and_bounded() {
        let script =
            "i=0; while [ $i -lt 100 ]; do echo line $i >&2; i=$((i+1)); done; printf bye >&2; exit 3";
        let process = start(0, &shell(script)).await.unwrap();
        let exit = ended(process.exit.clone()).await;
        assert_eq!(exit.status, "exit status: 3");
        assert_eq!(exit.last_words.len(), LAST_WORDS_LINES);
        assert_eq!(exit.last_words[LAST_WORDS_LINES - 2..], ["line 99", "bye"]);
    }

    #[tokio::test]
    async fn a_killed_process_is_gone_also_where_it_was_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("echo $$ > {}; kill -STOP $$; exec sleep 1000", pid.display());
        let process = start(0, &shell(&script)).await.unwrap();
        let pid = loop {
            let pid = std::fs::read_to_string(&pid).unwrap_or_default();
            if pid.ends_with('\n') {
                break pid.trim().to_owned();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let exit = process.exit.clone();
        process.kill(Duration::from_secs(60)).await;
        assert!(!Path::new("/proc").join(&pid).exists(), "process {pid} is still there");
        assert!(ended(exit).await.status.contains("signal: 9"));
    }

    /// No process can be made to outlive SIGKILL here, so this one is only told of, by a watch that says nothing.
    #[tokio::test]
    async fn a_killed_process_that_the_system_holds_is_not_waited_for() {
        let (_tell, exit) = watch::channel(None);
        let (alive, mut stop) = mpsc::channel(1);
        let process = ShardProcess { rank: 3, pid: Some(7), exit, _alive: alive };
        process.kill(Duration::from_millis(20)).await;
        assert_eq!(stop.recv().await, None, "it was killed");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_told() {
        let started = start(0, &["/no/such/program".into()]).await;
        assert_eq!(started.err().unwrap().kind(), io::ErrorKind::NotFound);
    }
}

//! Shards as child processes: how they start, what they say last, and that none is left behind.

use std::{
    collections::VecDeque,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
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

/// The processes of a group. Dropping it kills them.
pub(super) struct Processes {
    pub exits: Vec<ExitWatch>,
    kill: Vec<mpsc::Sender<()>>,
    /// Ends the thread that the processes are children of.
    _parent: blocking::Sender<()>,
}

impl Processes {
    /// Starts one process for each socket: `command... shard --listen unix:SOCKET --parent PID`.
    ///
    /// # Errors
    /// One of them cannot be started. Those that were are killed.
    pub async fn start(command: &[OsString], sockets: &[PathBuf]) -> io::Result<Self> {
        let commands = sockets.iter().map(|socket| shard_command(command, socket)).collect();
        let (children, parent) = spawn_from_own_thread(commands).await?;
        let mut processes = Self { exits: vec![], kill: vec![], _parent: parent };
        for (rank, child) in children.into_iter().enumerate() {
            let (tell, exit) = watch::channel(None);
            let (kill, stop) = mpsc::channel(1);
            tokio::spawn(watch_child(rank, child, stop, tell));
            processes.exits.push(exit);
            processes.kill.push(kill);
        }
        Ok(processes)
    }

    /// Kills all processes and returns when they are gone.
    pub async fn shutdown(mut self) {
        self.kill.clear();
        for exit in self.exits.drain(..) {
            ended(exit).await;
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

/// Starts processes from a thread that lives until the returned sender is dropped. The kernel kills a shard when the
/// *thread* that started it ends, and the runtime's own threads come and go.
async fn spawn_from_own_thread(mut commands: Vec<Command>) -> io::Result<(Vec<Child>, blocking::Sender<()>)> {
    let runtime = tokio::runtime::Handle::current();
    let (parent, until_dropped) = blocking::channel::<()>();
    let (tell, children) = oneshot::channel();
    thread::Builder::new().name("shards-parent".into()).spawn(move || {
        let spawned = {
            let _inside = runtime.enter();
            commands.iter_mut().map(Command::spawn).collect::<io::Result<Vec<Child>>>()
        };
        // If nobody waits for them any more, the children are dropped here, which kills them.
        let _ = tell.send(spawned);
        let _ = until_dropped.recv();
    })?;
    let children = children.await.map_err(|_| io::Error::other("the thread that starts shards ended"))??;
    Ok((children, parent))
}

/// Waits for a process to end, or ends it when `stop` closes, and tells how it ended.
async fn watch_child(
    rank: usize,
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
async fn listen(rank: usize, mut stderr: impl AsyncRead + Unpin, words: Arc<Mutex<LastWords>>) {
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

fn hear(rank: usize, line: &mut Vec<u8>, words: &Mutex<LastWords>) {
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

    #[tokio::test]
    async fn last_words_are_kept_and_bounded() {
        let script =
            "i=0; while [ $i -lt 100 ]; do echo line $i >&2; i=$((i+1)); done; printf bye >&2; exit 3";
        let processes = Processes::start(&shell(script), &["/x".into()]).await.unwrap();
        let exit = ended(processes.exits[0].clone()).await;
        assert_eq!(exit.status, "exit status: 3");
        assert_eq!(exit.last_words.len(), LAST_WORDS_LINES);
        assert_eq!(exit.last_words[LAST_WORDS_LINES - 2..], ["line 99", "bye"]);
    }

    #[tokio::test]
    async fn shutdown_leaves_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let script = format!("echo $$ >> {}; exec sleep 1000", pids.display());
        let processes = Processes::start(&shell(&script), &["/x".into(), "/y".into()]).await.unwrap();
        let pids = loop {
            let pids = std::fs::read_to_string(&pids).unwrap_or_default();
            if pids.lines().count() == 2 {
                break pids;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let exits = processes.exits.clone();
        processes.shutdown().await;
        for pid in pids.lines() {
            assert!(!Path::new("/proc").join(pid).exists(), "process {pid} is still there");
        }
        assert!(ended(exits[1].clone()).await.status.contains("signal: 9"));
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_told() {
        let started = Processes::start(&["/no/such/program".into()], &["/x".into()]).await;
        assert_eq!(started.err().unwrap().kind(), io::ErrorKind::NotFound);
    }
}

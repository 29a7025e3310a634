//! A real server for a test: the binary, started and stopped.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// How long a small checkpoint may take to be ready on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a server may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(40);
/// The unit of times in `/proc`, on every architecture that Linux has today.
const TICKS_PER_SECOND: u64 = 100;

/// A running `lockstep serve`. Dropping it kills it.
pub struct Server {
    child: Child,
    address: String,
    output: Arc<Mutex<String>>,
}

/// What a server that ended left behind.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it printed, on both streams.
    pub output: String,
}

impl Server {
    /// Starts `lockstep serve` on a free port with `arguments`, and waits until it is ready.
    ///
    /// # Errors
    /// When it ends or takes too long before it is ready; the error holds what it printed.
    pub fn start(model: &Path, arguments: &[&str]) -> anyhow::Result<Server> {
        Self::start_in(&[], model, arguments)
    }

    /// The same with variables in its environment.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_in(
        environment: &[(&str, &str)],
        model: &Path,
        arguments: &[&str],
    ) -> anyhow::Result<Server> {
        let mut server = Self::spawn(environment, model, arguments)?;
        let deadline = Instant::now() + START_TIMEOUT;
        while server.address.is_empty() {
            if let Some(address) = ready_address(&server.output()) {
                server.address = address;
            } else if let Some(status) = server.child.try_wait()? {
                bail!("the server ended with {status} before it was ready:\n{}", server.output());
            } else if Instant::now() > deadline {
                bail!("the server was not ready after {START_TIMEOUT:?}:\n{}", server.output());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Starts `lockstep serve` and waits until it ends by itself.
    ///
    /// # Errors
    /// When it cannot be started or does not end.
    pub fn run_to_end(model: &Path, arguments: &[&str]) -> anyhow::Result<Ended> {
        Self::run_to_end_in(&[], model, arguments)
    }

    /// The same with variables in its environment.
    ///
    /// # Errors
    /// As [`Server::run_to_end`].
    pub fn run_to_end_in(
        environment: &[(&str, &str)],
        model: &Path,
        arguments: &[&str],
    ) -> anyhow::Result<Ended> {
        let mut server = Self::spawn(environment, model, arguments)?;
        server.wait(START_TIMEOUT)
    }

    fn spawn(environment: &[(&str, &str)], model: &Path, arguments: &[&str]) -> anyhow::Result<Server> {
        let mut command = Command::new(binary()?);
        command.envs(environment.iter().copied());
        command.args(["serve", "--listen", "127.0.0.1:0", "--model"]).arg(model).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("starting lockstep serve")?;
        let output = Arc::new(Mutex::new(String::new()));
        collect(child.stdout.take(), &output);
        collect(child.stderr.take(), &output);
        Ok(Server { child, address: String::new(), output })
    }

    /// HOST:PORT to connect to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Process ids of its children, in no order; also of those that have ended and that it has not looked after yet.
    pub fn child_pids(&self) -> Vec<u32> {
        children(self.pid())
    }

    /// Process ids of the shards, in no order.
    pub fn shard_pids(&self) -> Vec<u32> {
        self.child_pids().into_iter().filter(|pid| has_verb(*pid, "shard")).collect()
    }

    /// Process ids of the children that are decoding videos now, in no order.
    pub fn decoder_pids(&self) -> Vec<u32> {
        self.child_pids().into_iter().filter(|pid| has_verb(*pid, "decode")).collect()
    }

    /// What it printed so far, on both streams.
    pub fn output(&self) -> String {
        self.output.lock().expect("no reader panics").clone()
    }

    /// Asks it to stop (SIGTERM) and waits.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(mut self) -> anyhow::Result<Ended> {
        signal(self.pid(), "TERM")?;
        self.wait(STOP_TIMEOUT)
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it does not end within `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<Ended> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                // The readers see the end of the pipes a moment later.
                thread::sleep(Duration::from_millis(50));
                return Ok(Ended { code: status.code(), output: self.output() });
            }
            if Instant::now() > deadline {
                bail!("the server did not end within {timeout:?}:\n{}", self.output());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The binary of this build, `src/main.rs`.
///
/// # Errors
/// When the test does not run under cargo.
pub fn binary() -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("CARGO_BIN_EXE_lockstep-tests").context("run the tests with `cargo test`")?;
    Ok(path.into())
}

/// Another binary of the tests: `src/bin/NAME.rs`.
///
/// # Errors
/// When the test does not run under cargo.
pub fn other_binary(name: &str) -> anyhow::Result<String> {
    std::env::var(format!("CARGO_BIN_EXE_{name}")).context("run the tests with `cargo test`")
}

/// Sends a signal by name.
///
/// # Errors
/// When the process is gone.
pub fn signal(pid: u32, name: &str) -> anyhow::Result<()> {
    let status = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status()?;
    anyhow::ensure!(status.success(), "kill -{name} {pid}: {status}");
    Ok(())
}

/// Resident memory of a process that is its own (`RssAnon`).
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Time that all threads of a process have spent on processors, its children's not counted.
///
/// # Errors
/// When the process is gone.
pub fn processor_time(pid: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, in parentheses, may have anything in it.
    let (_, fields) = stat.rsplit_once(')').context("a name")?;
    let ticks =
        |index| fields.split_whitespace().nth(index).and_then(|ticks: &str| ticks.parse::<u64>().ok());
    let (user, system) = ticks(11).zip(ticks(12)).context("times")?;
    Ok(Duration::from_millis((user + system) * 1000 / TICKS_PER_SECOND))
}

/// Whether a process is running (a zombie is not).
pub fn is_running(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    !status.is_empty() && !status.lines().any(|line| line.starts_with("State:\tZ"))
}

fn has_verb(pid: u32, verb: &str) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|argument| argument == verb.as_bytes())
}

fn children(parent: u32) -> Vec<u32> {
    let Ok(folders) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = folders.filter_map(|folder| folder.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let is_child = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line == format!("PPid:\t{parent}"))
    };
    pids.filter(is_child).collect()
}

fn collect(stream: Option<impl std::io::Read + Send + 'static>, output: &Arc<Mutex<String>>) {
    let (stream, output) = (stream.expect("the stream is piped"), output.clone());
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let mut output = output.lock().expect("no reader panics");
            output.push_str(&line);
            output.push('\n');
        }
    });
}

fn ready_address(output: &str) -> Option<String> {
    let line = output.lines().find(|line| line.starts_with("ready: "))?;
    Some(line.split_whitespace().nth(1)?.to_owned())
}

//! Ranks as processes of their own: the emulation runs one kernel of a process at a time, and kernels of ranks that read one
//! another's memory wait for one another.
//!
//! The other process is this program again, which then runs one of the ignored tests of `peers.rs`.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use super::libraries;

/// How long a rank's words are waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// What stands before what a rank says.
const MARK: &str = "rank says: ";

const RANK: &str = "LOCKSTEP_TEST_RANK";
const WORLD_SIZE: &str = "LOCKSTEP_TEST_WORLD_SIZE";
const FOLDER: &str = "LOCKSTEP_TEST_FOLDER";

/// What a process of a test is told at its start.
pub struct Place {
    pub rank: usize,
    pub world_size: usize,
    /// Where files of the ranks are.
    pub folder: PathBuf,
}

impl Place {
    /// None where a test is not run as a rank's process.
    pub fn of_this_process() -> Option<Self> {
        let number = |name| env::var(name).ok()?.parse().ok();
        let folder = env::var_os(FOLDER)?.into();
        Some(Self { rank: number(RANK)?, world_size: number(WORLD_SIZE)?, folder })
    }
}

/// A rank's process. Killed when it is dropped.
pub struct Process {
    child: Child,
    words: Receiver<String>,
    ears: ChildStdin,
}

impl Process {
    /// Runs the ignored test of this name as a rank, with further settings.
    pub fn start(
        test: &str,
        rank: usize,
        world_size: usize,
        folder: &Path,
        settings: &[(&str, &str)],
    ) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env("LD_LIBRARY_PATH", libraries::folder())
            .env(RANK, rank.to_string())
            .env(WORLD_SIZE, world_size.to_string())
            .env(FOLDER, folder)
            .envs(settings.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, words) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                match line.strip_prefix(MARK) {
                    Some(said) if tell.send(said.to_owned()).is_err() => return,
                    Some(_) => {}
                    None => println!("rank {rank}: {line}"),
                }
            }
        });
        let ears = child.stdin.take().unwrap();
        Self { child, words, ears }
    }

    /// The next words of the rank.
    pub fn hear(&self) -> String {
        self.words.recv_timeout(PATIENCE).expect("the rank says something")
    }

    /// Tells the rank to go on.
    pub fn tell(&mut self) {
        self.ears.write_all(b"\n").unwrap();
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub fn end(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says something to the test, from a rank.
pub fn say(what: &str) {
    println!("\n{MARK}{what}");
}

/// Waits until the test says to go on.
pub fn wait_for_word() {
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

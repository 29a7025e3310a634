//! The verb `confine`: a process that gives up what a decoder does not take, and becomes a program of others.
//!
//! It reads nothing. It writes [`READY`] to standard output, with what is in force, and is then the program, with the same
//! standard streams; or [`BROKEN`] and why not.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, exit};

use clap::Args;

use super::child::{BROKEN, READY, say};
use super::confine::{Bounds, confine_program};

/// How a process ends that was ready and could not become the program, as shells have it.
pub(super) const NOT_STARTED: i32 = 127;

/// What to become, and within what.
#[derive(Args, Clone, Debug)]
pub struct ConfineArgs {
    /// The process that must live for as long as this one
    #[arg(long)]
    pub(super) parent: u32,
    /// Address space
    #[arg(long)]
    pub(super) memory_bytes: u64,
    /// Time of a processor
    #[arg(long)]
    pub(super) cpu_seconds: u64,
    /// The program, as an absolute path without links, and its arguments
    #[arg(last = true, required = true)]
    pub(super) command: Vec<OsString>,
}

impl ConfineArgs {
    /// The arguments that are read as these, behind the name of the verb.
    pub(super) fn to_arguments(&self) -> Vec<OsString> {
        let Self { parent, memory_bytes, cpu_seconds, command } = self;
        let bounds =
            format!("confine --parent {parent} --memory-bytes {memory_bytes} --cpu-seconds {cpu_seconds} --");
        bounds.split(' ').map(OsString::from).chain(command.iter().cloned()).collect()
    }
}

/// Becomes a program that is confined, and returns only if it does not get so far.
///
/// # Errors
/// A limit or a layer that cannot be put in force, or nobody to tell that they are.
pub fn confine_and_become(args: &ConfineArgs) -> io::Result<()> {
    let mut output = io::stdout().lock();
    let (program, arguments) = args.command.split_first().ok_or_else(|| io::Error::other("no program"))?;
    let bounds =
        Bounds { parent: args.parent, memory_bytes: args.memory_bytes, cpu_seconds: args.cpu_seconds };
    let layers = match confine_program(bounds, Path::new(program)) {
        Ok(layers) => layers,
        Err(error) => {
            say(&mut output, BROKEN, &error.to_string())?;
            output.flush()?;
            return Err(error);
        }
    };
    output.write_all(&[READY])?;
    output.write_all(&layers.to_bytes())?;
    output.flush()?;
    let error = Command::new(program).args(arguments).exec();
    eprintln!("lockstep: {}: {error}", Path::new(program).display());
    exit(NOT_STARTED)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Verb {
        #[command(flatten)]
        args: ConfineArgs,
    }

    #[test]
    fn arguments_travel() {
        let command = ["/bin/ffmpeg", "--parent", "-i", "-", "--"].map(OsString::from).to_vec();
        let args = ConfineArgs { parent: 7, memory_bytes: u64::MAX, cpu_seconds: 9, command };
        let read = Verb::try_parse_from(args.to_arguments()).unwrap().args;
        assert_eq!(format!("{read:?}"), format!("{args:?}"));
    }
}

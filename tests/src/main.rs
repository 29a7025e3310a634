//! The binary that the end-to-end tests start: `lockstep` under another name. Cargo builds a package's own binaries for its tests, and
//! not those of its dependencies; without this one, tests could run against a binary of another build, or none.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    lockstep::cli::main()
}

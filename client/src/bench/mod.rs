//! The verb `bench`: how fast a server answers.

mod args;
mod beside;
mod prompt;
mod report;
mod run;
#[cfg(test)]
mod tests;

pub use args::BenchArgs;
pub use run::bench;

//! The verb `ask`: a question about pictures and videos from the command line, answered in the terminal.

mod args;
mod media;
mod run;
mod summary;
#[cfg(test)]
mod tests;

pub use args::AskArgs;
pub(crate) use args::seconds;
pub use run::ask;
pub(crate) use run::connect;

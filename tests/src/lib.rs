//! What the end-to-end tests share: a real server, and the reference's answers.

pub mod golden;
pub mod server;

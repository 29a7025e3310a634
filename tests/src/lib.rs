//! What the end-to-end tests share: a real server, the reference's answers, and a client that leaves deadlines to the server.

pub mod golden;
pub mod hostile;
pub mod server;
pub mod untimed;

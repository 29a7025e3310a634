//! What the end-to-end tests share: a real server, the reference's answers, input that nobody should send, and clients that leave
//! deadlines to the server or do what no client should.

pub mod beside;
pub mod golden;
pub mod hostile;
pub mod raw;
pub mod server;
pub mod untimed;
pub mod uploads;

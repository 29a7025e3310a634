//! A Rust client of Lockstep.

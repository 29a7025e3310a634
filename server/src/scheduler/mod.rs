//! The scheduler: a pure, synchronous state machine over sequences, blocks and features.

//! Checkpoints: reading the slices of a rank.

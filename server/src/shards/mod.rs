//! The group of shards: starting, loading, and running steps on all ranks together.

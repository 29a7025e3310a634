//! From tokens back to text: incremental detokenization and stop strings.

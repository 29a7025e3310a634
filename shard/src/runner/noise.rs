//! Gumbel noise keyed by seed, branch, position and token.

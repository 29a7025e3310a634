//! What the largest calls are, which memory is planned for.

use super::attention::{MAX_SPLITS, StepWords};
use super::candidates::{RETURNED_BYTES, sampling_bytes};
use super::cublas_lt;
use super::peers::Exchange;
use super::staging::Staging;
use crate::device::KV_BLOCK_TOKENS;

/// Bytes that a slot of the staging ring has at least.
const MIN_SLOT_BYTES: usize = 4 << 20;

/// Bytes that reservations of the GPU's memory are rounded up to.
const BUFFER_UNIT: usize = 512;

/// Bytes of the GPU that a buffer takes.
pub fn buffer_bytes(bytes: usize) -> usize {
    bytes.next_multiple_of(BUFFER_UNIT)
}

/// Bytes of the GPU that a matrix of weights takes, with its bias.
pub fn linear_bytes(outputs: usize, inputs: usize, has_bias: bool) -> usize {
    let bias = if has_bias { outputs * size_of::<f32>() } else { 0 };
    buffer_bytes(outputs * inputs * size_of::<half::bf16>()) + buffer_bytes(bias)
}

/// Sizes of the largest calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Number of ranks.
    pub world_size: usize,
    /// The most tokens that one step computes.
    pub max_step_tokens: usize,
    /// The most sequences in one step.
    pub max_step_sequences: usize,
    /// The most tokens of one sequence.
    pub max_context_tokens: usize,
    /// The most query heads that share keys and values.
    pub most_sharing: usize,
    /// Query heads.
    pub num_query: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Tokens of the rank's slice of the vocabulary, at most.
    pub num_ids: usize,
    /// Bytes of the pixels of the largest temporal patch.
    pub frame_bytes: usize,
}

impl Sizes {
    /// Bytes of a slot of the staging ring: one holds the rows of a step.
    pub fn slot_bytes(&self) -> usize {
        self.step_bytes().max(MIN_SLOT_BYTES)
    }

    /// Bytes of what the rows of a step are.
    pub fn step_bytes(&self) -> usize {
        let blocks = self.max_context_tokens.div_ceil(KV_BLOCK_TOKENS);
        let rows = self.max_step_tokens;
        StepWords::max_words(rows, self.max_step_sequences, blocks, self.most_sharing) * size_of::<u32>()
    }

    /// The most pairs of words that are put at once.
    pub fn max_pairs(&self) -> usize {
        self.slot_bytes() / (2 * size_of::<u32>())
    }

    /// Bytes of the GPU that its device takes beside weights, caches and workspace.
    pub fn device_bytes(&self) -> usize {
        Staging::bytes(self.slot_bytes())
            + self.step_bytes()
            + self.frame_bytes
            + split_bytes(self.num_query, self.head_dim)
            + sampling_bytes(self.num_ids)
            + cublas_lt::WORKSPACE_BYTES
            + if self.world_size > 1 { Exchange::bytes() } else { 0 }
    }

    /// Bytes of the host that its device pins.
    pub fn pinned_bytes(&self) -> usize {
        Staging::bytes(self.slot_bytes()) + 3 * RETURNED_BYTES
    }
}

/// Bytes of what the splits of contexts give.
pub fn split_bytes(num_query: usize, head_dim: usize) -> usize {
    MAX_SPLITS * num_query * (head_dim + 2) * size_of::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_group_share_memory_and_one_alone_does_not() {
        let alone = Sizes {
            world_size: 1,
            max_step_tokens: 64,
            max_step_sequences: 8,
            max_context_tokens: 128,
            most_sharing: 1,
            num_query: 1,
            head_dim: 64,
            num_ids: 64,
            frame_bytes: 0,
        };
        let rank = Sizes { world_size: 2, ..alone };
        assert_eq!(rank.device_bytes() - alone.device_bytes(), Exchange::bytes());
        assert_eq!(Exchange::bytes(), 4 << 20);
    }
}

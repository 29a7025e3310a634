//! What the largest calls are, which memory is planned for.

use thiserror::Error;

use super::attention::{Sharing, StepWords, max_pieces};
use super::candidates::{RETURNED_BYTES, RETURNED_PLACES, sampling_bytes};
use super::cublas_lt;
use super::group::HOST_SUMS_BYTES;
use super::hash::HASH_BYTES;
use super::peers::Exchange;
use super::pixels::LEVELS_BYTES;
use super::staging::{DOWNLOAD_BYTES, Staging};
use crate::device::KV_BLOCK_TOKENS;

/// Bytes that a slot of the staging ring has at least.
const MIN_SLOT_BYTES: usize = 4 << 20;

/// Bytes that the rows of a step may be. There is room for them five times on the GPU and four times on the host, and a step that has
/// so many sends them all.
const MAX_STEP_BYTES: usize = 256 << 20;

/// What the driver gives of the GPU's memory: an allocation has whole pages. Small ones may share one; no plan counts on that.
pub const PAGE_BYTES: usize = 2 << 20;

/// What the host pins is whole pages, too.
const HOST_PAGE_BYTES: usize = 4 << 10;

/// Bytes of the GPU that an allocation takes.
pub fn allocation_bytes(bytes: usize) -> usize {
    bytes.next_multiple_of(PAGE_BYTES)
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
    /// Heads of keys and values.
    pub num_kv: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Tokens of the rank's slice of the vocabulary, at most.
    pub num_ids: usize,
    /// Bytes of the pixels of the largest temporal patch.
    pub frame_bytes: usize,
}

/// Rows and block tables of a step that would be too many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "a step of {tokens} tokens and {sequences} sequences, each of up to {context_tokens} tokens in blocks of \
     {KV_BLOCK_TOKENS}, would bring {bytes} bytes of rows and block tables to the GPU, and may bring {MAX_STEP_BYTES}: \
     --max-running or --max-context-tokens is too large"
)]
pub struct StepTooLarge {
    /// Tokens that it computes.
    pub tokens: usize,
    /// Sequences in it.
    pub sequences: usize,
    /// Tokens of each.
    pub context_tokens: usize,
    /// Bytes of what its rows are.
    pub bytes: usize,
}

impl Sizes {
    /// Checks that the GPU can be told what the rows of the largest step are.
    ///
    /// # Errors
    /// They are too many bytes.
    pub fn check(&self) -> Result<(), StepTooLarge> {
        let bytes = self.step_bytes();
        if bytes <= MAX_STEP_BYTES {
            return Ok(());
        }
        Err(StepTooLarge {
            tokens: self.max_step_tokens,
            sequences: self.max_step_sequences,
            context_tokens: self.max_context_tokens,
            bytes,
        })
    }

    /// Bytes of a slot of the staging ring: one holds the rows of a step.
    pub fn slot_bytes(&self) -> usize {
        self.step_bytes().max(MIN_SLOT_BYTES)
    }

    /// Bytes of what the rows of a step are.
    pub fn step_bytes(&self) -> usize {
        let blocks = self.max_context_tokens.div_ceil(KV_BLOCK_TOKENS);
        let rows = self.max_step_tokens;
        let Sizes { most_sharing, max_step_sequences, .. } = *self;
        let sharing =
            Sharing { num_kv: self.least_kv(), most_sharing, max_pieces: self.max_pieces(), is_wide: true };
        StepWords::max_words(rows, max_step_sequences, blocks, sharing) * size_of::<u32>()
    }

    /// Pieces of contexts that there is room for.
    pub fn max_pieces(&self) -> usize {
        max_pieces(self.max_step_sequences, self.max_context_tokens, self.least_kv())
    }

    /// Heads of keys and values that there are at least.
    fn least_kv(&self) -> usize {
        self.num_query.div_ceil(self.most_sharing)
    }

    /// The most pairs of words that are put at once.
    pub fn max_pairs(&self) -> usize {
        self.slot_bytes() / (2 * size_of::<u32>())
    }

    /// Bytes of each of the two buffers of what the pieces of contexts give.
    pub fn piece_bytes(&self, num_query: usize) -> [usize; 2] {
        [self.head_dim, 2].map(|columns| self.max_pieces() * num_query * columns * size_of::<f32>())
    }

    /// Bytes of the GPU that its device takes beside weights, caches, workspace and graphs.
    pub fn device_bytes(&self) -> usize {
        let heads_bytes = (self.num_kv + 1) * size_of::<u32>();
        let exchange_bytes = if self.world_size > 1 { Exchange::bytes() } else { 0 };
        let others = [
            self.step_bytes(),
            self.frame_bytes,
            LEVELS_BYTES,
            heads_bytes,
            exchange_bytes,
            cublas_lt::WORKSPACE_BYTES,
        ];
        let all = Staging::bytes(self.slot_bytes())
            .into_iter()
            .chain(self.piece_bytes(self.num_query))
            .chain(sampling_bytes(self.num_ids))
            .chain(HASH_BYTES)
            .chain(others);
        all.map(allocation_bytes).sum()
    }

    /// Bytes of the host that its device pins: through them goes what is copied to the GPU and back.
    pub fn pinned_bytes(&self) -> usize {
        // Sums go through the host where they can by no other way. Words are shared with kernels.
        let of_group = if self.world_size > 1 { HOST_SUMS_BYTES[0] + HOST_PAGE_BYTES } else { 0 };
        let all = Staging::bytes(self.slot_bytes())
            .into_iter()
            .chain([RETURNED_BYTES; RETURNED_PLACES])
            .chain([DOWNLOAD_BYTES, HASH_BYTES[1], of_group]);
        all.map(|bytes| bytes.next_multiple_of(HOST_PAGE_BYTES)).sum()
    }

    /// Bytes of the host that its device works in, beside those.
    pub fn host_bytes(&self) -> usize {
        if self.world_size > 1 { HOST_SUMS_BYTES[1] } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Sizes = Sizes {
        world_size: 1,
        max_step_tokens: 64,
        max_step_sequences: 8,
        max_context_tokens: 128,
        most_sharing: 1,
        num_query: 1,
        num_kv: 1,
        head_dim: 64,
        num_ids: 64,
        frame_bytes: 0,
    };

    #[test]
    fn ranks_of_a_group_share_memory_and_one_alone_does_not() {
        let rank = Sizes { world_size: 2, ..ALONE };
        assert_eq!(rank.device_bytes() - ALONE.device_bytes(), Exchange::bytes());
        assert_eq!(Exchange::bytes(), 4 << 20);
        assert_eq!(rank.pinned_bytes() - ALONE.pinned_bytes(), (1 << 20) + HOST_PAGE_BYTES);
    }

    #[test]
    fn a_step_is_bounded_whatever_is_asked_for() {
        let long = Sizes { max_context_tokens: 1 << 20, max_step_sequences: 256, ..ALONE };
        assert_eq!(long.check(), Ok(()));
        // All that a request to load may ask for.
        let largest =
            Sizes { max_step_tokens: 1 << 17, max_step_sequences: 1 << 14, most_sharing: 1 << 10, ..long };
        let words = largest.check().expect_err("too large").to_string();
        let bytes = largest.step_bytes();
        assert!(bytes > 4 << 29, "{bytes}");
        for part in ["131072 tokens", "16384 sequences", "up to 1048576 tokens", &format!("{bytes} bytes")] {
            assert!(words.contains(part), "{part} in {words}");
        }
    }
}

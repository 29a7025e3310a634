//! Who owns what: pure rules that split heads, columns and vocabulary over ranks.
//!
//! They work for every world size: sizes that do not divide are split unevenly, and a rank may own nothing.

use std::ops::Range;

use crate::device::{AttentionHeads, LINEAR_UNIT};

/// Which rank this is, among how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parallel {
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
}

/// The query heads of a rank, and the heads of keys and values that they need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadRange {
    /// Query heads, of the whole model.
    pub query: Range<usize>,
    /// Heads of keys and values, of the whole model.
    pub kv: Range<usize>,
}

impl HeadRange {
    /// The same, as the device wants it.
    pub fn attention_heads(&self, num_query: usize, num_kv: usize, head_dim: usize) -> AttentionHeads {
        let group = num_query / num_kv;
        let kv_of_query = self.query.clone().map(|head| head / group - self.kv.start).collect();
        AttentionHeads { kv_of_query, num_kv: self.kv.len(), head_dim }
    }
}

/// The heads of each rank.
///
/// Every rank gets a contiguous range of query heads, of the floor or the ceiling of the mean, and keeps the
/// heads of keys and values that these need. Which ranks get one more is chosen by trying all: the fewest
/// heads of keys and values on the fullest rank (this bounds the cache), then the fewest in all, then the
/// larger ranges first. 28 query heads in 4 groups on 8 ranks become 4, 3, 4, 3, 4, 3, 4, 3: no range crosses
/// a group, and each rank keeps one head of keys and values.
pub fn heads(num_query: usize, num_kv: usize, world_size: usize) -> Vec<HeadRange> {
    let group = num_query / num_kv;
    let (base, larger) = (num_query / world_size, num_query % world_size);
    (0u32..1 << world_size)
        .filter(|chosen| chosen.count_ones() as usize == larger)
        .map(|chosen| {
            let mut start = 0;
            let ranges: Vec<HeadRange> = (0..world_size)
                .map(|rank| {
                    let end = start + base + ((chosen >> rank) & 1) as usize;
                    let query = start..end;
                    start = end;
                    let kv = if query.is_empty() { 0..0 } else { query.start / group..(end - 1) / group + 1 };
                    HeadRange { query, kv }
                })
                .collect();
            let most = ranges.iter().map(|range| range.kv.len()).max();
            let total: usize = ranges.iter().map(|range| range.kv.len()).sum();
            (most, total, chosen.reverse_bits(), ranges)
        })
        .min_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)).then(b.2.cmp(&a.2)))
        .map(|(.., ranges)| ranges)
        .unwrap_or_default()
}

/// A rank's part of columns that are padded with zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnRange {
    /// Columns, of the whole matrix.
    pub cols: Range<usize>,
    /// Columns with padding: a multiple of [`LINEAR_UNIT`].
    pub padded: usize,
}

/// A rank's part of `num_cols` columns: whole units of [`LINEAR_UNIT`], of which the first ranks get one more
/// where they do not divide.
pub fn columns(num_cols: usize, parallel: Parallel) -> ColumnRange {
    let units = num_cols.div_ceil(LINEAR_UNIT);
    let (base, larger) = (units / parallel.world_size, units % parallel.world_size);
    let first = |rank: usize| rank * base + rank.min(larger);
    let (start, end) = (first(parallel.rank), first(parallel.rank + 1));
    let cols = (start * LINEAR_UNIT).min(num_cols)..(end * LINEAR_UNIT).min(num_cols);
    ColumnRange { cols, padded: (end - start) * LINEAR_UNIT }
}

/// A rank's part of the vocabulary. All ranks have as many columns of logits, so that gathers are of equal
/// counts; the last ones may hold padding only.
pub fn vocabulary(vocab_size: usize, parallel: Parallel) -> ColumnRange {
    let padded = vocab_size.div_ceil(parallel.world_size).next_multiple_of(LINEAR_UNIT);
    let first = |rank: usize| (rank * padded).min(vocab_size);
    ColumnRange { cols: first(parallel.rank)..first(parallel.rank + 1), padded }
}

/// A rank's part of `num_rows` rows of activations.
pub fn rows(num_rows: usize, parallel: Parallel) -> Range<usize> {
    let first = |rank: usize| num_rows * rank / parallel.world_size;
    first(parallel.rank)..first(parallel.rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(world_size: usize) -> impl Iterator<Item = Parallel> {
        (0..world_size).map(move |rank| Parallel { rank, world_size })
    }

    fn sizes(heads: &[HeadRange]) -> Vec<(usize, usize)> {
        heads.iter().map(|range| (range.query.len(), range.kv.len())).collect()
    }

    #[test]
    fn twenty_eight_heads_on_eight_ranks_keep_to_their_groups() {
        assert_eq!(sizes(&heads(28, 4, 8)), [(4, 1), (3, 1), (4, 1), (3, 1), (4, 1), (3, 1), (4, 1), (3, 1)]);
        assert_eq!(sizes(&heads(28, 4, 4)), [(7, 1); 4]);
        // Three ranks: 28 = 10 + 9 + 9, and no choice avoids that a rank needs two groups.
        assert_eq!(sizes(&heads(28, 4, 3)).iter().map(|size| size.1).max(), Some(2));
    }

    #[test]
    fn ranks_without_heads_are_the_last() {
        assert_eq!(sizes(&heads(3, 3, 8))[2..], [(1, 1), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)]);
        assert_eq!(sizes(&heads(7, 1, 8))[6..], [(1, 1), (0, 0)]);
    }

    #[test]
    fn heads_cover_everything_once_and_have_their_keys() {
        for (num_query, num_kv) in [(28, 4), (7, 1), (4, 2), (16, 2), (40, 8), (64, 8), (3, 3), (16, 16)] {
            for world_size in 1..=8 {
                let heads = heads(num_query, num_kv, world_size);
                assert_eq!(heads.len(), world_size);
                let mut next = 0;
                for range in &heads {
                    assert_eq!(range.query.start, next);
                    next = range.query.end;
                    assert!(range.query.len().abs_diff(num_query / world_size) <= 1);
                    let attention = range.attention_heads(num_query, num_kv, 8);
                    assert_eq!(attention.num_query(), range.query.len());
                    assert!(attention.kv_of_query.is_sorted());
                    assert!(attention.kv_of_query.iter().all(|&kv| kv < attention.num_kv));
                    for (query, kv) in range.query.clone().zip(&attention.kv_of_query) {
                        assert_eq!(query / (num_query / num_kv), range.kv.start + kv);
                    }
                }
                assert_eq!(next, num_query);
            }
        }
    }

    #[test]
    fn columns_are_units_and_cover_everything_once() {
        for num_cols in [18944, 11008, 3420, 3456, 342, 128, 17, 16, 1] {
            for world_size in 1..=8 {
                let mut next = 0;
                for parallel in ranks(world_size) {
                    let range = columns(num_cols, parallel);
                    assert_eq!(range.cols.start, next);
                    next = range.cols.end;
                    assert!(range.cols.len() <= range.padded && range.padded.is_multiple_of(LINEAR_UNIT));
                    assert!(range.padded - range.cols.len() < LINEAR_UNIT);
                }
                assert_eq!(next, num_cols);
            }
        }
        let padded: Vec<_> = ranks(8).map(|parallel| columns(342, parallel).padded).collect();
        assert_eq!(padded, [48, 48, 48, 48, 48, 48, 32, 32]);
    }

    #[test]
    fn vocabulary_is_gathered_in_equal_counts() {
        for vocab_size in [152_064, 151_936, 1000, 151_665, 17] {
            for world_size in 1..=8 {
                let parts: Vec<_> =
                    ranks(world_size).map(|parallel| vocabulary(vocab_size, parallel)).collect();
                assert!(parts.iter().all(|part| part.padded == parts[0].padded));
                assert_eq!(parts.iter().map(|part| part.cols.len()).sum::<usize>(), vocab_size);
                assert!(parts.iter().all(|part| part.cols.len() <= part.padded));
            }
        }
        assert_eq!(
            vocabulary(17, Parallel { rank: 2, world_size: 8 }),
            ColumnRange { cols: 17..17, padded: 16 }
        );
    }

    #[test]
    fn rows_are_shared_out_evenly() {
        let parts: Vec<_> = ranks(3).map(|parallel| rows(10, parallel)).collect();
        assert_eq!(parts, [0..3, 3..6, 6..10]);
    }
}

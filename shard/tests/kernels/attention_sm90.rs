//! `attention_sm90.cu`.

use anyhow::Result;
use half::bf16;

use super::{
    attention::{Paged, PagedCase, Windows, scale},
    emulator::{Launch, Program, Source},
    gpu::is_beside_hopper,
    numbers::{compare, unwritten},
};

/// Rows of a block, and tokens that it goes over at a time, where all of it has the same queries' context and where it has windows.
const WIDE: usize = 128;
const WINDOW: usize = 64;

/// Dynamic shared memory of blocks of so many rows.
fn shared_bytes(rows: usize, head_dim: usize) -> usize {
    14 * rows * head_dim + 1024
}

impl Paged<'_> {
    fn sm90(&self, case: &PagedCase, program: &Program, seed: u64) -> Result<Vec<bf16>> {
        let tiles = self.tiles(WIDE);
        let grid = [tiles.len() / 2, self.sharing.len(), 1];
        let mut outputs =
            Launch::new(format!("sm90_paged_attention_{}", self.head_dim), grid, 2 * WIDE, seed)
                .dynamic_shared_bytes(shared_bytes(WIDE, self.head_dim))
                .input(&case.qkv)
                .input(&case.cache)
                .input(&case.block_tables)
                .input(&case.sequences)
                .input(&tiles)
                .input(&case.query_offsets)
                .u32(self.num_query())
                .u32(self.sharing.len())
                .f32(scale(self.head_dim))
                .output(&unwritten(case.expected.len()))
                .run(program)?;
        Ok(outputs.take())
    }

    fn check_sm90(&self, program: &Program, seed: u64) -> Result<()> {
        let what = format!(
            "heads of {}, {:?} queries sharing, sequences {:?}",
            self.head_dim, self.sharing, self.sequences
        );
        let case = self.case(seed);
        compare(&what, &self.sm90(&case, program, seed)?, &case.expected, |i| case.tolerance[i])
    }
}

impl Windows<'_> {
    fn check_sm90(&self, kernel: &str, tile_rows: usize, program: &Program, seed: u64) -> Result<()> {
        let case = self.case(tile_rows, seed);
        let grid = [case.tiles.len() / 4, self.num_heads, 1];
        let mut outputs =
            Launch::new(format!("sm90_{kernel}_attention_{}", self.head_dim), grid, 2 * tile_rows, seed)
                .dynamic_shared_bytes(shared_bytes(tile_rows, self.head_dim))
                .input(&case.qkv)
                .input(&case.tiles)
                .u32(self.rows.start)
                .f32(scale(self.head_dim))
                .output(&vec![bf16::ZERO; case.expected.len()])
                .run(program)?;
        self.compare(&case, &outputs.take::<bf16>())
    }
}

/// One head width over contexts that end before, at and after the ends of tiles, from their beginning and in chunks.
pub fn check_paged(program: &Program, head_dim: usize, seed: u64) -> Result<()> {
    for (sharing, sequences) in [
        (&[7][..], &[(10, 0), (12, 118)][..]),
        (&[3, 2][..], &[(1, 0), (60, 67), (30, 98), (45, 84)][..]),
        (&[1][..], &[(130, 300)][..]),
    ] {
        Paged { head_dim, sharing, sequences, split_tokens: 0, run_tokens: 0 }.check_sm90(program, seed)?;
    }
    Ok(())
}

/// Windows of vision, of some of whose rows the queries attend: by the kernel for windows, and by the one for wide ones.
pub fn check_vision(program: &Program, head_dim: usize, seed: u64) -> Result<()> {
    for (num_heads, cu_seqlens, rows) in
        [(2, &[0, 1, 17, 81, 145, 148][..], 0..148), (1, &[0, 100][..], 33..90), (1, &[5, 9][..], 0..12)]
    {
        let windows = Windows { head_dim, num_heads, cu_seqlens, rows };
        windows.check_sm90("window", WINDOW, program, seed)?;
        windows.check_sm90("vision", WIDE, program, seed)?;
    }
    let windows = Windows { head_dim, num_heads: 1, cu_seqlens: &[0, 300, 428], rows: 0..428 };
    windows.check_sm90("vision", WIDE, program, seed)
}

#[test]
fn paged_attention_goes_over_tiles_that_warpgroups_share() {
    if is_beside_hopper() {
        return;
    }
    for head_dim in [32, 64, 80, 128] {
        check_paged(Program::of(Source::AttentionSm90), head_dim, head_dim as u64).unwrap();
    }
}

#[test]
fn paged_attention_of_warpgroups_has_the_shapes_of_the_models() {
    if is_beside_hopper() {
        return;
    }
    for (sharing, sequences) in [
        (&[7; 4][..], &[(40, 3), (20, 120), (9, 1000)][..]),
        (&[8][..], &[(32, 224)][..]),
        (&[2, 2][..], &[(70, 700)][..]),
    ] {
        let call = Paged { head_dim: 128, sharing, sequences, split_tokens: 0, run_tokens: 0 };
        call.check_sm90(Program::of(Source::AttentionSm90), 3).unwrap();
    }
}

#[test]
fn vision_of_warpgroups_attends_inside_windows() {
    if is_beside_hopper() {
        return;
    }
    for head_dim in [32, 64, 80, 128] {
        check_vision(Program::of(Source::AttentionSm90), head_dim, 1).unwrap();
    }
}

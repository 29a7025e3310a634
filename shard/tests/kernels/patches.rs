//! `patches.cu`.

use anyhow::Result;
use half::bf16;

use super::{
    emulator::{Launch, Program, Source},
    numbers::{Numbers, same_bits, unwritten},
};

const BLOCK: usize = 256;

/// Every pixel, where it belongs; frames that are missing are the last one.
pub fn check(program: &Program, seed: u64) -> Result<()> {
    for ([t, h, w], num_frames, size, temporal) in [
        ([1, 2, 3], 1, 3, 2),
        ([2, 4, 2], 4, 3, 2),
        ([2, 2, 2], 3, 14, 2),
        ([2, 2, 2], 1, 3, 2),
        ([1, 2, 2], 1, 14, 1),
    ] {
        let mut numbers = Numbers::new(seed);
        let (height, width) = (h * size, w * size);
        let pixels = numbers.u8(num_frames * height * width * 3);
        let levels = numbers.bf16(3 * 256, 1.0);
        let order = numbers.order(t * h * w);
        let patch_len = 3 * temporal * size * size;
        let mut outputs = Launch::new("patches", [order.len(), 1, 1], BLOCK, seed)
            .input(&pixels)
            .u32(num_frames)
            .u32(h)
            .u32(w)
            .u32(size)
            .u32(temporal)
            .input(&levels)
            .input(&order)
            .output(&unwritten(order.len() * patch_len))
            .run(program)?;
        let mut expected: Vec<bf16> = Vec::new();
        for &patch in &order {
            let patch = patch as usize;
            let (time, top, left) = (patch / (h * w), patch / w % h * size, patch % w * size);
            for channel in 0..3 {
                for frame in 0..temporal {
                    let frame = (time * temporal + frame).min(num_frames - 1);
                    for y in top..top + size {
                        for x in left..left + size {
                            let pixel = pixels[((frame * height + y) * width + x) * 3 + channel];
                            expected.push(levels[channel * 256 + usize::from(pixel)]);
                        }
                    }
                }
            }
        }
        same_bits(&format!("{t} x {h} x {w} patches of {size}"), &outputs.take(), &expected)?;
    }
    Ok(())
}

#[test]
fn pixels_become_patches() {
    check(Program::of(Source::Patches), 1).unwrap();
}

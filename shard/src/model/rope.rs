//! Rotary tables: cosines and sines of the angles that queries and keys are turned by, computed on the host.
//!
//! Frequencies and angles are f32, as the reference has them: at large positions the rounding of the angle is
//! part of what the model was trained on.

use std::f64::consts::PI;

use crate::config::{TextConfig, Yarn};
use crate::device::{Device, Result};

/// `base^(-2i / dim)` for `i < dim / 2`, in the reference's steps of rounding.
fn inverse_frequencies(base: f64, dim: usize) -> Vec<f32> {
    (0..dim).step_by(2).map(|i| 1.0 / base.powf(f64::from(i as f32 / dim as f32)) as f32).collect()
}

/// YaRN's frequencies for heads of `dim` (Peng et al. 2023, section 3.2), in the reference's steps of rounding: what turns
/// often within the original context stays, what hardly turns is slowed down by the factor, a ramp lies between.
fn yarn_frequencies(base: f64, dim: usize, yarn: &Yarn) -> Vec<f32> {
    let original = yarn.original_max_position_embeddings as f64;
    // The frequency that turns so often within the original context, as a real-valued index.
    let turning = |times: f64| (dim as f64 * (original / (times * 2.0 * PI)).ln()) / (2.0 * base.ln());
    let (mut low, mut high) = (turning(yarn.beta_fast), turning(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min((dim - 1) as f64));
    if low == high {
        high += 0.001;
    }
    let fast = inverse_frequencies(base, dim).into_iter().enumerate();
    fast.map(|(i, fast)| {
        let wavelength = base.powf(f64::from((2 * i) as f32 / dim as f32)) as f32;
        let slow = 1.0 / (yarn.factor as f32 * wavelength);
        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let kept = 1.0 - ramp;
        slow * (1.0 - kept) + fast * kept
    })
    .collect()
}

/// Rows of a table that are computed on the host at a time: a large picture's whole table never stands there.
const HOST_ROWS: usize = 256;

/// Cosines and sines, `[rows, half a head]`, row-major.
pub struct RotaryTable {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
    /// Columns.
    pub half_dim: usize,
}

impl RotaryTable {
    /// Cosines and sines of angles, times `scale`.
    fn from_angles(half_dim: usize, scale: f32, angles: impl Iterator<Item = f32>) -> Self {
        let (sin, cos) = angles
            .map(|angle| {
                let (sin, cos) = f64::from(angle).sin_cos();
                (sin as f32 * scale, cos as f32 * scale)
            })
            .unzip();
        Self { cos, sin, half_dim }
    }
}

/// Computes the tables of rows at `positions` on the device, a few rows at a time: `(cos, sin)`, `[rows, half_dim]`.
fn tables_on<D: Device, P>(
    device: &D,
    half_dim: usize,
    positions: &[P],
    table: impl Fn(&[P]) -> RotaryTable,
) -> Result<(D::Tensor, D::Tensor)> {
    let empty = || device.empty(positions.len(), half_dim);
    let (mut cos, mut sin) = (empty()?, empty()?);
    for (i, piece) in positions.chunks(HOST_ROWS).enumerate() {
        let table = if D::WANTS_DATA {
            table(piece)
        } else {
            RotaryTable::from_angles(half_dim, 1.0, [].into_iter())
        };
        for (from, to) in [(&table.cos, &mut cos), (&table.sin, &mut sin)] {
            device.copy_rows(&device.upload(piece.len(), half_dim, from)?, to, i * HOST_ROWS)?;
        }
    }
    Ok((cos, sin))
}

/// M-RoPE: each frequency turns with one of time, height and width (Qwen2-VL paper, section 2.1).
pub struct MRope {
    /// For each frequency, its value and the axis that it turns with.
    frequencies: Vec<(f32, usize)>,
    /// What cosines and sines are multiplied by.
    attention_factor: f32,
}

impl MRope {
    /// Of the language model: `mrope_section` says how many frequencies belong to each axis, in turn; the sum is
    /// `head_dim / 2`.
    pub fn new(config: &TextConfig) -> Self {
        let sections = config.mrope_section.iter().enumerate();
        let axes = sections.flat_map(|(i, &len)| std::iter::repeat_n(i % 3, len));
        let (theta, head_dim) = (config.rope_theta, config.head_dim());
        let (frequencies, attention_factor) = match &config.yarn {
            None => (inverse_frequencies(theta, head_dim), 1.0),
            Some(yarn) => (yarn_frequencies(theta, head_dim, yarn), yarn.attention_factor as f32),
        };
        Self { frequencies: frequencies.into_iter().zip(axes).collect(), attention_factor }
    }

    /// The table of rows at `positions` (time, height, width).
    pub fn table(&self, positions: &[[u32; 3]]) -> RotaryTable {
        let angles = positions.iter().flat_map(|position| {
            self.frequencies.iter().map(|&(frequency, axis)| position[axis] as f32 * frequency)
        });
        RotaryTable::from_angles(self.frequencies.len(), self.attention_factor, angles)
    }

    /// The tables of rows at `positions`, on the device: `(cos, sin)`.
    pub fn tables<D: Device>(&self, device: &D, positions: &[[u32; 3]]) -> Result<(D::Tensor, D::Tensor)> {
        tables_on(device, self.frequencies.len(), positions, |piece| self.table(piece))
    }
}

/// The rotary embedding of the vision tower: the first half of the frequencies turns with the row, the
/// second, which is the same, with the column.
pub struct AxialRope {
    frequencies: Vec<f32>,
}

impl AxialRope {
    /// For heads of `head_dim`, a multiple of 4.
    pub fn new(theta: f64, head_dim: usize) -> Self {
        Self { frequencies: inverse_frequencies(theta, head_dim / 2) }
    }

    /// The table of patches at `positions` (row, column).
    pub fn table(&self, positions: &[[u32; 2]]) -> RotaryTable {
        self.of_coordinates(positions).of_positions(positions)
    }

    /// The tables of patches at `positions`, on the device: `(cos, sin)`.
    pub fn tables<D: Device>(&self, device: &D, positions: &[[u32; 2]]) -> Result<(D::Tensor, D::Tensor)> {
        let coordinates = self.of_coordinates(if D::WANTS_DATA { positions } else { &[] });
        tables_on(device, 2 * self.frequencies.len(), positions, |piece| coordinates.of_positions(piece))
    }

    /// What each coordinate up to the largest of `positions` turns by: many patches have few different ones.
    fn of_coordinates(&self, positions: &[[u32; 2]]) -> Coordinates {
        let end = positions.as_flattened().iter().max().map_or(0, |largest| largest + 1);
        let angles = (0..end).flat_map(|coordinate| {
            self.frequencies.iter().map(move |frequency| coordinate as f32 * frequency)
        });
        Coordinates(RotaryTable::from_angles(self.frequencies.len(), 1.0, angles))
    }
}

/// Cosines and sines of coordinates, one row for each.
struct Coordinates(RotaryTable);

impl Coordinates {
    fn of_positions(&self, positions: &[[u32; 2]]) -> RotaryTable {
        let Self(RotaryTable { cos, sin, half_dim: len }) = self;
        let rows = |of: &[f32]| -> Vec<f32> {
            let turns = positions
                .as_flattened()
                .iter()
                .flat_map(|&coordinate| &of[coordinate as usize * len..][..*len]);
            turns.copied().collect()
        };
        RotaryTable { cos: rows(cos), sin: rows(sin), half_dim: 2 * len }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::collective::Alone;
    use crate::config::Config;
    use crate::device::cpu::{CpuDevice, CpuOptions};
    use crate::progress::Progress;

    /// The smallest configuration of a language model with so wide heads.
    fn text_config(head_dim: usize, theta: f64, rope: &Value, max_position_embeddings: &Value) -> TextConfig {
        let config = json!({
            "architectures": [crate::config::ARCHITECTURE], "hidden_size": 2 * head_dim, "intermediate_size": 1,
            "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 200_000, "rope_theta": theta,
            "rope_scaling": rope, "max_position_embeddings": max_position_embeddings,
            "vision_config": {
                "depth": 32, "hidden_size": 4, "intermediate_size": 1, "num_heads": 1, "out_hidden_size": 2 * head_dim,
            },
        });
        Config::from_json(config.as_object().expect("an object")).expect("valid").text
    }

    #[test]
    fn frequencies_turn_with_their_axis() {
        let rope = json!({ "type": "mrope", "mrope_section": [2, 3, 3] });
        let rope = MRope::new(&text_config(16, 1e6, &rope, &json!(4096)));
        let table = rope.table(&[[5, 0, 0], [0, 7, 0], [0, 0, 9]]);
        for (row, (axis, position)) in [(0..2, 5.0), (2..5, 7.0), (5..8, 9.0)].into_iter().enumerate() {
            for i in 0..8 {
                let angle = if axis.contains(&i) { position * 1e6f64.powf(-(i as f64) / 8.0) } else { 0.0 };
                assert!((f64::from(table.cos[row * 8 + i]) - angle.cos()).abs() < 1e-5);
                assert!((f64::from(table.sin[row * 8 + i]) - angle.sin()).abs() < 1e-5);
            }
        }
    }

    /// What the reference makes of configurations: `make_yarn.py` says how.
    #[test]
    fn yarn_is_the_references() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/goldens/yarn.json");
        let golden = std::fs::read_to_string(path).expect("the golden");
        let golden: Value = serde_json::from_str(&golden).expect("JSON");
        let mut stretched = 0;
        for case in golden["cases"].as_array().expect("cases") {
            let number = |field: &str| case[field].as_f64().expect("a number");
            let theta = number("rope_theta");
            let config = text_config(
                number("head_dim") as usize,
                theta,
                &case["rope_scaling"],
                &golden["max_position_embeddings"],
            );
            let rope = MRope::new(&config);
            let what = &case["rope_scaling"];
            assert_eq!(rope.attention_factor, number("attention_factor") as f32, "{what}");
            let expected: Vec<f32> =
                case["inv_freq"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
            assert_eq!(rope.frequencies.len(), expected.len());
            for ((found, _), expected) in rope.frequencies.iter().zip(&expected) {
                // Its power is not always the nearest number; a few units in the last place may lie between.
                let error = (found - expected).abs() / expected;
                assert!(error <= 4.0 * f32::EPSILON, "{what}: {found} is not {expected}");
            }
            let plain = inverse_frequencies(theta, config.head_dim());
            stretched += usize::from(rope.frequencies.iter().zip(&plain).any(|((a, _), b)| a != b));
            // The attention factor is in the tables, also of position 0.
            let table = rope.table(&[[0; 3]]);
            assert!(table.cos.iter().all(|cos| *cos == rope.attention_factor), "{what}");
        }
        assert!(stretched > 30, "{stretched}");
    }

    #[test]
    fn patches_turn_with_row_then_column() {
        let table = AxialRope::new(10_000.0, 16).table(&[[3, 4]]);
        let angle = |i: usize| [3.0, 4.0][i / 4] * 10_000f64.powf(-((i % 4) as f64) / 4.0);
        assert_eq!((table.half_dim, table.sin.len()), (8, 8));
        for i in 0..8 {
            assert!((f64::from(table.sin[i]) - angle(i).sin()).abs() < 1e-6);
        }
    }

    #[test]
    fn pieces_on_the_device_are_the_whole_table() {
        let options = CpuOptions {
            threads: 1,
            cpus: Vec::new(),
            workspace_bytes: 1 << 20,
            instruction_set: None,
            collective: Box::new(Alone),
            progress: Arc::new(Progress::new(1)),
        };
        let device = CpuDevice::new(options).expect("a device");
        let rope = AxialRope::new(10_000.0, 16);
        for rows in [1, HOST_ROWS - 1, HOST_ROWS, 2 * HOST_ROWS + 3] {
            let positions: Vec<[u32; 2]> = (0..rows as u32).map(|i| [i / 7, i % 31]).collect();
            let whole = rope.table(&positions);
            let (cos, sin) = rope.tables(&device, &positions).expect("room");
            assert_eq!(device.download(&cos).expect("downloaded"), whole.cos);
            assert_eq!(device.download(&sin).expect("downloaded"), whole.sin);
        }
    }
}

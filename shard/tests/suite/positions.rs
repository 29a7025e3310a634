//! M-RoPE positions agree with the corrected reference on generated mixtures of text, pictures and videos.

use std::{fs, path::Path};

use lockstep_shard::model::positions::{MediumRun, PositionGeometry, Positions};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect()
}

/// The tokens of all segments, and the media among them.
fn mixture(segments: &[Value], merge_size: u32) -> (usize, Vec<MediumRun>) {
    let (mut num_tokens, mut media) = (0, Vec::new());
    for segment in segments {
        if segment[0] == "text" {
            num_tokens += segment[1].as_u64().unwrap() as usize;
            continue;
        }
        let grid = [1, 2, 3].map(|i| segment[i].as_u64().unwrap() as u32);
        let seconds_per_grid_t = (segment[0] == "video").then(|| segment[4].as_f64().unwrap());
        let medium = MediumRun { first_token: num_tokens, grid, seconds_per_grid_t };
        num_tokens += medium.num_tokens(merge_size);
        media.push(medium);
    }
    (num_tokens, media)
}

#[test]
fn mixtures_agree_with_the_reference() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/positions.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let geometry = PositionGeometry {
        merge_size: golden["spatial_merge_size"].as_u64().unwrap() as u32,
        tokens_per_second: golden["tokens_per_second"].as_f64().unwrap() as f32,
    };
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 200, "hundreds of mixtures, not {}", cases.len());
    for (index, case) in cases.iter().enumerate() {
        let (num_tokens, media) = mixture(case["segments"].as_array().unwrap(), geometry.merge_size);
        assert_eq!(num_tokens as u64, case["length"].as_u64().unwrap(), "case {index}");
        let positions = Positions::new(num_tokens, &media, geometry).unwrap();
        let last = positions.of(num_tokens - 1).map(u64::from);
        assert_eq!(last.to_vec(), numbers(&case["last"]), "case {index}");
        assert_eq!(u64::from(positions.of(num_tokens)[0]), case["next"].as_u64().unwrap(), "case {index}");
        assert_eq!(positions.of(num_tokens + 7)[0], positions.of(num_tokens)[0] + 7, "case {index}");

        let axes = [0, 1, 2].map(|axis| (0..num_tokens).map(|i| positions.of(i)[axis]).collect::<Vec<u32>>());
        if let Some(expected) = case.get("positions") {
            for (axis, expected) in axes.iter().zip(expected.as_array().unwrap()) {
                assert_eq!(
                    axis.iter().map(|p| u64::from(*p)).collect::<Vec<_>>(),
                    numbers(expected),
                    "case {index}"
                );
            }
        }
        let hash =
            axes.iter().flatten().fold(Sha256::new(), |hash, p| hash.chain_update((*p as i32).to_le_bytes()));
        assert_eq!(format!("{:x}", hash.finalize()), case["sha256"].as_str().unwrap(), "case {index}");
    }
}

//! What a checkpoint says about itself: its `config.json`, read and checked whole.
//!
//! Two layouts are in use: the flat one of the released checkpoints (text fields at the top, `rope_scaling`),
//! and the nested one that transformers 5 writes (`text_config`, `rope_parameters`). Both give the same
//! [`Config`].

mod fields;
mod rope;

use std::fmt;
use std::path::{Path, PathBuf};

use fields::Fields;
pub use rope::Yarn;
use serde_json::{Map, Value};

/// The one architecture that is supported.
pub const ARCHITECTURE: &str = "Qwen2_5_VLForConditionalGeneration";
const MODEL_TYPE: &str = "qwen2_5_vl";

/// A checkpoint's configuration, valid.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The checkpoint's architecture, as it names it.
    pub architecture: String,
    /// The language model.
    pub text: TextConfig,
    /// The vision tower.
    pub vision: VisionConfig,
    /// The token that stands for a piece of a picture.
    pub image_token_id: u32,
    /// The token that stands for a piece of a video.
    pub video_token_id: u32,
    /// The token before a picture or video.
    pub vision_start_token_id: u32,
    /// The token after it.
    pub vision_end_token_id: u32,
    /// Whether the head is the table of embeddings.
    pub tie_word_embeddings: bool,
}

/// The language model.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Heads of keys and values.
    pub num_key_value_heads: usize,
    /// The configuration's own bound on positions.
    pub max_position_embeddings: usize,
    /// Added to the mean square in a norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How many frequencies turn with time, height and width. Their sum is half a head.
    pub mrope_section: Vec<usize>,
    /// How the frequencies are stretched to a context beyond the one that the model was trained on.
    pub yarn: Option<Yarn>,
}

impl TextConfig {
    /// The most tokens that a sequence may have: with YaRN as many times the original context as its factor says, and the
    /// configuration's own bound without.
    pub fn max_context_tokens(&self) -> usize {
        self.yarn.map_or(self.max_position_embeddings, |yarn| yarn.context_tokens())
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}

/// The vision tower.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Heads.
    pub num_heads: usize,
    /// Colours of a pixel.
    pub in_channels: usize,
    /// Pixels on a side of a patch.
    pub patch_size: usize,
    /// Patches on a side of a token.
    pub spatial_merge_size: usize,
    /// Frames in a patch.
    pub temporal_patch_size: usize,
    /// Pixels on a side of an attention window.
    pub window_size: usize,
    /// Width of what it gives to the language model.
    pub out_hidden_size: usize,
    /// Blocks that attend to the whole frame.
    pub fullatt_block_indexes: Vec<usize>,
    /// Temporal positions in a second of video.
    pub tokens_per_second: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
}

impl VisionConfig {
    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Values of a patch: colours, frames, rows and columns of pixels.
    pub fn patch_values(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches that are joined to one token.
    pub fn merge_unit(&self) -> usize {
        self.spatial_merge_size * self.spatial_merge_size
    }
}

/// A field of `config.json` that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigFault {
    /// The field, with the objects that it is in: `text_config.hidden_size`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for ConfigFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a JSON object.
    #[error("{path} is not a JSON object: {reason}")]
    NotJson {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Fields are wrong: all of them.
    #[error("{path}: {}", join(faults))]
    Faults {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        faults: Vec<ConfigFault>,
    },
}

fn join(faults: &[ConfigFault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Config {
    /// Reads and checks `config.json` of a folder. Reports all faults at once.
    pub fn open(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join("config.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        match serde_json::from_str(&text) {
            Ok(Value::Object(root)) => {
                Self::from_json(&root).map_err(|faults| ConfigError::Faults { path, faults })
            }
            Ok(_) => Err(ConfigError::NotJson { path, reason: "its top is something else".to_owned() }),
            Err(error) => Err(ConfigError::NotJson { path, reason: error.to_string() }),
        }
    }

    /// Checks a parsed `config.json`.
    pub fn from_json(root: &Map<String, Value>) -> Result<Self, Vec<ConfigFault>> {
        let mut faults = Vec::new();
        let architecture = architecture(root, &mut faults);
        if !faults.is_empty() {
            // The fields of another architecture mean something else.
            return Err(faults);
        }
        let mut top = Fields { prefix: String::new(), map: Some(root), faults: &mut faults };
        if root.get("quantization_config").is_some_and(|value| !value.is_null()) {
            top.fault("quantization_config", "quantized checkpoints are not supported yet");
        }
        let image_token_id = top.token_id("image_token_id", 151_655);
        let video_token_id = top.token_id("video_token_id", 151_656);
        let vision_start_token_id = top.token_id("vision_start_token_id", 151_652);
        let vision_end_token_id = top.token_id("vision_end_token_id", 151_653);
        let vision = top.nested("vision_config").vision();
        let tied = top.flag("tie_word_embeddings");
        let (text, tied_in_text) = if root.contains_key("text_config") {
            let mut fields = top.nested("text_config");
            (fields.text(), fields.flag("tie_word_embeddings"))
        } else {
            (top.text(), false)
        };
        let config = Self {
            architecture,
            text,
            vision,
            image_token_id,
            video_token_id,
            vision_start_token_id,
            vision_end_token_id,
            tie_word_embeddings: tied || tied_in_text,
        };
        if faults.is_empty() {
            config.check(&mut faults);
        }
        if faults.is_empty() { Ok(config) } else { Err(faults) }
    }

    /// Rules between fields.
    fn check(&self, faults: &mut Vec<ConfigFault>) {
        let mut rule = |holds: bool, field: &str, problem: String| {
            if !holds {
                faults.push(ConfigFault { field: field.to_owned(), problem });
            }
        };
        let text = &self.text;
        let heads = text.num_attention_heads;
        rule(
            text.hidden_size.is_multiple_of(heads) && text.head_dim().is_multiple_of(2),
            "hidden_size",
            format!("{} does not divide into {heads} heads of an even width", text.hidden_size),
        );
        rule(
            heads.is_multiple_of(text.num_key_value_heads),
            "num_key_value_heads",
            format!("{} does not divide num_attention_heads, {heads}", text.num_key_value_heads),
        );
        rule(
            text.mrope_section.iter().sum::<usize>() == text.head_dim() / 2,
            "mrope_section",
            format!("{:?} does not sum to half a head, {}", text.mrope_section, text.head_dim() / 2),
        );
        rule(
            (self.image_token_id as usize) < text.vocab_size,
            "image_token_id",
            format!("{} is outside of the vocabulary of {}", self.image_token_id, text.vocab_size),
        );
        let vision = &self.vision;
        rule(
            vision.hidden_size.is_multiple_of(vision.num_heads) && vision.head_dim().is_multiple_of(4),
            "vision_config.hidden_size",
            format!(
                "{} does not divide into {} heads of a width that is a multiple of 4",
                vision.hidden_size, vision.num_heads
            ),
        );
        rule(
            vision.out_hidden_size == text.hidden_size,
            "vision_config.out_hidden_size",
            format!("{} is not hidden_size, {}", vision.out_hidden_size, text.hidden_size),
        );
        rule(
            vision.in_channels == 3,
            "vision_config.in_channels",
            format!("{} is not 3: pixels have three colours", vision.in_channels),
        );
        rule(
            vision.window_size >= vision.patch_size * vision.spatial_merge_size,
            "vision_config.window_size",
            format!("{} holds no merged patch", vision.window_size),
        );
        for &index in &vision.fullatt_block_indexes {
            rule(
                index < vision.depth,
                "vision_config.fullatt_block_indexes",
                format!("there is no block {index} among {}", vision.depth),
            );
        }
    }
}

fn architecture(root: &Map<String, Value>, faults: &mut Vec<ConfigFault>) -> String {
    let mut fault = |field: &str, problem| faults.push(ConfigFault { field: field.to_owned(), problem });
    let named = root.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let model_type = root.get("model_type").and_then(Value::as_str);
    match (named, model_type) {
        (Some(ARCHITECTURE), _) | (None, Some(MODEL_TYPE)) => {}
        (Some(other), _) => {
            fault("architectures", format!("{other} is not supported; {ARCHITECTURE} is"));
        }
        (None, Some(other)) => {
            fault("model_type", format!("{other} is not supported; {MODEL_TYPE} is"));
        }
        (None, None) => fault("architectures", "is missing".to_owned()),
    }
    ARCHITECTURE.to_owned()
}

impl Fields<'_, '_> {
    fn silu(&mut self) {
        let other = self.get("hidden_act").filter(|act| act.as_str() != Some("silu")).cloned();
        if let Some(other) = other {
            self.fault("hidden_act", format!("{other} is not supported; \"silu\" is"));
        }
    }

    fn text(&mut self) -> TextConfig {
        self.silu();
        if self.flag("use_sliding_window") {
            self.fault("use_sliding_window", "sliding windows are not supported yet");
        }
        let vocab_size = self.size("vocab_size", None);
        let hidden_size = self.size("hidden_size", None);
        let intermediate_size = self.size("intermediate_size", None);
        let num_hidden_layers = self.size("num_hidden_layers", None);
        let num_attention_heads = self.size("num_attention_heads", None);
        let num_key_value_heads = self.size("num_key_value_heads", Some(num_attention_heads));
        let max_position_embeddings = self.size("max_position_embeddings", Some(32_768));
        let rms_norm_eps = self.number("rms_norm_eps", 1e-5) as f32;
        let rope = self.text_rope(max_position_embeddings);
        TextConfig {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            max_position_embeddings,
            rms_norm_eps,
            rope_theta: rope.theta,
            mrope_section: rope.mrope_section,
            yarn: rope.yarn,
        }
    }

    fn vision(&mut self) -> VisionConfig {
        self.silu();
        let rope_theta = if self.get("rope_parameters").is_some() {
            let mut rope = self.nested("rope_parameters");
            rope.rope_type(&["axial", "default"]);
            rope.number("rope_theta", 10_000.0)
        } else {
            10_000.0
        };
        VisionConfig {
            depth: self.size("depth", None),
            hidden_size: self.size("hidden_size", None),
            intermediate_size: self.size("intermediate_size", None),
            num_heads: self.size("num_heads", None),
            in_channels: self.size("in_channels", Some(3)),
            patch_size: self.size("patch_size", Some(14)),
            spatial_merge_size: self.size("spatial_merge_size", Some(2)),
            temporal_patch_size: self.size("temporal_patch_size", Some(2)),
            window_size: self.size("window_size", Some(112)),
            out_hidden_size: self.size("out_hidden_size", None),
            fullatt_block_indexes: self.sizes("fullatt_block_indexes", &[7, 15, 23, 31]),
            tokens_per_second: self.size("tokens_per_second", Some(4)),
            rope_theta,
        }
    }
}

#[cfg(test)]
mod tests;

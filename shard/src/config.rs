//! What a checkpoint says about itself: its `config.json`, read and checked whole.
//!
//! Two layouts are in use: the flat one of the released checkpoints (text fields at the top, `rope_scaling`),
//! and the nested one that transformers 5 writes (`text_config`, `rope_parameters`). Both give the same
//! [`Config`].

use std::fmt;
use std::path::{Path, PathBuf};

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
}

impl TextConfig {
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

/// An object of the file, read field by field; what is wrong is collected.
struct Fields<'m, 'f> {
    /// What stands before a field's name: empty, or ends with a dot.
    prefix: String,
    /// `None`: the object is missing, which is reported once.
    map: Option<&'m Map<String, Value>>,
    faults: &'f mut Vec<ConfigFault>,
}

impl<'m> Fields<'m, '_> {
    fn fault(&mut self, field: &str, problem: impl Into<String>) {
        let field = format!("{}{field}", self.prefix);
        self.faults.push(ConfigFault { field, problem: problem.into() });
    }

    fn nested(&mut self, name: &str) -> Fields<'m, '_> {
        let map = self.get(name).and_then(Value::as_object);
        if map.is_none() && self.map.is_some() {
            self.fault(name, "is missing or not an object");
        }
        Fields { prefix: format!("{}{name}.", self.prefix), map, faults: self.faults }
    }

    fn get(&self, field: &str) -> Option<&'m Value> {
        self.map?.get(field).filter(|value| !value.is_null())
    }

    /// A positive integer; `default` when it is absent, and a fault when there is no default.
    fn size(&mut self, field: &str, default: Option<usize>) -> usize {
        // Every size fits u32: products of two then fit 64 bits.
        match self.get(field).map(|value| value.as_u64().filter(|&n| 0 < n && n <= u64::from(u32::MAX))) {
            Some(Some(n)) => n as usize,
            Some(None) => {
                self.fault(field, "is not a positive integer");
                1
            }
            None => default.unwrap_or_else(|| {
                if self.map.is_some() {
                    self.fault(field, "is missing");
                }
                1
            }),
        }
    }

    fn token_id(&mut self, field: &str, default: u32) -> u32 {
        match self.get(field).map(|value| value.as_u64().and_then(|id| u32::try_from(id).ok())) {
            Some(Some(id)) => id,
            Some(None) => {
                self.fault(field, "is not a token id");
                default
            }
            None => default,
        }
    }

    /// A positive number.
    fn number(&mut self, field: &str, default: f64) -> f64 {
        match self.get(field).map(|value| value.as_f64().filter(|&x| x > 0.0 && x.is_finite())) {
            Some(Some(x)) => x,
            Some(None) => {
                self.fault(field, "is not a positive number");
                default
            }
            None => default,
        }
    }

    fn flag(&mut self, field: &str) -> bool {
        match self.get(field).map(Value::as_bool) {
            Some(Some(flag)) => flag,
            Some(None) => {
                self.fault(field, "is not true or false");
                false
            }
            None => false,
        }
    }

    fn sizes(&mut self, field: &str, default: &[usize]) -> Vec<usize> {
        let Some(value) = self.get(field) else { return default.to_vec() };
        let sizes = value.as_array().and_then(|list| {
            list.iter().map(|item| item.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
        });
        sizes.unwrap_or_else(|| {
            self.fault(field, "is not a list of integers");
            default.to_vec()
        })
    }

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
        let outer_theta = self.number("rope_theta", 1e6);
        // As the reference has it, the older field wins where both are present.
        let rope = if self.get("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
        let (rope_theta, mrope_section) = if self.get(rope).is_some() {
            let mut rope = self.nested(rope);
            rope.rope_type(&["default", "mrope"]);
            (rope.number("rope_theta", outer_theta), rope.sizes("mrope_section", &[16, 24, 24]))
        } else {
            (outer_theta, vec![16, 24, 24])
        };
        TextConfig {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            max_position_embeddings,
            rms_norm_eps,
            rope_theta,
            mrope_section,
        }
    }

    fn rope_type(&mut self, supported: &[&str]) {
        for field in ["rope_type", "type"] {
            let Some(value) = self.get(field) else { continue };
            if !value.as_str().is_some_and(|kind| supported.contains(&kind)) {
                let problem = format!("{value} is not supported yet; {supported:?} are");
                self.fault(field, problem);
            }
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
mod tests {
    use serde_json::json;

    use super::*;

    /// The released 7B checkpoint's, shortened to what is read.
    fn flat() -> Value {
        json!({
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
            "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 128000,
            "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": false, "vocab_size": 152064,
            "tie_word_embeddings": false, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "image_token_id": 151655, "video_token_id": 151656,
            "vision_start_token_id": 151652, "vision_end_token_id": 151653,
            "vision_config": {
                "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
                "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2, "temporal_patch_size": 2
            }
        })
    }

    fn parse(value: &Value) -> Result<Config, Vec<String>> {
        Config::from_json(value.as_object().expect("an object"))
            .map_err(|faults| faults.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn both_layouts_say_the_same() {
        let flat = flat();
        let mut text = flat.as_object().expect("an object").clone();
        let vision = text.remove("vision_config").expect("present");
        let mut rope = text.remove("rope_scaling").expect("present");
        rope["rope_type"] = json!("default");
        rope["rope_theta"] = text.remove("rope_theta").expect("present");
        rope.as_object_mut().expect("an object").remove("type");
        text.insert("rope_parameters".to_owned(), rope);
        let nested = json!({
            "architectures": flat["architectures"], "model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision,
        });
        let config = parse(&flat).expect("valid");
        assert_eq!(config, parse(&nested).expect("valid"));
        assert_eq!((config.text.head_dim(), config.vision.head_dim()), (128, 80));
        assert_eq!(config.text.rope_theta, 1e6);
        assert!(!config.tie_word_embeddings);
    }

    #[test]
    fn all_faults_are_told_at_once() {
        let mut config = flat();
        config["hidden_size"] = json!(-1);
        config["vocab_size"] = Value::Null;
        config["rope_scaling"]["type"] = json!("yarn");
        config["quantization_config"] = json!({"quant_method": "awq"});
        config["vision_config"]["depth"] = json!("many");
        assert_eq!(
            parse(&config).expect_err("faults"),
            [
                "quantization_config: quantized checkpoints are not supported yet",
                "vision_config.depth: is not a positive integer",
                "vocab_size: is missing",
                "hidden_size: is not a positive integer",
                "rope_scaling.type: \"yarn\" is not supported yet; [\"default\", \"mrope\"] are",
            ]
        );
    }

    #[test]
    fn rules_between_fields_hold() {
        let mut config = flat();
        config["num_key_value_heads"] = json!(3);
        config["rope_scaling"]["mrope_section"] = json!([16, 24, 23]);
        config["vision_config"]["fullatt_block_indexes"] = json!([31, 32]);
        config["vision_config"]["out_hidden_size"] = json!(2048);
        let fields: Vec<_> = parse(&config)
            .expect_err("faults")
            .iter()
            .map(|fault| fault.split(':').next().expect("a field").to_owned())
            .collect();
        assert_eq!(
            fields,
            [
                "num_key_value_heads",
                "mrope_section",
                "vision_config.out_hidden_size",
                "vision_config.fullatt_block_indexes"
            ]
        );
    }

    #[test]
    fn another_architecture_is_refused_by_name() {
        let mut config = flat();
        config["architectures"] = json!(["LlamaForCausalLM"]);
        assert_eq!(
            parse(&config).expect_err("a fault"),
            [format!("architectures: LlamaForCausalLM is not supported; {ARCHITECTURE} is")]
        );
    }

    #[test]
    fn a_missing_vision_tower_is_one_fault() {
        let mut config = flat();
        config.as_object_mut().expect("an object").remove("vision_config");
        assert_eq!(parse(&config).expect_err("a fault"), ["vision_config: is missing or not an object"]);
    }
}

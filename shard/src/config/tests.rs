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
    config["rope_scaling"]["type"] = json!("longrope");
    config["quantization_config"] = json!({"quant_method": "awq"});
    config["vision_config"]["depth"] = json!("many");
    assert_eq!(
        parse(&config).expect_err("faults"),
        [
            "quantization_config: quantized checkpoints are not supported yet",
            "vision_config.depth: is not a positive integer",
            "vocab_size: is missing",
            "hidden_size: is not a positive integer",
            "rope_scaling.type: \"longrope\" is not supported yet; [\"default\", \"mrope\", \"yarn\"] are",
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

fn with_rope(rope: Value) -> Value {
    let mut config = flat();
    config["rope_scaling"] = rope;
    config
}

#[test]
fn yarn_is_read_from_both_layouts_and_bounds_the_context() {
    let rope = json!({
        "type": "yarn", "mrope_section": [16, 24, 24], "factor": 4.0, "original_max_position_embeddings": 32768
    });
    let config = parse(&with_rope(rope.clone())).expect("valid");
    let yarn = config.text.yarn.expect("YaRN");
    assert_eq!((yarn.beta_fast, yarn.beta_slow, yarn.truncate), (32.0, 1.0, true));
    assert_eq!(yarn.attention_factor, 0.1 * 4f64.ln() + 1.0);
    assert_eq!(config.text.max_context_tokens(), 131_072);

    let mut newer = flat();
    newer["rope_scaling"] = Value::Null;
    newer["rope_parameters"] = rope;
    newer["rope_parameters"]["rope_type"] = json!("yarn");
    assert_eq!(config, parse(&newer).expect("valid"));
    // Saved by transformers 5 from a model without YaRN, which was then asked for.
    newer["rope_parameters"]["type"] = json!("mrope");
    assert_eq!(config, parse(&newer).expect("valid"));

    let plain = parse(&flat()).expect("valid");
    assert_eq!((plain.text.yarn, plain.text.max_context_tokens()), (None, 128_000));
}

#[test]
fn faults_of_yarn_are_told_by_name() {
    let rope = json!({
        "type": "yarn", "rope_type": "default", "mrope_section": [16, 24, 24], "factor": 4.0,
        "original_max_position_embeddings": 32768
    });
    assert_eq!(
        parse(&with_rope(rope)).expect_err("a fault"),
        ["rope_scaling.type: is \"yarn\", and rope_type is not"]
    );
    let rope = json!({
        "type": "yarn", "mrope_section": [16, 24, 24], "original_max_position_embeddings": -1, "beta_fast": 1.0,
        "beta_slow": 2.0, "partial_rotary_factor": 0.5, "truncate": "no", "mscale": 0.0, "attention_factor": "large"
    });
    assert_eq!(
        parse(&with_rope(rope)).expect_err("faults"),
        [
            "rope_scaling.original_max_position_embeddings: is not a positive integer",
            "rope_scaling.factor: is missing",
            "rope_scaling.beta_fast: 1 is less than beta_slow, 2",
            "rope_scaling.partial_rotary_factor: is not supported: M-RoPE turns whole heads",
            "rope_scaling.mscale: is not a positive number",
            "rope_scaling.truncate: is not true or false",
            "rope_scaling.attention_factor: is not a positive number",
        ]
    );
    let mut config = with_rope(json!({
        "type": "yarn", "mrope_section": [16, 24, 24], "factor": 0.5, "original_max_position_embeddings": 32768
    }));
    config["original_max_position_embeddings"] = json!(4096);
    assert_eq!(
        parse(&config).expect_err("faults"),
        [
            "rope_scaling.original_max_position_embeddings: differs from 4096 outside of rope_scaling",
            "rope_scaling.factor: 0.5 is less than 1",
        ]
    );
}

"""Makes tests/goldens/yarn.json: the rotary frequencies and the attention factor that YaRN gives."""

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from reference import GOLDENS, write_compact

# Width of a head, its sections, rope_theta.
HEADS = [(128, [16, 24, 24], 1e6), (32, [4, 6, 6], 1e4), (8, [2, 1, 1], 5e5)]
CONTEXT = 32768
# What stands in `rope_scaling` beside type and sections.
SETTINGS = [
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 4, "original_max_position_embeddings": 128},
    {"factor": 1.0, "original_max_position_embeddings": 32768},
    {"factor": 2.5, "original_max_position_embeddings": 8192, "truncate": False},
    {"factor": 16.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
    {"factor": 8.0, "original_max_position_embeddings": 1000, "attention_factor": 1.5},
    {"factor": 8.0, "original_max_position_embeddings": 1000, "mscale": 0.707},
    {"factor": 8.0, "original_max_position_embeddings": 1000, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"factor": 8.0, "original_max_position_embeddings": 1000, "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 0.75},
    # Neither ramp has a width.
    {"factor": 4.0, "original_max_position_embeddings": 6, "beta_fast": 1.0, "beta_slow": 1.0},
    {"factor": 4.0, "original_max_position_embeddings": 2000, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
    # Left out: the bound on positions is the original context, and null asks for the ratio of the two.
    {"factor": 3.0},
    {"factor": None, "original_max_position_embeddings": 8192},
]


def case_of(head_dim: int, sections: list[int], theta: float, settings: dict, field: str) -> dict:
    rope = {field: "yarn", "mrope_section": sections, **settings}
    config = Qwen2_5_VLTextConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        rope_theta=theta,
        rope_scaling=dict(rope),
    )
    rotary = Qwen2_5_VLRotaryEmbedding(config)
    if rotary.mrope_section != sections or rotary.rope_type != "yarn":
        raise RuntimeError(f"{rope} became {config.rope_parameters}")
    return {
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": rope,
        "attention_factor": float(rotary.attention_scaling),
        # As doubles these f32 are exact.
        "inv_freq": rotary.inv_freq.tolist(),
    }


def main() -> None:
    cases = [
        case_of(*head, settings, ["type", "rope_type"][i % 2])
        for head in HEADS
        for i, settings in enumerate(SETTINGS)
    ]
    write_compact(GOLDENS / "yarn.json", {"max_position_embeddings": CONTEXT, "cases": cases})
    print(f"{len(cases)} configurations")


if __name__ == "__main__":
    main()

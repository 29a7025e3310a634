"""Makes the small random checkpoints in tests/checkpoints from the reference's own class."""

import json
import re
import shutil
import sys
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from reference import CHECKPOINTS, TOKENIZER, full_tokenizer_json, load_model

BYTE_TOKENS = 256


@dataclass
class Shape:
    """What distinguishes one checkpoint from the others. Widths in elements."""

    name: str
    seed: int
    heads: int
    kv_heads: int
    head_dim: int
    mrope_section: list[int]
    layers: int
    mlp: int
    tied: bool
    merges: int
    # Rows of the vocabulary beyond the tokenizer's, as the released checkpoints have them.
    spare_tokens: int
    dtype: torch.dtype
    files: int
    vision_heads: int
    vision_head_dim: int
    vision_mlp: int
    vision_depth: int
    window: int
    full_attention: list[int]
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-6
    # Whether config.json and tensor names are as transformers 5 saves them, not as the released checkpoints are.
    nested: bool = False
    # The context that the model is said to be trained on, and how many times of it YaRN makes.
    yarn: tuple[int, float] | None = None


SHAPES = [
    Shape("a", 1, 28, 4, 8, [2, 1, 1], 2, 150, False, 253, 2, torch.bfloat16, 1, 3, 16, 342, 4, 112, [1, 3]),
    Shape("b", 2, 7, 1, 16, [2, 3, 3], 3, 268, True, 251, 0, torch.float16, 1, 2, 8, 3420, 2, 56, [1]),
    Shape("c", 3, 4, 2, 32, [4, 6, 6], 3, 171, False, 250, 5, torch.float32, 3, 5, 8, 90, 3, 112, [0, 2], 10000.0, 1e-5),
    Shape("d", 4, 6, 3, 16, [4, 2, 2], 3, 200, True, 260, 9, torch.bfloat16, 2, 4, 12, 130, 3, 56, [2]),
    Shape("e", 5, 16, 2, 8, [1, 1, 2], 2, 344, False, 249, 3, torch.bfloat16, 1, 3, 8, 77, 2, 112, [1], nested=True),
    Shape("f", 6, 4, 2, 32, [4, 6, 6], 2, 120, True, 250, 1, torch.bfloat16, 1, 2, 8, 70, 2, 112, [1], 10000.0, yarn=(128, 4.0)),
    # Heads as wide as those of the family, for which kernels of GPUs are compiled.
    Shape("g", 7, 2, 1, 128, [16, 24, 24], 2, 64, True, 250, 3, torch.bfloat16, 1, 1, 80, 32, 2, 112, [1]),
]


def cut_tokenizer(merges: int) -> tuple[dict, dict[str, int]]:
    """The real tokenizer with only its first merges, and where its added tokens went."""
    tokenizer = full_tokenizer_json()
    model = tokenizer["model"]
    by_id = sorted(model["vocab"], key=model["vocab"].get)
    kept = BYTE_TOKENS + merges
    model["merges"] = model["merges"][:merges]
    for rank, pair in enumerate(model["merges"]):
        if "".join(pair.split(" ")) != by_id[BYTE_TOKENS + rank]:
            raise RuntimeError(f"merge {rank} does not make token {BYTE_TOKENS + rank}")
    model["vocab"] = {token: index for index, token in enumerate(by_id[:kept])}
    added = {}
    for index, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = added[token["content"]] = kept + index
    return tokenizer, added


def control_token_ids(added: dict[str, int]) -> dict[str, int]:
    """The fields of config.json that name control tokens."""
    return {
        "bos_token_id": added["<|endoftext|>"],
        "eos_token_id": added["<|im_end|>"],
        "vision_start_token_id": added["<|vision_start|>"],
        "vision_end_token_id": added["<|vision_end|>"],
        "vision_token_id": added["<|vision_pad|>"],
        "image_token_id": added["<|image_pad|>"],
        "video_token_id": added["<|video_pad|>"],
    }


def flat_config(shape: Shape, added: dict[str, int]) -> dict:
    """config.json as the released checkpoints have it."""
    config = json.loads((TOKENIZER / "model" / "config.json").read_text())
    hidden = shape.heads * shape.head_dim
    config |= control_token_ids(added) | {
        "hidden_size": hidden,
        "intermediate_size": shape.mlp,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": str(shape.dtype).removeprefix("torch."),
        "vocab_size": BYTE_TOKENS + shape.merges + len(added) + shape.spare_tokens,
    }
    config["rope_scaling"]["mrope_section"] = shape.mrope_section
    if shape.yarn:
        # As the family's own documentation asks for it.
        original, factor = shape.yarn
        config["rope_scaling"] |= {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    config["vision_config"] |= {
        "depth": shape.vision_depth,
        "hidden_size": shape.vision_heads * shape.vision_head_dim,
        "intermediate_size": shape.vision_mlp,
        "num_heads": shape.vision_heads,
        "out_hidden_size": hidden,
        "window_size": shape.window,
        "fullatt_block_indexes": shape.full_attention,
    }
    return config


def fill(model: Qwen2_5_VLForConditionalGeneration, shape: Shape, quiet_tokens: list[int]) -> None:
    """Random weights under which answers depend on every part of the model and the best two logits are far apart."""
    generator = torch.Generator().manual_seed(shape.seed)

    def normal(like: torch.Tensor, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * std + mean

    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "norm" in name or "ln_q" in name:
                value = normal(weight, 0.2, 1.0)
            elif name.endswith(".bias"):
                value = normal(weight, 0.2)
            elif "embed_tokens" in name or "lm_head" in name:
                # With a norm before the head, logits have about this times sqrt(hidden) as their deviation.
                deviation = 4.0 / weight.shape[1] ** 0.5
                value = normal(weight, deviation if shape.tied or "lm_head" in name else 1.0)
                if "lm_head" in name or shape.tied:
                    # Pad tokens and rows that no token has are never an answer.
                    value[quiet_tokens] *= 0.01
            elif "patch_embed" in name:
                value = normal(weight, (2.0 / weight[0].numel()) ** 0.5)
            else:
                value = normal(weight, 1.5 / weight.shape[1] ** 0.5)
            # Stored values are what every reader sees, so they are rounded before anything is computed with them.
            weight.copy_(value.to(shape.dtype))


def released_name(name: str) -> str:
    """The tensor's name in the released checkpoints."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def check_names(names: set[str]) -> None:
    """The names are those of the released 7B checkpoint, layer numbers aside."""

    def unnumbered(name: str) -> str:
        return re.sub(r"(layers|blocks)\.\d+\.", r"\1.N.", name)

    index = json.loads((TOKENIZER / "model" / "model.safetensors.index.json").read_text())
    wanted = {unnumbered(name) for name in index["weight_map"]}
    have = {unnumbered(name) for name in names}
    if have - wanted or wanted - have - {"lm_head.weight"}:
        raise RuntimeError(f"names differ from the 7B checkpoint's: {have ^ wanted}")


def save_released(folder, shape: Shape, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """config.json and safetensors files in the layout of the released checkpoints."""
    tensors = {released_name(name): tensor for name, tensor in tensors.items()}
    if shape.tied:
        tensors.pop("lm_head.weight", None)
    check_names(set(tensors))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shape.files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    # Round robin, so that the tensors of one layer lie in different files.
    names = sorted(tensors)
    weight_map = {}
    for part in range(shape.files):
        file = f"model-{part + 1:05}-of-{shape.files:05}.safetensors"
        mine = names[part :: shape.files]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def save_text_files(folder, tokenizer: dict, added: dict[str, int]) -> None:
    """Everything of a checkpoint that is neither configuration of the model nor a weight."""
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    released = TOKENIZER / "model"
    for file in ("preprocessor_config.json", "chat_template.json"):
        shutil.copyfile(released / file, folder / file)
    generation = json.loads((released / "generation_config.json").read_text())
    generation["bos_token_id"] = generation["pad_token_id"] = added["<|endoftext|>"]
    generation["eos_token_id"] = [added["<|im_end|>"], added["<|endoftext|>"]]
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    settings = json.loads((TOKENIZER / "model" / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(added[token["content"]]): token for token in settings["added_tokens_decoder"].values()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def make(shape: Shape) -> None:
    folder = CHECKPOINTS / shape.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer, added = cut_tokenizer(shape.merges)
    config = flat_config(shape, added)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(json.dumps(config))))
    tokens = BYTE_TOKENS + shape.merges + len(added)
    spare = list(range(tokens, tokens + shape.spare_tokens))
    fill(model, shape, [added["<|image_pad|>"], added["<|video_pad|>"], *spare])
    tensors = {name: tensor.detach().to(shape.dtype).contiguous() for name, tensor in model.state_dict().items()}
    if shape.nested:
        model.to(shape.dtype).save_pretrained(folder)
    else:
        save_released(folder, shape, config, tensors)
    save_text_files(folder, tokenizer, added)

    for file in folder.iterdir():
        file.chmod(0o644)
    loaded = load_model(folder, torch.float32).state_dict()
    for name, tensor in tensors.items():
        if not torch.equal(loaded[name], tensor.to(torch.float32)):
            raise RuntimeError(f"{folder}: {name} came back different")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{shape.name}: {sum(t.numel() for t in tensors.values())} parameters, {size} bytes")


if __name__ == "__main__":
    for shape in SHAPES:
        if len(sys.argv) == 1 or shape.name in sys.argv[1:]:
            make(shape)

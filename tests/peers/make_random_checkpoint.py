"""Makes a random bf16 checkpoint of given dimensions, file by file, with the real tokenizer.

make_random_checkpoint.py --config DIR --out DIR [--seed N]

DIR of --config holds config.json in the released layout. Names and shapes are those of transformers' own class, renamed as the released
checkpoints have them. At most one file's tensors are in memory at a time.
"""

import argparse
import json
import lzma
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TOKENIZER = Path(__file__).resolve().parents[1] / "tokenizer"
FILE_BYTES = 1 << 30
BF16_BYTES = 2


def shapes_of(config: dict) -> dict[str, torch.Size]:
    """The shape of each tensor under its released name."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(json.dumps(config))))
    shapes = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        shapes[name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")] = tensor.shape
    return shapes


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values under which activations stay of the size that trained weights give them."""
    if "norm" in name or "ln_q" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith(".bias"):
        deviation = 0.02
    elif "embed_tokens" in name:
        deviation = 2.0 / math.sqrt(shape[1])
    else:
        deviation = 1.0 / math.sqrt(math.prod(shape[1:]))
    value = torch.empty(shape, dtype=torch.bfloat16)
    # Some rows at a time: the f32 draws of a whole embedding would take twice its memory again.
    for rows in value.split(max(1, (1 << 24) // math.prod(shape[1:]))):
        rows.copy_(torch.randn(rows.shape, generator=generator) * deviation)
    return value


def files_of(shapes: dict[str, torch.Size]) -> list[list[str]]:
    """Names by file: files of at most FILE_BYTES, unless a single tensor is larger."""
    files, size = [[]], 0
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * BF16_BYTES
        if files[-1] and size + bytes_ > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += bytes_
    return files


def save_text_files(source: Path, out: Path) -> None:
    """Everything but weights; what `source` has of it goes before the 7B checkpoint's."""
    for name in ("generation_config.json", "preprocessor_config.json", "chat_template.json", "tokenizer_config.json"):
        own = source / name
        shutil.copyfile(own if own.exists() else TOKENIZER / "model" / name, out / name)
    with lzma.open(TOKENIZER / "tokenizer.json.xz") as packed, open(out / "tokenizer.json", "wb") as plain:
        shutil.copyfileobj(packed, plain)
    shutil.copyfile(source / "config.json", out / "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = json.loads((arguments.config / "config.json").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_text_files(arguments.config, arguments.out)

    generator = torch.Generator().manual_seed(arguments.seed)
    shapes = shapes_of(config)
    files = files_of(shapes)
    weight_map, total = {}, 0
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {name: random_tensor(name, shapes[name], generator) for name in names}
        save_file(tensors, arguments.out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.numel() * BF16_BYTES for tensor in tensors.values())
        print(f"{file}: {len(names)} tensors, {total} bytes so far", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()

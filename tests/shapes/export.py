"""Writes a checkpoint folder, in the layout of the released checkpoints and in bf16, from a state of `train.py`.

    python export.py STATE FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import CELL, MERGE, PATCH, TEXT, TOKENS_PER_SECOND, VISION, WINDOW_CELLS, Model
from vocabulary import REPOSITORY, TOKENIZER, added_tokens, cut

sys.path.append(str(REPOSITORY / "tests" / "goldens" / "recipe"))
from make_checkpoints import check_names, control_token_ids, save_text_files  # noqa: E402

# What it was trained on has at most as many.
MAX_CELLS = 144


def config(vocab_size: int, added: dict[str, int]) -> dict:
    """config.json."""
    released = json.loads((TOKENIZER / "model" / "config.json").read_text())
    text = {key: value for key, value in TEXT.items() if key != "mrope_section"}
    released |= text | control_token_ids(added) | {
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "max_window_layers": TEXT["num_hidden_layers"],
        "rope_scaling": {"type": "mrope", "mrope_section": TEXT["mrope_section"]},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    released["vision_config"] |= VISION | {
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "tokens_per_second": TOKENS_PER_SECOND,
        "window_size": WINDOW_CELLS * CELL,
    }
    return released


def export(state: dict[str, torch.Tensor], folder: Path) -> None:
    """`state` is that of a `Model`."""
    tokenizer = cut()
    added = added_tokens(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    check_names(set(tensors))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocab_size = len(tokenizer["model"]["vocab"]) + len(added)
    (folder / "config.json").write_text(json.dumps(config(vocab_size, added), indent=2) + "\n")
    save_text_files(folder, tokenizer, added)
    change(folder / "generation_config.json", repetition_penalty=1.0)
    change(folder / "preprocessor_config.json", max_pixels=MAX_CELLS * CELL**2)
    for file in folder.iterdir():
        file.chmod(0o644)


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")


if __name__ == "__main__":
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    export(torch.load(source)["model"], folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size} bytes")

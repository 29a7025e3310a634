"""The pinned reference: transformers 5.23.0 with its one correction, and what the other scripts share."""

import hashlib
import inspect
import json
import lzma
import textwrap
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.image_utils import SizeDict
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

REPOSITORY = Path(__file__).resolve().parents[3]
CHECKPOINTS = REPOSITORY / "tests" / "checkpoints"
GOLDENS = REPOSITORY / "tests" / "goldens"
TOKENIZER = REPOSITORY / "tests" / "tokenizer"

REFERENCE = "transformers 5.23.0 with text after media continuing at the largest position + 1"
UNCORRECTED = "current_pos += max(grid_thw[1], grid_thw[2]) // spatial_merge_size"
# The positions of a picture or video all lie at or after `current_pos`, so its own maximum is the largest so far.
CORRECTED = "current_pos = int(vision_position_ids.max()) + 1"


def correct_positions() -> None:
    """Replaces the one line of `get_rope_index` that design and reference disagree on."""
    if transformers.__version__ != "5.23.0":
        raise RuntimeError(f"transformers {transformers.__version__} is installed; the reference is 5.23.0")
    model_class = modeling_qwen2_5_vl.Qwen2_5_VLModel
    source = textwrap.dedent(inspect.getsource(model_class.get_rope_index))
    if source.count(UNCORRECTED) != 1:
        raise RuntimeError(f"get_rope_index holds {UNCORRECTED!r} {source.count(UNCORRECTED)} times, not once")
    scope: dict = {}
    exec(source.replace(UNCORRECTED, CORRECTED), modeling_qwen2_5_vl.__dict__, scope)
    model_class.get_rope_index = scope["get_rope_index"]


correct_positions()


def load_model(folder: Path, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint in the given dtype, eager attention, ready to answer."""
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise RuntimeError(f"{folder}: {report}")
    return model.eval()


def load_processor(folder: Path):
    """The checkpoint's processor, with the default (torchvision) image processor."""
    processor = AutoProcessor.from_pretrained(folder)
    if type(processor.image_processor) is not Qwen2VLImageProcessor:
        raise RuntimeError(f"{folder}: image processor is {type(processor.image_processor)}")
    return processor


def resize_exactly(processor: Qwen2VLImageProcessor, picture: Image.Image, width: int, height: int) -> np.ndarray:
    """The picture at width x height as the processor's own resize step makes it: HWC u8."""
    tensor = processor.process_image(picture, do_convert_rgb=True)
    resized = super(Qwen2VLImageProcessor, processor).resize(
        tensor[None], SizeDict(height=height, width=width), resample=processor.resample
    )[0]
    return resized.permute(1, 2, 0).contiguous().numpy()


def resize_smartly(processor: Qwen2VLImageProcessor, picture: Image.Image, part: dict) -> np.ndarray:
    """The picture at the size that the processor chooses under the part's bounds, or at its exact size: HWC u8."""
    if "resized_width" in part:
        return resize_exactly(processor, picture, part["resized_width"], part["resized_height"])
    size = SizeDict(
        shortest_edge=part.get("min_pixels", processor.size["shortest_edge"]),
        longest_edge=part.get("max_pixels", processor.size["longest_edge"]),
    )
    tensor = processor.process_image(picture, do_convert_rgb=True)
    factor = processor.patch_size * processor.merge_size
    resized = processor.resize(tensor[None], size=size, resample=processor.resample, factor=factor)[0]
    return resized.permute(1, 2, 0).contiguous().numpy()


def pixel_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of HWC u8 pixels."""
    if pixels.dtype != np.uint8 or pixels.shape[-1] != 3:
        raise RuntimeError(f"not HWC u8: {pixels.dtype} {pixels.shape}")
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def open_picture(path: str) -> Image.Image:
    """A PNG of the repository, its transparency laid on white."""
    picture = Image.open(REPOSITORY / path)
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def full_tokenizer_json() -> dict:
    """The family's own tokenizer.json."""
    return json.loads(lzma.open(TOKENIZER / "tokenizer.json.xz").read())


def write_compact(path: Path, document: dict, lists: tuple[str, ...] = ("cases",)) -> None:
    """Writes JSON with one line for each element of the named lists, so that differences can be read."""
    lines = []
    for key, value in document.items():
        if key in lists:
            elements = ",\n".join(json.dumps(e, ensure_ascii=False, separators=(",", ":")) for e in value)
            lines.append(f"{json.dumps(key)}: [\n{elements}\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    path.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")

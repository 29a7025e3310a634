"""Makes tests/goldens/positions.json: M-RoPE positions of generated mixtures of text, pictures and video."""

import hashlib
import random
from types import SimpleNamespace

import torch

from reference import GOLDENS, modeling_qwen2_5_vl, write_compact

MERGE = 2
TOKENS_PER_SECOND = 2
SEED = 20250522
CASES = 360
# Frames per second that a video may be sampled at; a step of the grid is two frames.
RATES = [0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 7.5, 10.0, 23.976, 25.0, 29.97, 30.0, 60.0]
LONGEST_IN_FULL = 160
IN_FULL = 36


def reference_positions(segments: list[list]) -> torch.Tensor:
    """What the corrected `get_rope_index` says: [3, tokens]."""
    types, pictures, videos, seconds = [], [], [], []
    for kind, *values in segments:
        if kind == "text":
            types += [0] * values[0]
            continue
        t, h, w = values[:3]
        types += [1 if kind == "image" else 2] * (t * h * w // MERGE**2)
        (pictures if kind == "image" else videos).append([t, h, w])
        if kind == "video":
            seconds.append(values[3])
    vision = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=TOKENS_PER_SECOND)
    model_class = modeling_qwen2_5_vl.Qwen2_5_VLModel
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision),
        get_vision_position_ids=lambda *a, **k: model_class.get_vision_position_ids(None, *a, **k),
    )
    token_types = torch.tensor([types])
    positions, _ = model_class.get_rope_index(
        model,
        torch.zeros_like(token_types),
        token_types,
        image_grid_thw=torch.tensor(pictures) if pictures else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        # f32, as the processor hands them over.
        second_per_grid_ts=torch.tensor(seconds, dtype=torch.float32) if seconds else None,
    )
    return positions[:, 0]


def side(draw: random.Random, most: int) -> int:
    """A side of a grid in patches, more often short than long."""
    return MERGE * draw.randint(1, draw.choice([2, 4, most // MERGE]))


def mixture(draw: random.Random, small: bool) -> list[list]:
    """Media with text between them, as the template's own tokens always put some there."""
    segments = []
    if draw.random() < 0.9:
        segments.append(["text", draw.randint(1, 8 if small else 120)])
    for _ in range(draw.randint(0, 2 if small else 6)):
        most = 8 if small else draw.choice([8, 20, 74])
        h, w = side(draw, most), side(draw, most)
        if draw.random() < 0.5:
            segments.append(["image", 1, h, w])
        else:
            t = draw.randint(1, 3 if small else draw.choice([2, 8, 40]))
            if not small:
                h, w = min(h, 24), min(w, 24)
            rate = draw.choice(RATES) if draw.random() < 0.7 else round(draw.uniform(0.1, 60.0), 3)
            segments.append(["video", t, h, w, 2 / rate])
        segments.append(["text", draw.randint(1, 8 if small else 60)])
    if len(segments) > 1 and draw.random() < 0.15:
        segments.pop()
    return segments or [["text", 1]]


def case_of(segments: list[list], in_full: bool) -> dict:
    positions = reference_positions(segments)
    data = positions.to(torch.int32).contiguous().numpy().astype("<i4").tobytes()
    case = {
        "segments": segments,
        "length": positions.shape[1],
        "last": positions[:, -1].tolist(),
        "next": int(positions.max()) + 1,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    if in_full:
        case["positions"] = positions.tolist()
    return case


def main() -> None:
    draw = random.Random(SEED)
    # Chosen by hand: a long video of small frames, whose time runs far ahead of its height and width; then rates at which
    # a product in f32 falls just below an integer.
    chosen = [
        [["text", 5], ["video", 60, 4, 4, 1.0], ["text", 7]],
        [["text", 5], ["video", 3, 20, 4, 0.5], ["text", 7]],
        [["text", 3], ["video", 40, 2, 2, 2 / 29.97], ["text", 3]],
        [["text", 3], ["video", 50, 2, 2, 0.1], ["text", 2], ["image", 1, 4, 6], ["text", 3]],
        [["text", 3], ["video", 70, 2, 2, 0.35], ["text", 3]],
        [["image", 1, 4, 6], ["text", 3]],
        [["video", 2, 4, 6, 1.0], ["text", 3]],
        [["text", 4], ["image", 1, 2, 2], ["text", 2], ["image", 1, 8, 2], ["text", 2], ["image", 1, 2, 8], ["text", 2]],
        [["text", 15], ["video", 384, 2, 2, 1.0], ["text", 20]],
    ]
    cases = [case_of(segments, sum_tokens(segments) <= LONGEST_IN_FULL) for segments in chosen]
    while len(cases) < CASES:
        full = sum("positions" in case for case in cases)
        small = full < IN_FULL
        segments = mixture(draw, small)
        cases.append(case_of(segments, small and sum_tokens(segments) <= LONGEST_IN_FULL))
    document = {"spatial_merge_size": MERGE, "tokens_per_second": TOKENS_PER_SECOND, "cases": cases}
    write_compact(GOLDENS / "positions.json", document)
    in_full = sum("positions" in case for case in cases)
    longest = max(case["length"] for case in cases)
    print(f"{len(cases)} mixtures, {in_full} in full, the longest of {longest} tokens")


def sum_tokens(segments: list[list]) -> int:
    return sum(s[1] if s[0] == "text" else s[1] * s[2] * s[3] // MERGE**2 for s in segments)


if __name__ == "__main__":
    main()

"""Writes tests/goldens/video.json: which frames of a video are taken, and the size at which the model sees them.

Counts and indices are computed as qwen_vl_utils does (vision_process.py: smart_nframes and what calls it); the sizes come out
of transformers' own video processor, asked for cap_pixels_per_frame.
"""

import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers.models.qwen2_vl import video_processing_qwen2_vl as reference
from transformers.video_processing_utils import BaseVideoProcessor

FILE = Path(__file__).resolve().parents[1] / "video.json"
RATES = [Fraction(1), Fraction(3, 2), Fraction(2), Fraction(4), Fraction(25), Fraction(30000, 1001)]
SIZES = [(1920, 1080), (1080, 1920), (640, 360), (1280, 720), (70, 42), (98, 70), (320, 240), (3840, 2160), (1000, 10), (28, 28)]


def num_frames(total: int, rate: float, fps: float, max_frames: int) -> int:
    most = math.floor(min(max_frames, total) / 2) * 2
    wanted = total / rate * fps
    return math.floor(min(min(max(wanted, 4), most), total) / 2) * 2


def samples() -> list[dict]:
    cases = []
    for rate in RATES:
        for fps in [*RATES, Fraction(1, 2)]:
            for total, max_frames in [(2, 768), (3, 768), (5, 768), (100, 768), (300, 768), (300, 33)]:
                n = num_frames(total, float(rate), float(fps), max_frames)
                indices = torch.linspace(0, total - 1, n).round().long().tolist()
                sampled_fps = n / total * float(rate)
                cases.append({"total": total, "rate": float(rate), "fps": float(fps), "max_frames": max_frames,
                              "indices": indices, "seconds_per_grid_t": 2 / sampled_fps})
    return cases


def sizes() -> list[list[int]]:
    """Width, height, frames, then width and height for the model."""
    seen = []
    BaseVideoProcessor.resize = lambda self, image, size, resample: seen.append((size.width, size.height))
    processor = reference.Qwen2VLVideoProcessor()
    cases = []
    for width, height in SIZES:
        for frames in [2, 4, 20, 100, 302, 400, 768]:
            videos = SimpleNamespace(shape=(1, frames, 3, height, width))
            bounds = SimpleNamespace(shortest_edge=128 * 28 * 28, longest_edge=768 * 28 * 28)
            processor.resize(videos, bounds, None, factor=28, temporal_factor=2, cap_pixels_per_frame=True)
            cases.append([width, height, frames, *seen[-1]])
    return cases


if __name__ == "__main__":
    FILE.write_text(json.dumps({"samples": samples(), "sizes": sizes()}, separators=(",", ":")) + "\n")

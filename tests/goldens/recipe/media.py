"""Pictures and videos of the goldens' conversations, as the reference resizes them."""

import json
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.video_utils import VideoMetadata

from make_video import num_frames
from reference import REPOSITORY, open_picture, resize_smartly

FPS = 2.0
MAX_FRAMES = 768
TEMPORAL_PATCH_SIZE = 2
# Tokens of 28 x 28 pixels that a frame has at least and at most, as the reference's own class has them.
LEAST, MOST = 128 * 28 * 28, 768 * 28 * 28


@dataclass
class Medium:
    """A picture or a video at the model's size."""

    # Height x width x colour, of a video after the frames: u8.
    pixels: np.ndarray
    # Between two temporal patches; none for a picture.
    seconds: float | None = None
    timestamps: list[float] = field(default_factory=list)
    # In patches, as the processor tells it.
    grid: list[int] = field(default_factory=list)

    @staticmethod
    def of_picture(processor, part: dict) -> "Medium":
        return Medium(resize_smartly(processor, open_picture(part["image"]), part))

    @staticmethod
    def of_video(processor, part: dict) -> "Medium":
        frames, times, seconds = given_frames(part) if "frames" in part else sampled_frames(part["video"])
        size = SizeDict(shortest_edge=part.get("min_pixels", LEAST), longest_edge=part.get("max_pixels", MOST))
        resized = processor.resize(
            torch.from_numpy(frames).permute(0, 3, 1, 2)[None],
            size=size,
            resample=processor.resample,
            factor=processor.patch_size * processor.merge_size,
            temporal_factor=TEMPORAL_PATCH_SIZE,
            cap_pixels_per_frame=True,
        )[0]
        return Medium(resized.permute(0, 2, 3, 1).contiguous().numpy(), seconds, times)

    def metadata(self) -> VideoMetadata:
        """Of the frames that are taken: all of a video whose rate is theirs."""
        count = len(self.pixels)
        return VideoMetadata(
            total_num_frames=count, fps=TEMPORAL_PATCH_SIZE / self.seconds, frames_indices=list(range(count))
        )


def given_frames(part: dict) -> tuple[np.ndarray, list[float], float]:
    """All frames, the last one twice if they are odd in number; when each is shown; and seconds between temporal patches."""
    frames = [np.array(open_picture(path)) for path in part["frames"]]
    if "timestamps_s" in part:
        times = part["timestamps_s"]
        gap = (times[-1] - times[0]) / (len(times) - 1)
    else:
        times = [index / part["rate"] for index in range(len(frames))]
        gap = 1 / part["rate"]
    odd = len(frames) % TEMPORAL_PATCH_SIZE
    return np.stack(frames + frames[-1:] * odd), times + times[-1:] * odd, TEMPORAL_PATCH_SIZE * gap


def sampled_frames(path: str) -> tuple[np.ndarray, list[float], float]:
    """Frames of a file as ffmpeg decodes them, those that qwen_vl_utils takes."""
    facts = json.loads((REPOSITORY / path).with_suffix(".json").read_text())
    times = facts["times_s"]
    total = len(times)
    rate = (total - 1) / (times[-1] - times[0])
    n = num_frames(total, rate, FPS, MAX_FRAMES)
    indices = torch.linspace(0, total - 1, n).round().long().tolist()
    pixels = np.array(Image.open((REPOSITORY / path).with_suffix(".png")).convert("RGB"))
    frames = pixels.reshape(total, facts["height"], facts["width"], 3)
    return frames[indices], [times[index] for index in indices], TEMPORAL_PATCH_SIZE / (n / total * rate)

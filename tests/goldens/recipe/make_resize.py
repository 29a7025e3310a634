"""Makes tests/goldens/resize.json: sizes that smart_resize chooses, and pixels that the processor's resize gives."""

import random

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

from reference import GOLDENS, REPOSITORY, open_picture, pixel_sha256, resize_exactly, write_compact

FACTOR = 28
MIN_PIXELS = 3136
MAX_PIXELS = 12845056
SEED = 7


def formula_picture(width: int, height: int) -> Image.Image:
    x, y, c = np.arange(width)[None, :, None], np.arange(height)[:, None, None], np.arange(3)[None, None, :]
    return Image.fromarray(((x * 7 + y * 13 + c * 29 + (x * y) % 31) % 256).astype(np.uint8))


def sizes() -> list[tuple[int, int, int, int]]:
    """Heights, widths and bounds: edges first, then drawn ones."""
    default = (MIN_PIXELS, MAX_PIXELS)
    # 14, 42, 70, ... lie half way between multiples of the factor: rounding half to even shows there.
    asked = [(h, w, *default) for h in (14, 42, 70, 98, 126, 154) for w in (14, 28, 42, 70, 98, 126, 350)]
    asked += [(side, side, *default) for side in (1, 2, 13, 15, 27, 28, 29, 55, 56, 57, 83, 84, 85, 1000, 3583, 3584, 3585, 5000)]
    asked += [(1, 200, *default), (200, 1, *default), (10, 2000, *default), (2000, 10, *default), (30, 6000, *default)]
    asked += [(8000, 8000, *default), (20000, 200, *default), (65535, 400, *default), (1036, 672, *default)]
    asked += [(70, 95, 784, 784), (260, 180, 784, 785), (100, 100, 50176, 50176), (28, 28, 3137, 4000), (56, 57, 3136, 3136)]
    asked += [(1080, 1920, 200704, 1003520), (1920, 1080, 4 * 784, 16384 * 784), (720, 1280, 128 * 784, 768 * 784)]
    draw = random.Random(SEED)
    while len(asked) < 520:
        most = draw.choice([100, 400, 2000, 6000])
        height, width = draw.randint(1, most), draw.randint(1, most)
        low, high = default
        if draw.random() < 0.5:
            low = draw.randint(1, 400) * 784
            high = low + draw.randint(0, 2000) * 784 + draw.randint(0, 783)
        asked.append((height, width, low, high))
    return asked


def main() -> None:
    chosen, refused = [], []
    for asked in sizes() + [(1, 201, MIN_PIXELS, MAX_PIXELS), (402, 2, MIN_PIXELS, MAX_PIXELS), (6001, 30, 784, 784)]:
        try:
            chosen.append([*asked, *smart_resize(asked[0], asked[1], FACTOR, asked[2], asked[3])])
        except ValueError:
            refused.append(list(asked))
    processor = Qwen2VLImageProcessor()
    pixels = []
    files = ["gradient_70x95", "noise_33x29", "stripes_200x28", "scene_260x180", "gray_90x60", "palette_84x84"]
    for name in files:
        path = f"tests/pictures/{name}.png"
        picture = open_picture(path)
        for width, height in [(56, 84), (28, 28), (112, 56), (252, 168), (420, 308)]:
            digest = pixel_sha256(resize_exactly(processor, picture, width, height))
            pixels.append({"file": path, "width": width, "height": height, "sha256": digest})
    for source in [(1, 1), (3, 200), (64, 48), (137, 211), (640, 480), (1001, 703)]:
        for width, height in [(28, 28), (56, 140), (280, 196), (672, 1036)]:
            digest = pixel_sha256(resize_exactly(processor, formula_picture(*source), width, height))
            pixels.append({"formula": source, "width": width, "height": height, "sha256": digest})
    # At its own size a picture is not touched.
    own = formula_picture(84, 56)
    if not np.array_equal(np.asarray(own), resize_exactly(processor, own, 84, 56)):
        raise RuntimeError("resizing to the same size changed pixels")
    pixels.append({"formula": (84, 56), "width": 84, "height": 56, "sha256": pixel_sha256(np.asarray(own))})
    # What libjpeg and the resize make of a photograph, to be compared with a tolerance.
    photograph = Image.open(REPOSITORY / "tests" / "pictures" / "cat.jpg")
    Image.fromarray(resize_exactly(processor, photograph, 140, 84)).save(GOLDENS / "cat_140x84.png", optimize=True)
    document = {"factor": FACTOR, "smart_resize": chosen, "refused": refused, "pixels": pixels}
    write_compact(GOLDENS / "resize.json", document, ("smart_resize", "refused", "pixels"))
    print(f"{len(chosen)} sizes, {len(refused)} refused, {len(pixels)} resized pictures")


if __name__ == "__main__":
    main()

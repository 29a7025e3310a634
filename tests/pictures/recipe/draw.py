"""Draws the small PNGs in tests/pictures. Every run gives the same pixels."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).resolve().parents[1]


def gradient(width: int, height: int) -> np.ndarray:
    """Two ramps and their sum: smooth, so that resizing errors stay visible as small steps."""
    x = np.arange(width)[None, :] * 255 // max(width - 1, 1)
    y = np.arange(height)[:, None] * 255 // max(height - 1, 1)
    return np.stack([x + 0 * y, y + 0 * x, (x + y) // 2], axis=-1).astype(np.uint8)


def noise(width: int, height: int, seed: int) -> np.ndarray:
    """Every pixel its own: the hardest case for a resize."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stripes(width: int, height: int) -> np.ndarray:
    """Lines one and three pixels wide, full contrast: overshoot of the bicubic filter is clipped here."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return (np.stack([x % 2, (x + y) // 3 % 2, y % 2], axis=-1) * 255).astype(np.uint8)


def scene(width: int, height: int) -> Image.Image:
    """A house under a sun: something with large shapes, unlike from window to window."""
    picture = Image.fromarray(gradient(width, height)[::-1].copy())
    draw = ImageDraw.Draw(picture)
    draw.ellipse([width * 0.7, height * 0.05, width * 0.9, height * 0.3], fill=(250, 220, 60))
    draw.rectangle([width * 0.2, height * 0.5, width * 0.6, height * 0.9], fill=(170, 60, 40))
    draw.polygon([(width * 0.15, height * 0.5), (width * 0.4, height * 0.25), (width * 0.65, height * 0.5)], fill=(90, 40, 30))
    draw.rectangle([width * 0.35, height * 0.65, width * 0.45, height * 0.9], fill=(40, 30, 80))
    return picture


def shapes(width: int, height: int) -> Image.Image:
    """A red circle left of a blue square, as the demonstration checkpoint knows them, without steps at their edges."""
    scale = 4
    picture = Image.new("RGB", (width * scale, height * scale), (205, 205, 190))
    draw = ImageDraw.Draw(picture)
    draw.ellipse([30 * scale, 56 * scale, 94 * scale, 120 * scale], fill=(216, 38, 38))
    draw.rectangle([134 * scale, 48 * scale, 190 * scale, 104 * scale], fill=(38, 84, 205))
    return picture.resize((width, height), Image.Resampling.BOX)


def on_white(picture: Image.Image) -> Image.Image:
    """The picture without its transparency, laid on white."""
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def main() -> None:
    def save(picture: Image.Image, name: str) -> None:
        picture.save(FOLDER / name, optimize=True)

    save(Image.fromarray(gradient(70, 95)), "gradient_70x95.png")
    save(Image.fromarray(noise(33, 29, 1)), "noise_33x29.png")
    save(Image.fromarray(stripes(200, 28)), "stripes_200x28.png")
    save(scene(260, 180), "scene_260x180.png")
    save(scene(112, 140), "scene_112x140.png")
    save(Image.fromarray(noise(56, 56, 2)), "noise_56x56.png")
    save(Image.fromarray(gradient(10, 300)), "gradient_10x300.png")
    save(scene(90, 60).convert("L"), "gray_90x60.png")
    save(shapes(224, 168), "shapes_224x168.png")
    save(scene(84, 84).quantize(16), "palette_84x84.png")
    clear = scene(100, 76).convert("RGBA")
    clear.putalpha(Image.fromarray(gradient(100, 76)[:, :, 0]))
    save(clear, "transparent_100x76.png")
    save(on_white(clear), "transparent_100x76_on_white.png")


if __name__ == "__main__":
    main()

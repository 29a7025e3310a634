"""Pictures and videos of coloured shapes and of digits, and what is true of them.

Lengths are pixels, times are seconds. Boxes are (left, top, right, bottom), right and bottom exclusive. Pixels are RGB u8, rows first.
Everything is drawn from a `numpy.random.Generator`, so that a seed names a scene.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (216, 38, 38),
    "orange": (250, 140, 20),
    "yellow": (245, 222, 50),
    "green": (40, 160, 60),
    "blue": (38, 84, 205),
    "purple": (132, 50, 172),
    "white": (245, 245, 245),
    "black": (18, 18, 18),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# How far a background stays from the colour of what is drawn on it, as a distance in RGB.
CONTRAST = 90.0
MIN_SIZE, MAX_SIZE = 30, 96
GAP = 6
SUPERSAMPLING = 4


@dataclass
class Shape:
    """One coloured shape; it fills its box."""

    kind: str
    color: str
    box: tuple[int, int, int, int]
    # When it comes into view.
    appears_s: float = 0.0
    # Where it goes, if it goes anywhere, and how many pixels a second.
    direction: str | None = None
    speed: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    def at(self, second: float) -> tuple[int, int, int, int]:
        """Its box at a time."""
        if self.direction is None:
            return self.box
        dx, dy = (round(part * self.speed * second) for part in DIRECTIONS[self.direction])
        left, top, right, bottom = self.box
        return left + dx, top + dy, right + dx, bottom + dy


@dataclass
class Scene:
    """What one picture or video shows. `frames` is [frames, height, width, 3]; a picture has one."""

    frames: np.ndarray
    shapes: list[Shape] = field(default_factory=list)
    digits: str = ""
    # Of each digit.
    digit_boxes: list[tuple[int, int, int, int]] = field(default_factory=list)
    # Frames per second; of a picture 0.
    rate: float = 0.0


@cache
def mask(kind: str, size: int) -> np.ndarray:
    """How much of each pixel of a size x size box the shape covers, 0 to 1."""
    steps = (np.arange(size * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING) * 2 - 1
    x, y = np.meshgrid(steps, steps)
    radius = np.hypot(x, y)
    if kind == "circle":
        inside = radius <= 1
    elif kind == "ring":
        inside = (radius <= 1) & (radius >= 0.55)
    elif kind == "square":
        inside = np.ones_like(x, dtype=bool)
    elif kind == "cross":
        inside = (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34)
    elif kind == "triangle":
        inside = np.abs(x) <= (y + 1) / 2
    else:
        inside = in_polygon(x, y, star())
    blocks = inside.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def star() -> np.ndarray:
    """The corners of a star with five points that fills the square from -1 to 1: [10, 2]."""
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    corners = np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return (corners - low) / (high - low) * 2 - 1


def in_polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Which points lie inside, by the number of edges to their right."""
    inside = np.zeros_like(x, dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float) -> list[tuple[float, float]]:
    """Points of an ellipse between two angles in degrees, clockwise from the right."""
    return [(cx + rx * np.cos(a), cy + ry * np.sin(a)) for a in np.radians(np.linspace(start, end, 13))]


# Lines through the middle of a digit's strokes, in a box that is 0.6 wide and 1 high.
DIGIT_LINES = {
    "0": [arc(0.3, 0.5, 0.24, 0.44, 0, 360)],
    "1": [[(0.12, 0.24), (0.34, 0.06), (0.34, 0.94)]],
    "2": [arc(0.3, 0.3, 0.23, 0.24, 180, 390) + [(0.06, 0.94), (0.55, 0.94)]],
    "3": [arc(0.28, 0.28, 0.22, 0.22, 200, 450) + arc(0.28, 0.72, 0.25, 0.22, 270, 520)],
    "4": [[(0.4, 0.94), (0.4, 0.06), (0.06, 0.66), (0.55, 0.66)]],
    "5": [[(0.5, 0.06), (0.12, 0.06), (0.1, 0.46)] + arc(0.28, 0.66, 0.25, 0.27, 230, 510)],
    "6": [[(0.44, 0.06), (0.12, 0.5)] + arc(0.3, 0.68, 0.24, 0.26, 200, 560)],
    "7": [[(0.06, 0.06), (0.54, 0.06), (0.22, 0.94)]],
    "8": [arc(0.3, 0.28, 0.2, 0.22, 0, 360), arc(0.3, 0.72, 0.25, 0.22, 0, 360)],
    "9": [[(0.16, 0.94), (0.48, 0.5)] + arc(0.3, 0.32, 0.24, 0.26, 20, -340)],
}


@cache
def digit_mask(digit: str, height: int, bold: bool) -> np.ndarray:
    """How much of each pixel of a digit's box its strokes cover, 0 to 1: [height, 0.6 height]."""
    x, y = np.meshgrid(np.arange(round(0.6 * height)) + 0.5, np.arange(height) + 0.5)
    distance = np.full(x.shape, np.inf)
    for line in DIGIT_LINES[digit]:
        for start, end in zip(line, line[1:]):
            (x1, y1), (x2, y2) = np.array(start) * height, np.array(end) * height
            dx, dy = x2 - x1, y2 - y1
            along = np.clip(((x - x1) * dx + (y - y1) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            distance = np.minimum(distance, np.hypot(x - x1 - along * dx, y - y1 - along * dy))
    return np.clip(height * (0.075 if bold else 0.05) - distance + 0.5, 0, 1).astype(np.float32)


class Backgrounds:
    """Plain, noisy, clouded and photographic backgrounds.

    A few photographs teach what is in these photographs. So that others are told from shapes as well, while training they are more frequent, are
    turned, mixed and take other colours, and clouds, some of them with edges, stand for photographs half of the time.
    """

    SCALES = (1.0, 0.6, 0.35)
    SIDE = 700
    CLOUDS = 16

    def __init__(self, photographs: list[Path], varied: bool = False):
        self.varied = varied
        self.photographs = []
        for path in sorted(photographs):
            picture = Image.open(path).convert("RGB")
            for scale in self.SCALES:
                size = (round(picture.width * scale), round(picture.height * scale))
                if min(size) >= 112:
                    self.photographs.append(np.asarray(picture.resize(size, Image.Resampling.BICUBIC)))
        if not self.photographs:
            raise FileNotFoundError(f"no photograph of at least 112 pixels in {photographs}")
        rng = np.random.default_rng(0)
        self.noise = rng.standard_normal((self.SIDE, self.SIDE, 3), dtype=np.float32)
        self.clouds = [self.cloud(rng) for _ in range(self.CLOUDS)] if varied else []

    def cloud(self, rng: np.random.Generator) -> np.ndarray:
        """Noise whose power falls with a power of its frequency, as in photographs: [side, side], 0 to 1."""
        frequency = np.hypot(np.fft.fftfreq(self.SIDE)[:, None], np.fft.rfftfreq(self.SIDE)[None])
        frequency[0, 0] = 1.0
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        field = np.fft.irfft2(phases / frequency ** rng.uniform(1.0, 1.9), (self.SIDE, self.SIDE))
        deviations = (field - field.mean()) / field.std()
        return np.clip(deviations / 4 + 0.5, 0, 1).astype(np.float32)

    def draw(self, rng: np.random.Generator, width: int, height: int, plain: float = 0.4, noisy: float = 0.3) -> np.ndarray:
        """One background, plain or noisy as often as said, and less often if varied."""
        if self.varied:
            plain, noisy = 0.7 * plain, 0.7 * noisy
        which = rng.random()
        if which < plain + noisy:
            pixels = np.empty((height, width, 3), dtype=np.float32)
            pixels[:] = rng.uniform(0, 255, 3) if rng.random() < 0.7 else np.full(3, rng.uniform(0, 255))
            if which >= plain:
                noise = self.piece(rng, self.noise, width, height)
                # Grey noise is the noise of one channel in all of them.
                pixels += (noise if rng.random() < 0.5 else noise[:, :, :1]) * rng.uniform(5, 40)
            return np.clip(pixels, 0, 255).astype(np.uint8)
        if self.varied and rng.random() < 0.5:
            return self.draw_clouds(rng, width, height)
        return self.draw_photograph(rng, width, height)

    @staticmethod
    def piece(rng: np.random.Generator, of: np.ndarray, width: int, height: int) -> np.ndarray:
        top, left = rng.integers(of.shape[0] - height + 1), rng.integers(of.shape[1] - width + 1)
        return of[top : top + height, left : left + width]

    def draw_clouds(self, rng: np.random.Generator, width: int, height: int) -> np.ndarray:
        """Two clouds that mix three colours, each smooth or in steps."""
        base, *others = rng.uniform(0, 255, (3, 3)).astype(np.float32)
        pixels = np.tile(base, (height, width, 1))
        for color in others:
            field = self.piece(rng, self.clouds[rng.integers(self.CLOUDS)], width, height)
            if rng.random() < 0.5:
                steps = int(rng.integers(2, 6))
                field = np.floor(field * steps * 0.999) / (steps - 1)
            pixels += (color - base) * field[:, :, None]
        return np.clip(pixels, 0, 255).astype(np.uint8)

    def draw_photograph(self, rng: np.random.Generator, width: int, height: int) -> np.ndarray:
        pixels = self.draw_piece(rng, width, height)
        if self.varied and rng.random() < 0.3:
            share = rng.uniform(0.3, 0.7)
            pixels = (pixels * share + self.draw_piece(rng, width, height) * (1 - share)).astype(np.uint8)
        return pixels

    def draw_piece(self, rng: np.random.Generator, width: int, height: int) -> np.ndarray:
        """Of one photograph."""
        photograph = self.photographs[rng.integers(len(self.photographs))]
        if self.varied and rng.random() < 0.5:
            photograph = photograph.transpose(1, 0, 2)
        # What a photograph is too small for is enlarged from a smaller piece of it.
        scale = max(1.0, width / photograph.shape[1], height / photograph.shape[0])
        pixels = self.piece(rng, photograph, int(width / scale), int(height / scale))
        if scale > 1:
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
        pixels = pixels[:: rng.choice((-1, 1)) if self.varied else 1, :: rng.choice((-1, 1))]
        if self.varied and rng.random() < 0.6:
            # Other channels, brightness and contrast.
            gain, shift = rng.uniform(0.5, 1.3, 3), rng.uniform(-40, 60, 3)
            pixels = np.clip(pixels[:, :, rng.permutation(3)] * gain + shift, 0, 255).astype(np.uint8)
        return pixels.copy()


def jittered(rng: np.random.Generator, color: str) -> np.ndarray:
    """A colour of this name."""
    return np.clip(np.array(COLORS[color]) + rng.integers(-12, 13, 3), 0, 255).astype(np.float32)


def stands_out(pixels: np.ndarray, box: tuple[int, int, int, int], color: str) -> bool:
    """Whether something of the colour can be told from what is behind it, on the whole."""
    left, top, right, bottom = box
    behind = pixels[top:bottom:3, left:right:3].astype(np.float32)
    distance = np.sqrt(((behind - np.array(COLORS[color], dtype=np.float32)) ** 2).sum(axis=2))
    return distance.mean() >= CONTRAST and (distance < CONTRAST / 2).mean() < 0.2


def paint(pixels: np.ndarray, cover: np.ndarray, box: tuple[int, int, int, int], color: np.ndarray) -> None:
    """Lays a colour on a picture where `cover`, as large as the box, is not 0. What is outside of the picture is cut off."""
    left, top, right, bottom = box
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if x1 >= x2 or y1 >= y2:
        return
    alpha = cover[y1 - top : y2 - top, x1 - left : x2 - left, None]
    behind = pixels[y1:y2, x1:x2]
    pixels[y1:y2, x1:x2] = (behind + (color - behind) * alpha + 0.5).astype(np.uint8)


def apart(box: tuple[int, int, int, int], others: list[tuple[int, int, int, int]]) -> bool:
    """Whether there is a gap between the box and all others."""
    left, top, right, bottom = box
    return all(
        right + GAP <= other[0] or other[2] + GAP <= left or bottom + GAP <= other[1] or other[3] + GAP <= top
        for other in others
    )


def draw_shapes(rng: np.random.Generator, backgrounds: Backgrounds, width: int, height: int, count: int) -> Scene:
    """A picture of `count` shapes that do not overlap, no two of them alike; of fewer, where there is no room."""
    pixels = backgrounds.draw(rng, width, height)
    # Few colours or few kinds make shapes that share one of them, which have to be told apart by the other.
    colors = list(rng.permutation(list(COLORS)))[: 2 if rng.random() < 0.3 else len(COLORS)]
    kinds = list(rng.permutation(KINDS))[: 2 if rng.random() < 0.3 else len(KINDS)]
    shapes: list[Shape] = []
    largest = min(MAX_SIZE, int(min(width, height) * (0.75 if count < 2 else 0.55)))
    for _ in range(count * 12):
        if len(shapes) == count:
            break
        size = int(rng.integers(MIN_SIZE, max(largest, MIN_SIZE) + 1))
        left, top = int(rng.integers(width - size + 1)), int(rng.integers(height - size + 1))
        shape = Shape(str(rng.choice(kinds)), str(rng.choice(colors)), (left, top, left + size, top + size))
        alike = any(shape.name == other.name for other in shapes)
        if not alike and apart(shape.box, [other.box for other in shapes]) and stands_out(pixels, shape.box, shape.color):
            shapes.append(shape)
        elif len(shapes) == 0 and count > 0:
            # A background on which nothing of few colours stands out gets another colour.
            colors = list(COLORS)
    for shape in shapes:
        paint(pixels, mask(shape.kind, shape.box[2] - shape.box[0]), shape.box, jittered(rng, shape.color))
    return Scene(pixels[None], shapes)


def draw_number(rng: np.random.Generator, backgrounds: Backgrounds, width: int, height: int) -> Scene:
    """A picture of a number from 10 to 99."""
    digits = str(rng.integers(10, 100))
    tallest = int(min(height * 0.9, width * 0.7, 100))
    size = int(rng.integers(min(44, tallest), tallest + 1))
    step = round(0.6 * size) + int(rng.integers(2, 8))
    bold = bool(rng.random() < 0.6)
    left = int(rng.integers(width - 2 * step + 1))
    top = int(rng.integers(height - size + 1))
    boxes = [(left + place * step, top, left + place * step + round(0.6 * size), top + size) for place in range(2)]
    while True:
        pixels = backgrounds.draw(rng, width, height, plain=0.6, noisy=0.2)
        color = str(rng.choice(list(COLORS)))
        if all(stands_out(pixels, box, color) for box in boxes):
            break
    ink = jittered(rng, color)
    for digit, box in zip(digits, boxes):
        paint(pixels, digit_mask(digit, size, bold), box, ink)
    return Scene(pixels[None], digits=digits, digit_boxes=boxes)


def draw_video(rng: np.random.Generator, backgrounds: Backgrounds, width: int, height: int, num_frames: int, rate: float) -> Scene:
    """A video in which one shape moves or appears at a full second, beside another one or none that does neither."""
    seconds = num_frames / rate
    while True:
        scene = draw_shapes(rng, backgrounds, width, height, 1 if rng.random() < 0.65 else 2)
        if scene.shapes:
            break
    shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
    # Frames are seen in pairs: what appears does so with the first of a pair.
    pair_s = 2 / rate
    moments = [s for s in range(1, 10) if s < seconds and (s / pair_s).is_integer()]
    if rng.random() < 0.5 and moments:
        shape.appears_s = float(moments[int(rng.integers(len(moments)))])
    else:
        size = shape.box[2] - shape.box[0]
        shape.direction = str(rng.choice(list(DIRECTIONS)))
        dx, dy = DIRECTIONS[shape.direction]
        room = (width if dx else height) - size
        way = int(rng.integers(min(24, room), room + 1))
        shape.speed = way / ((num_frames - 1) / rate)
        start = int(rng.integers(room - way + 1)) + (way if dx + dy < 0 else 0)
        left, top = (start, shape.box[1]) if dx else (shape.box[0], start)
        shape.box = (left, top, left + size, top + size)
    others = [other for other in scene.shapes if other is not shape]
    paths = [shape.at(frame / rate) for frame in range(num_frames)]
    while True:
        pixels = backgrounds.draw(rng, width, height)
        # What it would pass behind or in front of, or not be seen on, is left out or changed.
        if not all(stands_out(pixels, box, shape.color) for box in (paths[0], paths[-1])):
            continue
        break
    scene.shapes = [shape] + [
        other for other in others if stands_out(pixels, other.box, other.color) and all(apart(other.box, [box]) for box in paths)
    ]
    inks = [jittered(rng, one.color) for one in scene.shapes]
    frames = np.repeat(pixels[None], num_frames, axis=0)
    for frame in range(num_frames):
        for one, ink in zip(scene.shapes, inks):
            if frame / rate >= one.appears_s:
                box = one.at(frame / rate)
                paint(frames[frame], mask(one.kind, box[2] - box[0]), box, ink)
    return Scene(frames, scene.shapes, rate=rate)


def kinds() -> np.ndarray:
    """All kinds beside one another in black on white, for the drawing of the demonstration to be compared with."""
    pixels = np.full((48, 48 * len(KINDS), 3), 255, dtype=np.uint8)
    for place, kind in enumerate(KINDS):
        box = (4 + 48 * place, 4, 44 + 48 * place, 44)
        paint(pixels, mask(kind, 40), box, np.array(COLORS["black"], dtype=np.float32))
    return pixels


if __name__ == "__main__":
    Image.fromarray(kinds()).convert("L").save(Path(__file__).with_name("kinds.png"), optimize=True)

"""Writes the photographs to train on into a folder, from the packages that carry them.

Those to evaluate on, tests/pictures/cat.jpg and rocket.jpg, are not among them.
"""

import sys
from importlib.resources import files
from pathlib import Path

from PIL import Image

TRAINING = {
    "skimage": [f"data/{name}" for name in (
        "astronaut.png", "brick.png", "camera.png", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
        "motorcycle_left.png", "motorcycle_right.png", "retina.jpg",
    )],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}  # fmt: skip
LONGEST_SIDE = 800


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for package, names in TRAINING.items():
        for name in names:
            picture = Image.open(files(package) / name).convert("RGB")
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
            picture.save(folder / f"{Path(name).stem}.jpg", quality=92)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

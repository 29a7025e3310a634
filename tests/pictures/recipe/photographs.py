"""Makes the photographs in tests/pictures from the data in scikit-image 0.26.0.

pip download --no-deps scikit-image==0.26.0; unzip scikit_image-*.whl; photographs.py skimage
"""

import sys
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parents[1]


def main(skimage: Path) -> None:
    for source, name in [("chelsea.png", "cat.jpg"), ("coffee.png", "coffee.jpg"), ("rocket.jpg", "rocket.jpg")]:
        picture = Image.open(skimage / "data" / source).convert("RGB")
        picture.info.clear()
        picture.save(FOLDER / name, quality=85, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

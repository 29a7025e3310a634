"""Writes wide pictures and what the reference says of them, to the pixel: goldens/*.png and goldens/answers.json.

    python goldens.py CHECKPOINT

Boxes tell at once when something in the vision tower is not as in the reference, as windows are, which hardly show in words.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from evaluate import is_right, transformers
from model import CELL
from scenes import Backgrounds, draw_shapes
from tasks import Question, where

FOLDER = Path(__file__).with_name("goldens")
# In cells: each is wider than two windows of vision.
SIZES = [(12, 8), (12, 6), (10, 10), (12, 12)]
SHAPES = 4


def main(checkpoint: Path) -> None:
    ask = transformers(checkpoint, "f32")
    backgrounds = Backgrounds([FOLDER.parents[1] / "pictures" / "cat.jpg"])
    # Plain, since noise makes large files.
    draw_background = backgrounds.draw
    backgrounds.draw = lambda rng, width, height: draw_background(rng, width, height, plain=1.0, noisy=0.0)
    rng = np.random.default_rng(7)
    FOLDER.mkdir(exist_ok=True)
    answers = []
    for columns, rows in SIZES:
        scene = draw_shapes(rng, backgrounds, columns * CELL, rows * CELL, SHAPES)
        name = f"{columns * CELL}x{rows * CELL}.png"
        Image.fromarray(scene.frames[0]).save(FOLDER / name, optimize=True)
        for shape in scene.shapes:
            question = Question("box", f"Where is the {shape.name}?", where(shape), shape.box)
            answer = ask([scene], question.text)
            if not is_right(question, answer):
                raise SystemExit(f"{name}: {question.text} {answer}, not {question.answer}")
            answers.append({"picture": name, "question": question.text, "box": list(shape.box), "answer": answer})
    lines = ",\n".join(json.dumps(answer) for answer in answers)
    (FOLDER / "answers.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

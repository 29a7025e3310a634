"""Questions about scenes, and their answers."""

import json
from dataclasses import dataclass

import numpy as np

from scenes import COLORS, DIRECTIONS, KINDS, Scene, Shape

# Centers that are nearer to one another than this along an axis are not told apart by it.
CLEARLY_APART = 20


@dataclass
class Question:
    """One question about one picture, video or pair of pictures. `task` is what it is counted under."""

    task: str
    text: str
    answer: str
    # What is asked about; for boxes.
    box: tuple[int, int, int, int] | None = None


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def where(shape: Shape) -> str:
    """A box as the released checkpoints write it."""
    return json.dumps({"bbox_2d": list(shape.box), "label": shape.name})


def describe(shapes: list[Shape]) -> str | None:
    """What is there; nothing where the order is not clear."""
    if not shapes:
        return "nothing"
    if len(shapes) == 1:
        return with_article(shapes[0].name)
    if len(shapes) == 2:
        (x1, y1), (x2, y2) = (shape.center for shape in shapes)
        across, down = abs(x1 - x2), abs(y1 - y2)
        if max(across, down) < CLEARLY_APART or max(across, down) < 1.4 * min(across, down):
            return None
        axis = 0 if across > down else 1
        first, second = sorted(shapes, key=lambda shape: shape.center[axis])
        return f"{with_article(first.name)} {'left of' if axis == 0 else 'above'} {with_article(second.name)}"
    ordered = sorted(shapes, key=lambda shape: shape.center[0])
    lefts = [shape.center[0] for shape in ordered]
    if min(b - a for a, b in zip(lefts, lefts[1:])) < CLEARLY_APART / 2:
        return None
    names = [with_article(shape.name) for shape in ordered]
    return f"{', '.join(names[:-1])} and {names[-1]}"


DESCRIBE = {"picture": "What is in the picture?", "video": "What is in the video?"}
COUNT = "How many shapes are there?"
NUMBER = "Which number is it?"
PLACES = {1: "one", 2: "two"}


def about_shapes(rng: np.random.Generator, scene: Scene, medium: str = "picture") -> list[Question]:
    """All that can be asked about still shapes, in random order."""
    shapes = scene.shapes
    count = len(shapes)
    few = PLACES.get(count, "more" if count else "none")
    questions = [Question(f"count {few}", COUNT, str(count))]
    answer = describe(shapes)
    if answer is not None:
        questions.append(Question(f"describe {few}", DESCRIBE[medium], answer))
    for shape in shapes:
        questions.append(Question(f"box {few}", f"Where is the {shape.name}?", where(shape), shape.box))
        if sum(other.kind == shape.kind for other in shapes) == 1:
            questions.append(Question("color", f"Which color is the {shape.kind}?", shape.color))
        if sum(other.color == shape.color for other in shapes) == 1:
            questions.append(Question("kind", f"Which shape is {shape.color}?", shape.kind))
    color = str(rng.choice([shape.color for shape in shapes])) if shapes and rng.random() < 0.8 else str(rng.choice(list(COLORS)))
    kind = str(rng.choice([shape.kind for shape in shapes])) if shapes and rng.random() < 0.8 else str(rng.choice(KINDS))
    of_color, of_kind = sum(s.color == color for s in shapes), sum(s.kind == kind for s in shapes)
    questions.append(Question("count some", f"How many {color} shapes are there?", str(of_color)))
    plural = "crosses" if kind == "cross" else f"{kind}s"
    questions.append(Question("count some", f"How many {plural} are there?", str(of_kind)))
    return [questions[index] for index in rng.permutation(len(questions))]


def about_number(scene: Scene) -> list[Question]:
    return [Question("number", NUMBER, scene.digits)]


def about_video(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """What the first shape does, and what is there."""
    shape = scene.shapes[0]
    questions = []
    if shape.direction is not None:
        questions.append(Question("motion", f"Which way does the {shape.name} move?", shape.direction))
    else:
        questions.append(Question("second", f"At which second does the {shape.name} appear?", f"{shape.appears_s:.0f}"))
    questions.append(Question("video count", COUNT, str(len(scene.shapes))))
    if len(scene.shapes) == 1:
        questions.append(Question("video describe", DESCRIBE["video"], with_article(shape.name)))
    return [questions[0], *(questions[1:] if rng.random() < 0.5 else questions[:0:-1])]


def about_pair(rng: np.random.Generator, scenes: tuple[Scene, Scene]) -> list[Question]:
    """Two pictures compared: which of them shows something, and what is in one of them."""
    questions = []
    names = [{shape.name for shape in scene.shapes} for scene in scenes]
    everything = sorted(names[0] | names[1])
    for name in [everything[index] for index in rng.permutation(len(everything))]:
        answer = {(True, False): "the first", (False, True): "the second", (True, True): "both"}[name in names[0], name in names[1]]
        questions.append(Question("compare", f"Which picture shows {with_article(name)}?", answer))
    counts = [len(scene.shapes) for scene in scenes]
    more = "the first" if counts[0] > counts[1] else "the second" if counts[1] > counts[0] else "neither"
    questions.append(Question("compare", "Which picture has more shapes?", more))
    for place, scene in zip(("first", "second"), scenes):
        answer = describe(scene.shapes)
        if answer is not None:
            questions.append(Question("pair describe", f"What is in the {place} picture?", answer))
    return [questions[index] for index in rng.permutation(len(questions))]


def all_texts() -> list[str]:
    """Texts that have, between them, every token of every question and answer."""
    texts = [COUNT, NUMBER, *DESCRIBE.values(), "nothing", "the first", "the second", "both", "neither"]
    texts += ["Which picture has more shapes?", "What is in the first picture?", "What is in the second picture?"]
    for color in COLORS:
        texts += [color, f"How many {color} shapes are there?", f"Which shape is {color}?"]
        for kind in KINDS:
            name = f"{color} {kind}"
            texts += [kind, f"Where is the {name}?", f"Which color is the {kind}?", f"How many {kind}s are there?", "How many crosses are there?"]
            texts += [f"Which way does the {name} move?", f"At which second does the {name} appear?"]
            texts += [f"Which picture shows {with_article(name)}?", f"{with_article(name)} left of {with_article(name)} above {with_article(name)}"]
            texts += [f"{with_article(name)}, {with_article(name)} and {with_article(name)}", where(Shape(kind, color, (123, 45, 67, 890)))]
    return texts + list(DIRECTIONS)

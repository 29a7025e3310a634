"""Batches of scenes with several questions each: one row shares a prefix, the pictures, among branches, the questions.

A row is `prefix, media, branch, branch, ..., padding`. A branch sees the prefix and itself, and its positions go on after the media, so that
each is what a conversation with this one question would be.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model import CELL, TOKENS_PER_SECOND
from scenes import COLORS, DIRECTIONS, KINDS, Backgrounds, Scene, draw_number, draw_shapes, draw_video
from tasks import Question, about_number, about_pair, about_shapes, about_video

IMAGE_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1) * 255
IMAGE_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1) * 255
SYSTEM = "system\nYou are a helpful assistant."

# In cells of 28 pixels: columns, rows.
STILL_SIZES = [(4, 4), (5, 5), (6, 4), (4, 6), (6, 6), (7, 5), (8, 6), (6, 8), (7, 7), (8, 8), (10, 6), (6, 10), (12, 5), (9, 9), (10, 10), (12, 8)]
NUMBER_SIZES = [(4, 4), (5, 4), (5, 5), (6, 6), (7, 5), (8, 8)]
PAIR_SIZES = [(4, 4), (5, 4), (5, 5), (6, 5)]
VIDEO_SIZES = [(4, 4), (5, 4), (4, 5), (6, 5)]
# Frames a second; pairs of frames.
VIDEO_RATES, VIDEO_PAIRS = (1, 2, 4), (3, 4, 5, 6)
COUNT_WEIGHTS = (0.05, 0.27, 0.32, 0.14, 0.12, 0.10)


class CellLabels(NamedTuple):
    """What each cell of the media shows, for the auxiliary losses: [cells] each, but for `box`, [cells, 4]."""

    # 0 is nothing.
    kind: np.ndarray
    color: np.ndarray
    digit: np.ndarray
    # Whether the middle of a shape or digit lies in the cell.
    center: np.ndarray
    # Of what the cell shows, in cells from the picture's corner.
    box: np.ndarray
    # Which shape of the scene it shows; -1 is none.
    shape: np.ndarray
    # How far that goes from one pair of frames to the next, in cells: [cells, 2]. NaN where nobody can know.
    velocity: np.ndarray
    # Whether it appears with this pair of frames.
    appears: np.ndarray
    # Of the pair of frames, in seconds.
    time: np.ndarray


class Look(NamedTuple):
    """Where to look for an answer about one thing."""

    question: Question
    row: int
    # Of the answer.
    tokens: np.ndarray
    # Tokens of the row's media that show it.
    cells: np.ndarray


@dataclass
class Batch:
    """Tensors of rows of one length. `cells` are those of all rows, one after another."""

    # [pictures or pairs of frames, 1 or 2, 3, height, width], normalized.
    frames: Tensor
    # [rows, length].
    ids: Tensor
    # Which tokens stand for cells: [rows, length].
    pad: Tensor
    # M-RoPE: [rows, 3, length].
    positions: Tensor
    # Which tokens (the last axis) each token sees: [rows, 1, length, length].
    mask: Tensor
    # The token that is to follow each token; -100 where nothing is learnt: [rows, length].
    targets: Tensor
    # Which of `answers` the token belongs to, -1 for none: [rows, length].
    answer_of: Tensor
    # Questions of all rows, with what is right.
    answers: list[Question]
    # Of all cells of the batch.
    labels: CellLabels
    looks: list[Look]
    num_prefix: int


def label_cells(scene: Scene, rows: int, columns: int) -> list[CellLabels]:
    """One for each pair of frames, or for the picture."""
    pairs = range(max(1, len(scene.frames) // 2))
    labels = []
    for pair in pairs:
        second = pair * 2 / scene.rate if scene.rate else 0.0
        things: list[tuple[tuple[int, int, int, int], int, int, int, int]] = []
        velocities = []
        for index, shape in enumerate(scene.shapes):
            if shape.appears_s <= second:
                box = shape.at(second + (0.5 / scene.rate if scene.rate else 0.0))
                things.append((box, 1 + KINDS.index(shape.kind), 1 + list(COLORS).index(shape.color), 0, index))
                step = shape.speed * 2 / scene.rate / CELL if shape.direction else 0.0
                velocities.append([part * step for part in DIRECTIONS[shape.direction or "up"]] if pair > 0 else [np.nan] * 2)
        things += [(box, 0, 0, 1 + int(digit), -1) for digit, box in zip(scene.digits, scene.digit_boxes)]
        velocities += [[np.nan] * 2] * len(scene.digits)
        velocity = np.full((rows, columns, 2), np.nan, dtype=np.float32)
        kind, color, digit, center, whose, appears = (np.zeros((rows, columns), dtype=np.int64) for _ in range(6))
        boxes, best = np.zeros((rows, columns, 4), dtype=np.float32), np.full((rows, columns), 0.3)
        whose -= 1
        tops, lefts = np.arange(rows)[:, None] * CELL, np.arange(columns)[None] * CELL
        for (box, *which, index), step in zip(things, velocities):
            left, top, right, bottom = box
            high = np.clip(np.minimum(tops + CELL, bottom) - np.maximum(tops, top), 0, None)
            wide = np.clip(np.minimum(lefts + CELL, right) - np.maximum(lefts, left), 0, None)
            share = high * wide / CELL**2
            middle = min((top + bottom) // 2 // CELL, rows - 1), min((left + right) // 2 // CELL, columns - 1)
            share[middle] = max(share[middle], 0.5)
            mine = share > best
            best[mine] = share[mine]
            for grid, value in zip((kind, color, digit), which):
                grid[mine] = value
            whose[mine] = index
            velocity[mine] = step
            appears[mine] = index >= 0 and 0 < scene.shapes[index].appears_s == second
            center[middle] = 1
            boxes[mine] = np.array(box, dtype=np.float32) / CELL
        flat = (grid.ravel() for grid in (kind, color, digit, center))
        time = np.full(rows * columns, second, dtype=np.float32)
        labels.append(CellLabels(*flat, boxes.reshape(-1, 4), whose.ravel(), velocity.reshape(-1, 2), appears.ravel(), time))
    return labels


class Batches:
    """Draws batches. All that is drawn follows from the seed."""

    def __init__(self, tokenizer: Tokenizer, backgrounds: Backgrounds):
        self.tokenizer = tokenizer
        self.backgrounds = backgrounds
        self.encoded: dict[str, list[int]] = {}

        def control(name: str) -> int:
            return tokenizer.token_to_id(f"<|{name}|>")

        self.start, self.end = control("im_start"), control("im_end")
        self.vision_start, self.vision_end = control("vision_start"), control("vision_end")
        self.image_pad, self.video_pad = control("image_pad"), control("video_pad")
        newline = self.encode("\n")
        self.prefix = [self.start, *self.encode(SYSTEM), self.end, *newline, self.start, *self.encode("user\n")]
        self.ask = [self.end, *newline, self.start, *self.encode("assistant\n")]

    def encode(self, text: str) -> list[int]:
        if text not in self.encoded:
            if len(self.encoded) > 20_000:
                self.encoded.clear()
            self.encoded[text] = self.tokenizer.encode(text).ids
        return self.encoded[text]

    def draw(self, plan: np.random.Generator, rng: np.random.Generator, num_cells: int, kind: str) -> Batch:
        """A batch of about `num_cells` cells. `plan` decides its shape, which must be the same everywhere, `rng` the rest."""
        if kind == "shapes":
            columns, rows = STILL_SIZES[plan.integers(len(STILL_SIZES))]
            return self.assemble(rng, [self.still(rng, columns, rows) for _ in range(max(1, num_cells // (rows * columns)))], rows, columns, 120)
        if kind == "number":
            columns, rows = NUMBER_SIZES[plan.integers(len(NUMBER_SIZES))]
            drawn = [draw_number(rng, self.backgrounds, columns * CELL, rows * CELL) for _ in range(max(1, num_cells // (rows * columns)))]
            return self.assemble(rng, [([scene], about_number(scene)) for scene in drawn], rows, columns, 16)
        if kind == "pair":
            columns, rows = PAIR_SIZES[plan.integers(len(PAIR_SIZES))]
            return self.assemble(rng, [self.pair(rng, columns, rows) for _ in range(max(1, num_cells // (2 * rows * columns)))], rows, columns, 80)
        columns, rows = VIDEO_SIZES[plan.integers(len(VIDEO_SIZES))]
        pairs = int(plan.choice(VIDEO_PAIRS))
        items = []
        for _ in range(max(1, num_cells // (pairs * rows * columns))):
            scene = draw_video(rng, self.backgrounds, columns * CELL, rows * CELL, 2 * pairs, float(rng.choice(VIDEO_RATES)))
            items.append(([scene], about_video(rng, scene)))
        return self.assemble(rng, items, rows, columns, 52)

    def still(self, rng: np.random.Generator, columns: int, rows: int) -> tuple[list[Scene], list[Question]]:
        count = int(rng.choice(len(COUNT_WEIGHTS), p=COUNT_WEIGHTS))
        scene = draw_shapes(rng, self.backgrounds, columns * CELL, rows * CELL, count)
        return [scene], about_shapes(rng, scene)

    def pair(self, rng: np.random.Generator, columns: int, rows: int) -> tuple[list[Scene], list[Question]]:
        scenes = [draw_shapes(rng, self.backgrounds, columns * CELL, rows * CELL, int(rng.choice(3, p=(0.1, 0.6, 0.3)))) for _ in range(2)]
        return scenes, about_pair(rng, (scenes[0], scenes[1]))

    def assemble(
        self, rng: np.random.Generator, items: list[tuple[list[Scene], list[Question]]], rows: int, columns: int, num_text: int
    ) -> Batch:
        """Rows of media of rows x columns cells, and as many questions as `num_text` tokens hold, at least one."""
        scenes = items[0][0]
        is_video = scenes[0].rate > 0
        slices = max(1, len(scenes[0].frames) // 2)
        cells = slices * rows * columns
        num_prefix = len(self.prefix) + len(scenes) * (cells + 2)
        branches = [self.branches(questions, num_text) for _, questions in items]
        length = num_prefix + max(sum(len(ids) for _, ids, _ in row) for row in branches)
        count = len(items)
        ids = np.full((count, length), self.end)
        segment = np.full((count, length), -1)
        positions = np.zeros((count, 3, length), dtype=np.int64)
        targets, answer_of = np.full((count, length), -100), np.full((count, length), -1)
        pad = np.zeros((count, length), dtype=bool)
        answers, looks, labels, frames = [], [], [], []
        for row, ((media, _), asked) in enumerate(zip(items, branches)):
            where = len(self.prefix)
            ids[row, :where] = self.prefix
            positions[row, :, :where] = np.arange(where)
            position = where
            own = []
            for scene in media:
                own += label_cells(scene, rows, columns)
                ids[row, where], positions[row, :, where] = self.vision_start, position
                ids[row, where + 1 : where + 1 + cells] = self.video_pad if is_video else self.image_pad
                pad[row, where + 1 : where + 1 + cells] = True
                t, y, x = np.unravel_index(np.arange(cells), (slices, rows, columns))
                if is_video:
                    t = (t * (2 / scene.rate * TOKENS_PER_SECOND)).astype(np.int64)
                grid = np.stack([t, y, x]) + position + 1
                positions[row, :, where + 1 : where + 1 + cells] = grid
                position = int(grid.max()) + 1
                where += cells + 2
                ids[row, where - 1], positions[row, :, where - 1] = self.vision_end, position
                position += 1
                frames.append(scene.frames)
            labels += own
            shown = np.concatenate([part.shape for part in own])
            appears = np.concatenate([part.appears for part in own]) > 0
            segment[row, :where] = 0
            for index, (question, tokens, num_asked) in enumerate(asked):
                span = slice(where, where + len(tokens))
                ids[row, span], segment[row, span] = tokens, index + 1
                positions[row, :, span] = position + np.arange(len(tokens))
                answer = slice(where + num_asked - 1, where + len(tokens) - 1)
                targets[row, answer] = tokens[num_asked:]
                answer_of[row, answer] = len(answers)
                about = self.what_is_asked(question, media)
                if about is not None:
                    seen = (shown == about) & (appears if question.task == "second" else True)
                    cells_of = np.flatnonzero(seen) + len(self.prefix) + 1
                    looks.append(Look(question, row, np.arange(answer.start, answer.stop), cells_of))
                answers.append(question)
                where += len(tokens)
        same = (segment[:, :, None] == segment[:, None]) | (segment[:, None] == 0)
        mask = same & np.tril(np.ones((length, length), dtype=bool))
        pixels = np.concatenate(frames)
        pixels = pixels.reshape(len(pixels) // 2, 2, *pixels.shape[1:]) if is_video else pixels[:, None]
        normalized = (torch.from_numpy(pixels).permute(0, 1, 4, 2, 3).float() - IMAGE_MEAN) / IMAGE_STD
        return Batch(
            normalized, torch.from_numpy(ids), torch.from_numpy(pad), torch.from_numpy(positions), torch.from_numpy(mask)[:, None],
            torch.from_numpy(targets), torch.from_numpy(answer_of), answers, CellLabels(*(np.concatenate(part) for part in zip(*labels))),
            looks, num_prefix,
        )  # fmt: skip

    def branches(self, questions: list[Question], num_text: int) -> list[tuple[Question, list[int], int]]:
        """Questions with their tokens and how many of these come before the answer."""
        taken, used = [], 0
        for question in questions:
            asked = [*self.encode(question.text), *self.ask]
            tokens = [*asked, *self.encode(question.answer), self.end]
            if not taken or used + len(tokens) <= num_text:
                taken.append((question, tokens, len(asked)))
                used += len(tokens)
        return taken

    @staticmethod
    def what_is_asked(question: Question, media: list[Scene]) -> int | None:
        """The shape of the only picture or video that the whole question is about."""
        if len(media) != 1 or question.task.split()[0] not in ("box", "color", "kind", "motion", "second"):
            return None
        for index, shape in enumerate(media[0].shapes):
            is_it = {"color": shape.kind in question.text.split("the ")[-1], "kind": shape.color == question.text[:-1].split()[-1]}
            if is_it.get(question.task, f"the {shape.name}" in question.text):
                return index
        return None

"""How often answers about fresh drawings are right, by task.

    python evaluate.py --server HOST:PORT             # a running `lockstep serve`, over gRPC
    python evaluate.py --reference CHECKPOINT f32      # transformers on the same checkpoint, f32 or bf16

Prints one line of JSON: for each task, right answers of drawings. Backgrounds are plain, noisy, and photographs that were not trained on.
An answer is right if it is the expected text; a box, if it and the expected one share half of what they cover together.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from batches import NUMBER_SIZES, PAIR_SIZES, STILL_SIZES, VIDEO_PAIRS, VIDEO_RATES, VIDEO_SIZES
from model import CELL
from scenes import Backgrounds, Scene, draw_number, draw_shapes, draw_video
from tasks import Question, about_number, about_pair, about_shapes, about_video
from vocabulary import REPOSITORY

PHOTOGRAPHS = [REPOSITORY / "tests" / "pictures" / name for name in ("cat.jpg", "rocket.jpg")]
# Training draws with (5, step, process).
SEED = 1_000_003
MAX_TOKENS = 72
TASKS = [
    "describe one", "describe two", "describe more", "box one", "box two", "box more",
    "count none", "count one", "count two", "count more", "count some", "color", "kind",
    "number", "motion", "second", "video describe", "compare", "pair describe",
]  # fmt: skip

Case = tuple[list[Scene], Question]
Ask = Callable[[list[Scene], str], str]


def cases(task: str, number: int) -> Iterator[Case]:
    """As many drawings with a question of the task, the same ones every time."""
    backgrounds = Backgrounds(PHOTOGRAPHS)
    rng = np.random.default_rng((SEED, TASKS.index(task)))
    found = 0
    while found < number:
        media, questions = draw(rng, backgrounds, task)
        fitting = [question for question in questions if question.task == task]
        if fitting:
            found += 1
            yield media, fitting[int(rng.integers(len(fitting)))]


def draw(rng: np.random.Generator, backgrounds: Backgrounds, task: str) -> tuple[list[Scene], list[Question]]:
    def size(of: list[tuple[int, int]]) -> tuple[int, int]:
        columns, rows = of[int(rng.integers(len(of)))]
        return columns * CELL, rows * CELL

    if task == "number":
        scene = draw_number(rng, backgrounds, *size(NUMBER_SIZES))
        return [scene], about_number(scene)
    if task in ("motion", "second", "video describe"):
        scene = draw_video(rng, backgrounds, *size(VIDEO_SIZES), 2 * int(rng.choice(VIDEO_PAIRS)), float(rng.choice(VIDEO_RATES)))
        return [scene], about_video(rng, scene)
    if task in ("compare", "pair describe"):
        width, height = size(PAIR_SIZES)
        one, other = (draw_shapes(rng, backgrounds, width, height, int(rng.choice(3, p=(0.1, 0.6, 0.3)))) for _ in range(2))
        return [one, other], about_pair(rng, (one, other))
    counts = {"none": (0,), "one": (1,), "two": (2,), "more": (3, 4, 5)}.get(task.split()[-1], (1, 2, 3, 4, 5))
    scene = draw_shapes(rng, backgrounds, *size(STILL_SIZES), int(rng.choice(counts)))
    return [scene], about_shapes(rng, scene)


def overlap(answer: str, box: tuple[int, int, int, int]) -> float:
    """What two boxes share of what they cover; 0 for what is no box."""
    try:
        left, top, right, bottom = map(float, json.loads(answer)["bbox_2d"])
    except (ValueError, KeyError, TypeError):
        return 0.0
    shared = max(0.0, min(right, box[2]) - max(left, box[0])) * max(0.0, min(bottom, box[3]) - max(top, box[1]))
    covered = (right - left) * (bottom - top) + (box[2] - box[0]) * (box[3] - box[1]) - shared
    return shared / covered if covered > 0 else 0.0


def is_right(question: Question, answer: str) -> bool:
    return answer == question.answer if question.box is None else overlap(answer, question.box) >= 0.5


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def lockstep(address: str) -> Ask:
    """Asks a server, with stubs that are made from proto/."""
    import grpc
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as stubs:
        proto = REPOSITORY / "proto"
        arguments = [f"-I{proto}", f"--python_out={stubs}", f"--grpc_python_out={stubs}", str(proto / "lockstep/v1/inference.proto")]
        if "lockstep" not in sys.modules and protoc.main(["protoc", *arguments]) != 0:
            raise SystemExit("protoc failed")
        sys.path.append(stubs)
        from lockstep.v1 import inference_pb2 as pb
        from lockstep.v1 import inference_pb2_grpc

    service = inference_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(address))

    def part(scene: Scene) -> pb.Part:
        if not scene.rate:
            return pb.Part(image=pb.Image(data=png(scene.frames[0])))
        pixels = scene.frames.shape[1] * scene.frames.shape[2]
        frames = pb.VideoFrames(frames=[png(frame) for frame in scene.frames], rate=scene.rate)
        return pb.Part(video=pb.Video(frames=frames, min_pixels=pixels, max_pixels=pixels))

    def ask(media: list[Scene], question: str) -> str:
        message = pb.Message(role=pb.ROLE_USER, parts=[*map(part, media), pb.Part(text=question)])
        request = pb.GenerateRequest(chat=pb.Chat(messages=[message]), stopping=pb.Stopping(max_tokens=MAX_TOKENS))
        return service.Generate(request, timeout=60).choices[0].text

    return ask


def transformers(folder: Path, dtype: str) -> Ask:
    """Asks the reference."""
    import torch

    from check import inputs, load_model, load_processor

    model = load_model(folder, {"f32": torch.float32, "bf16": torch.bfloat16}[dtype])
    processor = load_processor(folder)

    def ask(media: list[Scene], question: str) -> str:
        made = inputs(processor, media, question, "")
        with torch.no_grad():
            tokens = model.generate(**made, max_new_tokens=MAX_TOKENS, do_sample=False)
        return processor.decode(tokens[0, made["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask


def right_answers(ask: Ask, tasks: list[str], number: int, wrong: list[dict] | None = None) -> dict[str, int]:
    """How many answers to `number` drawings of each task are right; what is not goes to `wrong`."""
    rights = {}
    for task in tasks:
        rights[task] = 0
        for media, question in cases(task, number):
            answer = ask(media, question.text)
            if is_right(question, answer):
                rights[task] += 1
            elif wrong is not None:
                wrong.append({"task": task, "question": question.text, "expected": question.answer, "answer": answer})
    return rights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--server", metavar="HOST:PORT")
    who.add_argument("--reference", nargs=2, metavar=("CHECKPOINT", "DTYPE"))
    parser.add_argument("--number", type=int, default=200, help="drawings of each task")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS)
    parser.add_argument("--wrong", type=Path, help="where to write wrong answers")
    args = parser.parse_args()
    ask = lockstep(args.server) if args.server else transformers(Path(args.reference[0]), args.reference[1])
    wrong: list[dict] = []
    print(json.dumps(right_answers(ask, args.tasks, args.number, wrong)))
    if args.wrong:
        args.wrong.write_text("".join(json.dumps(one) + "\n" for one in wrong))


if __name__ == "__main__":
    main()

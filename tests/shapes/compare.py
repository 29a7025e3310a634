"""Evaluates a checkpoint through Lockstep at several world sizes and through transformers, and prints one table.

    python compare.py CHECKPOINT LOCKSTEP [--number 200]

LOCKSTEP is the binary. Results are kept in `results.json` beside this file, with what was asked how often.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from evaluate import TASKS, right_answers, lockstep, transformers

SERVERS = [(world_size, dtype) for dtype in ("f32", "bf16") for world_size in (1, 2, 4)]
REFERENCES = ["f32", "bf16"]
RESULTS = Path(__file__).with_name("results.json")
# What the README calls the tasks.
NAMES = {
    "describe one": "one shape: what it is",
    "box one": "one shape: its box",
    "describe two": "two shapes: what they are, and where to one another",
    "box two": "two shapes: the box of one",
    "describe more": "three to five shapes: what they are, from left to right",
    "box more": "three to five shapes: the box of one",
    "count none": "count: none",
    "count one": "count: one",
    "count two": "count: two",
    "count more": "count: three to five",
    "count some": "count: those of a colour, or of a kind",
    "color": "the colour of the only shape of a kind",
    "kind": "the kind of the only shape of a colour",
    "number": "a number of two digits",
    "motion": "video: which way a shape moves",
    "second": "video: at which second a shape appears",
    "video describe": "video: what the shape is",
    "compare": "two pictures: which one shows something, or more",
    "pair describe": "two pictures: what is in one of them",
}


class Server:
    """A server that is stopped when it is not needed."""

    def __init__(self, binary: Path, checkpoint: Path, world_size: int, dtype: str):
        arguments = ["--model", checkpoint, "--world-size", str(world_size), "--dtype", dtype, "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen([binary, "serve", *arguments], stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready: "):
                return line.split()[1]
        raise SystemExit("the server ended before it was ready")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def table(results: dict[str, dict[str, int]], number: int) -> str:
    """Columns are what answered, rows are tasks."""
    lines = [f"| of {number} drawings each | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    for task in TASKS:
        cells = [f"{100 * rights[task] / number:.1f}" for rights in results.values()]
        lines.append(f"| {NAMES[task]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("lockstep", type=Path)
    parser.add_argument("--number", type=int, default=200, help="drawings of each task")
    args = parser.parse_args()
    results: dict[str, dict[str, int]] = {}

    def keep(name: str, rights: dict[str, int], began: float) -> None:
        results[name] = rights
        print(f"{name}: {sum(rights.values())} of {args.number * len(rights)} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    for world_size, dtype in SERVERS:
        began = time.monotonic()
        with Server(args.lockstep, args.checkpoint, world_size, dtype) as address:
            keep(f"{dtype}, {world_size} shard{'s' if world_size > 1 else ''}", right_answers(lockstep(address), TASKS, args.number), began)
    for dtype in REFERENCES:
        began = time.monotonic()
        keep(f"transformers, {dtype}", right_answers(transformers(args.checkpoint, dtype), TASKS, args.number), began)
    RESULTS.write_text(json.dumps({"number": args.number, "right": results}, indent=1) + "\n")
    print(table(results, args.number))


if __name__ == "__main__":
    main()

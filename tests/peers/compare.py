"""Runs Lockstep beside transformers on the same checkpoint and the same cores, in turns, and prints the ratios.

compare.py --checkpoint DIR --lockstep target/release/lockstep --rounds 3 [--world-size 1] [--python PYTHON]

Measured in each round, first one then the other: decoding at batch 1 (ms per token), prefill of 1,000 tokens (ms), vision encoding of a
1036 x 672 picture (ms). A ratio is transformers' time divided by Lockstep's: above 1, Lockstep is faster. bf16 on both sides.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEASURES = {
    "decode_ms_per_token": lambda peer: peer["decode"]["median_ms_per_token"],
    "prefill_1000_ms": lambda peer: peer["prefill"]["median_ms"],
    "vision_1036x672_ms": lambda peer: peer["vision"]["median_ms"],
}
# What `lockstep bench` reports for a measure, and the load that it is told to make.
LOADS = {
    "decode_ms_per_token": ("decode_per_token", ["--prompt-tokens", "64", "--max-tokens", "17"]),
    "prefill_1000_ms": ("prefill", ["--prompt-tokens", "1000", "--max-tokens", "1"]),
    "vision_1036x672_ms": ("vision", ["--prompt-tokens", "64", "--max-tokens", "1"]),
}


def run_transformers(arguments: argparse.Namespace) -> dict[str, float]:
    """One run of the peer: it loads, warms up, measures, and ends."""
    command = [arguments.python, HERE / "bench_transformers.py", "--checkpoint", arguments.checkpoint]
    command += ["--threads", str(len(os.sched_getaffinity(0))), "--repeat", str(arguments.repeat)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    peer = json.loads(output.splitlines()[-1])
    return {name: read(peer) for name, read in MEASURES.items()}


@contextlib.contextmanager
def serve(arguments: argparse.Namespace) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server that is ready, and its address; it is stopped in the end."""
    command = [arguments.lockstep, "serve", "--model", arguments.checkpoint, "--listen", "127.0.0.1:0", "--dtype", "bf16"]
    command += ["--world-size", str(arguments.world_size), "--kv-tokens", "4096", "--max-context-tokens", "4096"]
    command += ["--max-image-tokens", "1024", "--max-step-tokens", "1024"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield server, next(line.split()[1] for line in server.stdout if line.startswith("ready: "))
    finally:
        server.terminate()
        server.wait(timeout=60)


def bench(arguments: argparse.Namespace, address: str, name: str, picture: Path) -> float:
    """The median of a measure, by the server's own clock, of requests one after another."""
    figure, load = LOADS[name]
    command = [arguments.lockstep, "bench", "--server", address, "--json", "--requests", str(arguments.repeat), *load]
    command += ["--image", picture] if figure == "vision" else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output)["server_ms"][figure]["median"]


def run_lockstep(arguments: argparse.Namespace, picture: Path) -> dict[str, float]:
    """One run of Lockstep: a server is started, measured by `lockstep bench`, and stopped."""
    with serve(arguments) as (_, address):
        return {name: bench(arguments, address, name, picture) for name in MEASURES}


def draw(path: Path) -> None:
    """A picture of 1036 x 672 pixels: it has the model's size already."""
    from PIL import Image

    photograph = Image.open(HERE.parent / "pictures" / "coffee.jpg")
    photograph.resize((1036, 672), Image.Resampling.BICUBIC).save(path)


def lockstep_arguments(doc: str) -> argparse.ArgumentParser:
    """The arguments that every script needs which measures a server."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--lockstep", default=HERE.parents[1] / "target/release/lockstep")
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3, help="counted repetitions of each measure")
    return parser


def main() -> None:
    parser = lockstep_arguments(__doc__)
    parser.add_argument("--python", default=sys.executable, help="with requirements-transformers.txt")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both")
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        draw(picture)
        for turn in range(arguments.rounds):
            ours, theirs = run_lockstep(arguments, picture), run_transformers(arguments)
            rounds.append({"lockstep": ours, "transformers": theirs})
            print(json.dumps({"round": turn, **rounds[-1]}), flush=True)
    print(f"{'':24}{'lockstep':>12}{'transformers':>14}{'ratio: median':>16}{'(min .. max)':>18}")
    for name in MEASURES:
        ours = [turn["lockstep"][name] for turn in rounds]
        theirs = [turn["transformers"][name] for turn in rounds]
        ratios = [their / our for our, their in zip(ours, theirs)]
        spread = f"({min(ratios):.2f} .. {max(ratios):.2f})"
        print(f"{name:24}{statistics.median(ours):12.1f}{statistics.median(theirs):14.1f}{statistics.median(ratios):16.2f}{spread:>18}")


if __name__ == "__main__":
    main()

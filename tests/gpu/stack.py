"""The whole stack over gRPC on a GPU: answers that must be right, times, and a shard that is killed. Standard library only.

    stack.py answers --lockstep PROGRAM --world-sizes 1,2,4 [--sums host,peers]
    stack.py goldens --lockstep PROGRAM --world-sizes 1,2
    stack.py measure --lockstep PROGRAM --model DIR --measures FILE
    stack.py replay  --lockstep PROGRAM --model DIR

Ranks share one GPU, so that answers of several say whether they are right, and nothing of how fast they are.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests/shapes/goldens"
DEMO = ROOT / "tests/checkpoints/shapes"
# Whole answers of the reference, of a small checkpoint whose heads are as wide as the family's.
WHOLE = [ROOT / "tests/goldens/g.json", ROOT / "tests/goldens/g_videos.json"]
# How much farther than the reference's own bf16 log-probabilities may be from its f32. Of one case alone it is chance how far the
# reference's are, so that no bound is below that of the mean.
BF16_TIMES = 2.0
# Boxes are those of the reference in f32; in bf16 a side may be a few pixels off.
SAME_BOX = 0.8
PICTURE = ROOT / "tests/pictures/coffee.jpg"

# Of `measure`: name, and what `lockstep bench` is told. The second set is for stand-ins, on which a token takes most of a second.
LOADS = {
    "full": [
        ("text of 1024", ["--prompt-tokens", "1024", "--max-tokens", "128", "--requests", "6"]),
        ("text of 1024, 8 at a time", ["--prompt-tokens", "1024", "--max-tokens", "64", "--requests", "16", "--concurrency", "8"]),
        ("text of 1024, 32 at a time", ["--prompt-tokens", "1024", "--max-tokens", "64", "--requests", "64", "--concurrency", "32"]),
        ("text of 8192", ["--prompt-tokens", "8192", "--max-tokens", "1", "--requests", "3"]),
        ("text of 32768", ["--prompt-tokens", "32768", "--max-tokens", "64", "--requests", "2"]),
        ("picture of 1036x672 and 40 tokens", ["--prompt-tokens", "40", "--max-tokens", "16", "--requests", "8", "--image", str(PICTURE), "--resized-width", "1036", "--resized-height", "672"]),
    ],
    "dry": [
        ("text of 64", ["--prompt-tokens", "64", "--max-tokens", "3", "--requests", "1"]),
        ("text of 64, 2 at a time", ["--prompt-tokens", "64", "--max-tokens", "2", "--requests", "2", "--concurrency", "2"]),
        ("picture of 112x84 and 40 tokens", ["--prompt-tokens", "40", "--max-tokens", "2", "--requests", "1", "--image", str(PICTURE), "--resized-width", "112", "--resized-height", "84"]),
    ],
}
# Of the server, by size: contexts as long as the loads need, and steps as large as those of shard/examples/gpu.
SETTINGS = {
    "full": ["--max-context-tokens", "34816", "--max-step-tokens", "8192", "--max-image-tokens", "4096", "--silence-timeout", "60"],
    "dry": ["--max-context-tokens", "512", "--kv-tokens", "2048", "--max-step-tokens", "128", "--max-image-tokens", "128", "--silence-timeout", "60"],
}


class Failed(Exception):
    """What did not go as it should, in words."""


@contextlib.contextmanager
def serve(arguments: argparse.Namespace, model: Path, world_size: int, *more: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server on the GPU that is ready, and its address. It is stopped in the end."""
    gpu = os.environ.get("LOCKSTEP_TEST_GPU", "0")
    command = [arguments.lockstep, "serve", "--model", model, "--listen", "127.0.0.1:0", "--device", "cuda"]
    command += ["--world-size", str(world_size), "--gpus", ",".join([gpu] * world_size), *more]
    print("+", *command, flush=True)
    with tempfile.TemporaryFile("w+") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            address, said = None, []
            for line in server.stdout:
                said.append(line)
                if line.startswith("ready: "):
                    address = line.split()[1]
                    break
            if address is None:
                errors.seek(0)
                raise Failed(f"the server ended before it was ready:\n{''.join(said)}{errors.read()}")
            print("  " + "  ".join(line for line in said if not line.startswith("loading")), flush=True)
            yield server, address
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def ask(arguments: argparse.Namespace, address: str, *question: str) -> subprocess.Popen:
    command = [arguments.lockstep, "ask", "--server", address, "--json", *question]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(asked: subprocess.Popen) -> dict:
    output, errors = asked.communicate()
    if asked.returncode != 0:
        raise Failed(f"lockstep ask: {errors or output}")
    return json.loads(output)


def box(text: str) -> list[int] | None:
    try:
        return [int(side) for side in json.loads(text)["bbox_2d"]]
    except (ValueError, KeyError, TypeError):
        return None


def overlap(one: list[int], other: list[int]) -> float:
    """Of two boxes: what both cover, of what any of them covers."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    areas = [(side[2] - side[0]) * (side[3] - side[1]) for side in (one, other)]
    return common / max(sum(areas) - common, 1)


def answers(arguments: argparse.Namespace) -> None:
    """Asks what the reference was asked, of the demonstration checkpoint, at several world sizes on one GPU."""
    goldens = json.loads((GOLDENS / "answers.json").read_text())
    goldens = goldens[:2] if arguments.size == "dry" else goldens
    settings = ["--max-context-tokens", "1024", "--kv-tokens", "4096", "--gpu-memory", "0.5", "--silence-timeout", "60"]
    failures = []
    for world_size in map(int, arguments.world_sizes.split(",")):
        # Alone, a rank sums with nobody.
        for sums in arguments.sums.split(",") if world_size > 1 else ["none"]:
            name = f"{world_size} ranks on one GPU, sums {sums}"
            try:
                more = settings if sums == "none" else [*settings, "--sums", sums]
                with serve(arguments, DEMO, world_size, *more) as (_, address):
                    same, right = 0, 0
                    # Kernels of ranks that share a GPU wait for one another's turn in each sum.
                    asked = goldens[:4] if sums == "peers" else goldens
                    for golden in asked:
                        text = answer(ask(arguments, address, "--image", str(GOLDENS / golden["picture"]), golden["question"], "--temperature", "0"))["text"]
                        found, expected = box(text), box(golden["answer"])
                        same += text == golden["answer"]
                        is_right = found is not None and overlap(found, expected) >= SAME_BOX
                        right += is_right
                        if not is_right:
                            print(f"  {golden['question']} {text} is not {golden['answer']}")
                    print(f"{name}: {right} of {len(asked)} answers are the reference's box, {same} of them to the pixel", flush=True)
                    if right < len(asked):
                        failures.append(name)
            except Failed as failure:
                print(f"{name}: {failure}", flush=True)
                failures.append(name)
    if failures:
        raise Failed("not right: " + "; ".join(failures))


def question(case: dict, folder: Path) -> list[str] | None:
    """What `lockstep ask` is told to ask a golden case; none if it cannot be."""
    if len(case["messages"]) > 1:
        return None
    words = []
    for number, part in enumerate(case["messages"][0]["parts"]):
        if "text" in part:
            words.append(part["text"])
            continue
        if "image" in part:
            words += ["--image", str(ROOT / part["image"])]
        elif "rate" in part:
            frames = folder / f"{case['name']}-{number}"
            frames.mkdir()
            for index, frame in enumerate(part["frames"]):
                (frames / f"{index:02}.png").symlink_to(ROOT / frame)
            words += ["--frames", str(frames), "--fps", str(part["rate"])]
        else:
            return None
        for name in ("min_pixels", "max_pixels", "resized_width", "resized_height"):
            if name in part:
                words += [f"--{name.replace('_', '-')}", str(part[name])]
    return words


def beyond(case: dict, mean: float, got: dict) -> str | None:
    """What of an answer is not the reference's, as far as bf16 may tell; none if all is."""
    if got["prompt_token_ids"] != case["input_ids"]:
        return "another prompt"
    bound = BF16_TIMES * max(mean, case["full_bf16_max_error"])
    first = {token["id"]: token["logprob"] for token in got["logprobs"][0]["top"]}
    expected = case["first_logprobs"]
    # A token at the edge of the best 20 may fall out of them.
    errors = [abs(first[i] - logprob) for i, logprob in zip(expected["ids"], expected["logprobs"]) if i in first]
    for number, (token, reference, logprob) in enumerate(zip(got["logprobs"], case["greedy"], case["logprobs"])):
        top = {token["id"]: token["logprob"] for token in token["top"]}
        if token["id"] != reference:
            if token["logprob"] - top.get(reference, float("-inf")) > 2 * bound:
                return f"token {number} is {token['id']}, not {reference}"
            break
        errors.append(abs(token["logprob"] - logprob))
    return f"log-probabilities differ by {max(errors):.3f}, more than {bound:.3f}" if max(errors) > bound else None


def goldens(arguments: argparse.Namespace) -> None:
    """Asks what the reference was asked, about texts, pictures and frames of videos, and compares log-probabilities."""
    tokens = "4" if arguments.size == "dry" else "20"
    cases = [case for file in WHOLE for case in json.loads(file.read_text())["cases"]]
    mean = sum(case["full_bf16_max_error"] for case in cases) / len(cases)
    settings = ["--max-context-tokens", "512", "--kv-tokens", "4096", "--gpu-memory", "0.5", "--silence-timeout", "60"]
    failures = []
    for world_size in map(int, arguments.world_sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder, serve(arguments, ROOT / "tests/checkpoints/g", world_size, *settings) as (_, address):
            asked = [(case, words) for case in cases if (words := question(case, Path(folder)))]
            asked = asked[::8] if arguments.size == "dry" else asked
            wrong = 0
            for case, words in asked:
                greedy = ["--temperature", "0", "--repetition-penalty", "1", "--ignore-eos", "--max-tokens", tokens, "--logprobs", "20"]
                if what := beyond(case, mean, answer(ask(arguments, address, *words, *greedy))):
                    print(f"  {case['name']}: {what}", flush=True)
                    wrong += 1
            print(f"{world_size} ranks on one GPU: {len(asked) - wrong} of {len(asked)} answers are the reference's", flush=True)
            if wrong or not asked:
                failures.append(f"{world_size} ranks")
    if failures:
        raise Failed("not the reference's: " + "; ".join(failures))


def measure(arguments: argparse.Namespace) -> None:
    """`lockstep bench` with one load after the other, and what it says as lines of JSON."""
    with serve(arguments, arguments.model, 1, *SETTINGS[arguments.size]) as (_, address), open(arguments.measures, "w") as measures:
        failed = []
        for name, load in LOADS[arguments.size]:
            command = [arguments.lockstep, "bench", "--server", address, "--json", *load]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if done.returncode != 0:
                print(f"{name}: {done.stderr}", flush=True)
                failed.append(name)
                continue
            report = json.loads(done.stdout)
            kept = ("ttft_ms", "tpot_ms", "server_ms", "output_tokens_per_s", "prompt_tokens", "picture", "settings")
            measures.write(json.dumps({"name": f"service, {name}", **{key: report[key] for key in kept}}) + "\n")
            measures.flush()
            medians = {key: report[key] and round(report[key]["median"], 3) for key in ("ttft_ms", "tpot_ms")}
            print(f"{name}: {medians}, {report['output_tokens_per_s']:.1f} tokens/s", flush=True)
        if failed:
            raise Failed("no figures of " + ", ".join(failed))


def shards_of(server: subprocess.Popen) -> list[int]:
    shards = []
    for process in Path("/proc").glob("[0-9]*"):
        # Processes come and go.
        with contextlib.suppress(OSError):
            is_child = f"\nPPid:\t{server.pid}\n" in (process / "status").read_text()
            if is_child and b"\0shard\0" in (process / "cmdline").read_bytes():
                shards.append(int(process.name))
    return sorted(shards)


def replay(arguments: argparse.Namespace) -> None:
    """An answer must be the same, to the token and the bit of its log-probabilities, when the shard is killed in the middle of it."""
    tokens, wait_s = ("400", 0.7) if arguments.size == "full" else ("12", 2.0)
    question = ["Count as far as you can.", "--max-tokens", tokens, "--ignore-eos", "--temperature", "0", "--logprobs", "2"]
    with serve(arguments, arguments.model, 1, "--repeatable", *SETTINGS[arguments.size]) as (server, address):
        whole = answer(ask(arguments, address, *question))
        before = shards_of(server)
        asked = ask(arguments, address, *question)
        time.sleep(wait_s)
        if asked.poll() is not None:
            raise Failed("the answer was there before the shard could be killed")
        os.kill(before[0], signal.SIGKILL)
        start = time.monotonic()
        again = answer(asked)
        took = time.monotonic() - start
        after = shards_of(server)
    print(f"shard {before} was killed, and {after} took its place; the answer went on and was whole {took:.1f} s later")
    if set(before) & set(after):
        raise Failed("the shard is still the same process")
    for part in ("token_ids", "logprobs"):
        if whole[part] != again[part]:
            raise Failed(f"{part} are not the same: {whole[part]} and {again[part]}")
    print(f"{len(whole['token_ids'])} tokens and their log-probabilities are the same to the bit")


def main() -> None:
    # A stage whose time is over stops its server, which has the GPU, before it ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("answers", "goldens", "measure", "replay"))
    parser.add_argument("--lockstep", required=True)
    parser.add_argument("--size", choices=("full", "dry"), default="full")
    parser.add_argument("--world-sizes", default="1")
    parser.add_argument("--sums", default="host")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--measures", type=Path)
    arguments = parser.parse_args()
    try:
        {"answers": answers, "goldens": goldens, "measure": measure, "replay": replay}[arguments.what](arguments)
    except Failed as failure:
        sys.exit(f"failed: {failure}")


if __name__ == "__main__":
    main()

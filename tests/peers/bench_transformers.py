"""Times transformers in bf16 on the CPU and prints one line of JSON.

taskset -c 0,1 bench_transformers.py --checkpoint DIR --threads 2

Measured: decoding at batch 1 (ms per token, after a short prompt), prefill of a prompt of text (ms), vision encoding of one picture (ms).
Each is the median of its repetitions after one that is not counted; all are printed.
"""

import argparse
import json
import os
import statistics
import time

import torch
import transformers
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

PROMPT_TOKENS = 64
PATCH = 14


def median_ms(work, repeat: int) -> dict:
    """Times of `work` in milliseconds, its first run left out."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return {"median_ms": round(statistics.median(times), 3), "all_ms": [round(value, 3) for value in times]}


def random_prompt(model, tokens: int) -> torch.Tensor:
    """Ids of plain text: below the first control token of the real vocabulary and of a cut one."""
    vocab = model.config.image_token_id - 12
    return torch.randint(0, vocab, (1, tokens), generator=torch.Generator().manual_seed(0))


def positions(first: int, tokens: int) -> torch.Tensor:
    """M-RoPE positions of text: [3, 1, tokens]."""
    return torch.arange(first, first + tokens).expand(3, 1, tokens)


def bench_decode(model, tokens: int, repeat: int) -> dict:
    """Greedy decoding, `tokens` a repetition; times are per token."""
    prompt = random_prompt(model, PROMPT_TOKENS)
    cache = DynamicCache(config=model.config.text_config)
    logits = model(input_ids=prompt, position_ids=positions(0, PROMPT_TOKENS), past_key_values=cache, logits_to_keep=1).logits
    state = {"token": logits[:, -1:].argmax(-1), "length": PROMPT_TOKENS}

    def work() -> None:
        for _ in range(tokens):
            here = positions(state["length"], 1)
            logits = model(input_ids=state["token"], position_ids=here, past_key_values=cache, logits_to_keep=1).logits
            state["token"] = logits[:, -1:].argmax(-1)
            state["length"] += 1

    measured = median_ms(work, repeat)
    return {
        "tokens": tokens,
        "median_ms_per_token": round(measured["median_ms"] / tokens, 3),
        "all_ms_per_token": [round(value / tokens, 3) for value in measured["all_ms"]],
    }


def bench_prefill(model, tokens: int, repeat: int) -> dict:
    prompt = random_prompt(model, tokens)

    def work() -> None:
        cache = DynamicCache(config=model.config.text_config)
        model(input_ids=prompt, position_ids=positions(0, tokens), past_key_values=cache, logits_to_keep=1)

    return {"tokens": tokens, **median_ms(work, repeat)}


def bench_vision(model, width: int, height: int, repeat: int) -> dict:
    """The vision tower and merger on random pixels."""
    grid = torch.tensor([[1, height // PATCH, width // PATCH]])
    patches = int(grid.prod())
    pixels = torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=torch.Generator().manual_seed(0)).to(model.dtype)

    def work() -> None:
        model.model.visual(pixels, grid_thw=grid)

    return {"width": width, "height": height, "patches": patches, **median_ms(work, repeat)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="folder in the Hugging Face layout")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores it may run on")
    parser.add_argument("--only", default="decode,prefill,vision", help="which measures, separated by commas")
    parser.add_argument("--repeat", type=int, default=3, help="counted repetitions of each measure")
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--prefill-tokens", type=int, default=1000)
    parser.add_argument("--picture", default="1036x672", help="WIDTHxHEIGHT in pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.disable_progress_bar()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.checkpoint, dtype=torch.bfloat16).eval()
    width, height = map(int, arguments.picture.split("x"))
    measures = {
        "decode": lambda: bench_decode(model, arguments.decode_tokens, arguments.repeat),
        "prefill": lambda: bench_prefill(model, arguments.prefill_tokens, arguments.repeat),
        "vision": lambda: bench_vision(model, width, height, arguments.repeat),
    }
    result = {
        "peer": "transformers",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "dtype": "bf16",
        "attention": model.config._attn_implementation,
        "threads": arguments.threads,
        "cores": sorted(os.sched_getaffinity(0)),
    }
    with torch.inference_mode():
        for name in arguments.only.split(","):
            result[name] = measures[name]()
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Times transformers on a GPU: the same dimensions, random weights made on the GPU, sdpa attention, and decoding with a static cache under
torch.compile.

    transformers_bench.py --config CONFIG.json --json FILE [--budget SECONDS]

Measures go to FILE as lines of JSON, in the names of shard/examples/gpu, each as soon as it is there: compilation takes most of the time,
and what the budget does not reach is left out, saying so. Without a GPU for PyTorch the script says so and ends with 77.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

try:
    import torch
    import transformers
    from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, StaticCache
except ImportError as error:
    print(f"left out: {error}")
    sys.exit(77)

PATCH = 14
SIZES = {
    "full": {"prompts": (1024, 8192, 32768), "picture": (1036, 672), "decodes": ((1, 1024), (1, 32768), (8, 1024), (32, 1024), (8, 32768), (32, 32768)), "steps": 64},
    "dry": {"prompts": (64,), "picture": (112, 84), "decodes": ((1, 64), (2, 64)), "steps": 3},
}
# Of the question that comes with a picture.
QUESTION_TOKENS = 40


class Bench:
    def __init__(self, arguments: argparse.Namespace):
        self.device, self.out, self.end = arguments.device, arguments.json, time.monotonic() + arguments.budget
        self.backend = arguments.backend
        config = Qwen2_5_VLConfig(**json.loads(arguments.config.read_text()))
        with torch.device(self.device):
            model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model = model.eval()
        self.config = config

    def is_over(self, name: str) -> bool:
        if time.monotonic() < self.end:
            return False
        self.tell(name, left_out="the time was over")
        return True

    def tell(self, name: str, **what) -> None:
        print(name, what, flush=True)
        with self.out.open("a") as out:
            out.write(json.dumps({"name": name, **what}) + "\n")

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time(self, work, repeat: int, warmup: int = 1) -> list[float]:
        """Milliseconds of each call."""
        for _ in range(warmup):
            work()
        times = []
        for _ in range(repeat):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def text(self, batch: int, tokens: int) -> torch.Tensor:
        """Ids of plain text."""
        return torch.randint(0, self.config.image_token_id - 12, (batch, tokens), device=self.device)

    def positions(self, first: int, batch: int, tokens: int) -> torch.Tensor:
        return torch.arange(first, first + tokens, device=self.device).expand(3, batch, tokens)

    def prompt(self, tokens: int) -> None:
        name = f"prompt of {tokens} tokens"
        if self.is_over(name):
            return
        ids, positions = self.text(1, tokens), self.positions(0, 1, tokens)

        def work() -> None:
            cache = DynamicCache(config=self.config.text_config)
            self.model(input_ids=ids, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits.argmax(-1).item()

        times = self.time(work, 3)
        self.tell(name, ms=statistics.median(times), all_ms=times)

    def picture(self, width: int, height: int) -> None:
        name = f"vision encoding of {width} x {height} pixels"
        if self.is_over(name):
            return
        grid = torch.tensor([[1, height // PATCH, width // PATCH]], device=self.device)
        patches = int(grid.prod())
        pixels = torch.randn(patches, 3 * 2 * PATCH * PATCH, device=self.device, dtype=torch.bfloat16)
        times = self.time(lambda: self.model.model.visual(pixels, grid_thw=grid), 5, 2)
        self.tell(name, ms=statistics.median(times), all_ms=times)
        # The same with a short question, to the first token. What its processor does on the host is not in it.
        pads = torch.full((1, patches // 4), self.config.image_token_id, device=self.device)
        ids = torch.cat([self.text(1, QUESTION_TOKENS // 2), pads, self.text(1, QUESTION_TOKENS // 2)], 1)
        positions = self.positions(0, 1, ids.shape[1])

        def work() -> None:
            cache = DynamicCache(config=self.config.text_config)
            found = self.model(input_ids=ids, position_ids=positions, pixel_values=pixels, image_grid_thw=grid, past_key_values=cache, logits_to_keep=1)
            found.logits.argmax(-1).item()

        times = self.time(work, 5, 2)
        self.tell(f"picture of {width}x{height} and {QUESTION_TOKENS} tokens, to the first token", ms=statistics.median(times), all_ms=times)

    def decode(self, batch: int, context: int, steps: int) -> None:
        """Steps of a static cache whose content is random: it says how long they take, and the tokens mean nothing."""
        name = f"decode step of {batch} x {context} tokens"
        if self.is_over(name):
            return
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        cache = StaticCache(config=self.config.text_config, max_cache_len=context + 2 * steps + 16)
        token = self.text(batch, 1)
        # A first token has the cache reserve its memory.
        self.model(input_ids=token, position_ids=self.positions(0, batch, 1), past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
        forward = torch.compile(self.model.forward, **self.backend)
        state = {"token": token, "position": torch.full((3, batch, 1), context, device=self.device)}

        def work() -> None:
            if self.device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            logits = forward(input_ids=state["token"], position_ids=state["position"], past_key_values=cache, logits_to_keep=1, use_cache=True).logits
            state["token"] = logits[:, -1:].argmax(-1).clone()
            state["position"] += 1
            state["token"][0].item()

        start = time.monotonic()
        times = self.time(work, steps, 6)
        self.tell(name, ms=statistics.median(times), all_ms=times, seconds_with_compilation=time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--budget", type=float, default=165, help="seconds after which nothing new is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="do not compile: to try the script where there is no compiler")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("left out: PyTorch sees no GPU")
        sys.exit(77)
    arguments.json.unlink(missing_ok=True)
    arguments.backend = {"backend": "eager"} if arguments.eager else {"mode": "reduce-overhead", "dynamic": False}
    bench = Bench(arguments)
    bench.tell("versions", torch=torch.__version__, transformers=transformers.__version__, attention=bench.config._attn_implementation)
    size = SIZES[arguments.size]
    with torch.inference_mode():
        bench.picture(*size["picture"])
        for tokens in size["prompts"]:
            bench.prompt(tokens)
        for batch, context in size["decodes"]:
            try:
                bench.decode(batch, context, size["steps"])
            except torch.OutOfMemoryError as error:
                bench.tell(f"decode step of {batch} x {context} tokens", left_out=str(error).splitlines()[0])


if __name__ == "__main__":
    main()

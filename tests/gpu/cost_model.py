"""What a step costs on paper: bytes, operations and sums over ranks, and from these the TTFT and TPOT to expect at each world size.

    python cost_model.py [--config CONFIG.json] [--machine MACHINE.json] [--markdown]
    python cost_model.py --check RESULTS.jsonl

The first prints the tables for a machine; without --machine it is an H200 whose numbers are ASSUMPTIONS (see MACHINE below), not measurements.
The second takes the ceilings that `shard/examples/gpu` measured in RESULTS.jsonl in place of the assumed ones and prints, beside each
measure at world size 1, what the model says: where the two differ by much, the model or the code is wrong. Standard library only.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

HERE = Path(__file__).resolve().parent
BF16 = 2
F32 = 4
# Outputs of a linear layer come in units of this many (shard/src/device/api.rs).
UNIT = 16
WORLD_SIZES = (1, 2, 4, 8)
# Kernels of a layer: qkv, rotary and append, attention, its combination, o_proj, sum and norm, gate and up, activation, down, sum and
# norm.
KERNELS_PER_LAYER = 10
# Up to so many rows Lockstep's own kernels multiply, of which one computes gate, up and activation (shard/src/device/cuda/linear.rs). All
# kernels of a layer begin then before the one before them has ended (shard/src/device/cuda/kernels.rs).
MAX_GEMV_ROWS = 8
# Where a library multiplies, nothing begins early but these: attention and its combination follow no product.
EARLY_KERNELS_BESIDE_LIBRARY = 2
# Of each layer. Where they are sums over ranks nothing after them begins early.
NORMS_PER_LAYER = 2
# Kernels of a step that belong to no layer. The norm of the embeddings, the head, the end of the hash and that of the draw begin early;
# angles, tokens of the step before, embeddings, the beginning of the hash, the rows to draw from and the beginning of the draw do not.
KERNELS_PER_STEP = 6
EARLY_KERNELS_PER_STEP = 4
# The same of a block of the vision tower.
KERNELS_PER_BLOCK = 11

# Every number here is assumed. `--check` replaces the first two by what was measured, and shows how far the others are off; what it is
# worth that kernels begin early is what `shard/examples/gpu` measures of a layer, with and without.
MACHINE = {
    "name": "H200, assumed",
    # The datasheet says 4,800; kernels that only read are assumed to reach this.
    "read_gb_per_s": 4200.0,
    # The datasheet's, for dense bf16.
    "matrix_tflop_per_s": 989.0,
    # What Lockstep's own products of few rows reach of the read bandwidth, and prompts of the matrix rate.
    "read_share": 0.90,
    "matrix_share": 0.65,
    # What attention of prompts reaches of the matrix rate: it has softmax between two products, and mma.sync instructions.
    "attention_share": 0.35,
    # Beginning and end of a kernel in a graph, in which little is read: of one that begins when the one before it has ended, and of one
    # that begins before that and, if it multiplies, has its first weights under way by then.
    "kernel_us": 2.0,
    "early_kernel_us": 1.0,
    # Between two steps where the host waits for the one before: rows, launch of the graph, the draw and its way to the host.
    "step_us": 60.0,
    # The same where it has begun the next one already, as it does at every world size while sums go through the memory of GPUs and
    # tokens are drawn plainly: copies of rows and of what was drawn, and what is small and in no graph.
    "ahead_us": 20.0,
    # A server's share of a first token beside the shards' steps: gRPC, template, tokenizer. The goal says under 1 ms.
    "service_ttft_us": 1000.0,
    # A sum over ranks, or a gather of their candidates: microseconds of an empty one, by world size, and gigabytes a second that a GPU reads from the others.
    "sum_latency_us": {"2": 6.0, "4": 7.0, "8": 9.0},
    "sum_gb_per_s": 300.0,
}


@dataclass(frozen=True)
class Rank:
    """What a rank owns of the text model and of the vision tower."""

    query: int
    kv: int
    mlp: int
    vocab: int
    vision_heads: int
    vision_mlp: int


@dataclass(frozen=True)
class Cost:
    """Of a step, on the rank that needs longest for each: bytes read, operations of products and of attention, kernels, and those that
    begin early beside them; sums over ranks, each of so many bytes; and gathers of what ranks offer to draw, of next to none."""

    bytes: float = 0.0
    product_flops: float = 0.0
    attention_flops: float = 0.0
    kernels: int = 0
    early_kernels: int = 0
    sums: int = 0
    sum_bytes: float = 0.0
    gathers: int = 0


def heads_of_ranks(num_query: int, num_kv: int, world_size: int) -> list[tuple[int, int]]:
    """Query heads and heads of keys and values of each rank: the rule of shard/src/layers/partition.rs."""
    group = num_query // num_kv
    base, larger = divmod(num_query, world_size)
    best = None
    for chosen in combinations(range(world_size), larger):
        start, ranks = 0, []
        for rank in range(world_size):
            end = start + base + (rank in chosen)
            ranks.append((end - start, 0 if end == start else (end - 1) // group - start // group + 1))
            start = end
        kv = [rank[1] for rank in ranks]
        # Ties go to the larger ranges first: the smallest indices of `chosen`, which come first here.
        if best is None or (max(kv), sum(kv)) < best[0]:
            best = ((max(kv), sum(kv)), ranks)
    return best[1]


def columns(num_cols: int, rank: int, world_size: int) -> int:
    """Columns of a rank, padded: whole units, one more for the first ranks."""
    units = -(-num_cols // UNIT)
    base, larger = divmod(units, world_size)
    return UNIT * (base + (rank < larger))


class Model:
    """Dimensions of a checkpoint, and what its steps cost at each world size."""

    def __init__(self, config: dict):
        vision = config["vision_config"]
        self.hidden = config["hidden_size"]
        self.layers = config["num_hidden_layers"]
        self.query, self.kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = self.hidden // self.query
        self.mlp, self.vocab = config["intermediate_size"], config["vocab_size"]
        self.tied = config["tie_word_embeddings"]
        self.v_width, self.v_depth, self.v_heads = vision["hidden_size"], vision["depth"], vision["num_heads"]
        self.v_mlp, self.v_out = vision["intermediate_size"], vision["out_hidden_size"]
        self.v_full = len(vision["fullatt_block_indexes"])
        self.v_patch = vision["in_chans"] * vision["temporal_patch_size"] * vision["spatial_patch_size"] ** 2
        self.v_merge = vision["spatial_merge_size"] ** 2
        self.v_window = (vision["window_size"] // vision["spatial_patch_size"]) ** 2

    def ranks(self, world_size: int) -> list[Rank]:
        heads = heads_of_ranks(self.query, self.kv, world_size)
        vision = heads_of_ranks(self.v_heads, self.v_heads, world_size)
        vocab = -(-(-(-self.vocab // world_size)) // UNIT) * UNIT
        return [
            Rank(
                *heads[rank],
                columns(self.mlp, rank, world_size),
                vocab,
                vision[rank][0],
                columns(self.v_mlp, rank, world_size),
            )
            for rank in range(world_size)
        ]

    def layer_elements(self, rank: Rank) -> int:
        """Of the matrices of a layer."""
        attention = self.hidden * self.head_dim * (2 * rank.query + 2 * rank.kv)
        return attention + 3 * self.hidden * rank.mlp

    def checkpoint_bytes(self) -> int:
        """Of the whole checkpoint in bf16: what the sum of everything here must come to."""
        heads = self.head_dim * (self.query + 2 * self.kv)
        layer = self.layer_elements(Rank(self.query, self.kv, self.mlp, 0, 0, 0)) + heads + 2 * self.hidden
        text = self.layers * layer + self.hidden + (1 if self.tied else 2) * self.vocab * self.hidden
        width, mlp, joined = self.v_width, self.v_mlp, self.v_width * self.v_merge
        block = 4 * width * width + 4 * width + 3 * width * mlp + 2 * mlp + width + 2 * width
        merger = width + joined * joined + joined + joined * self.v_out + self.v_out
        vision = self.v_patch * width + self.v_depth * block + merger
        return BF16 * (text + vision)

    def decode(self, batch: int, context: int, world_size: int) -> Cost:
        """A step in which each of `batch` sequences of `context` tokens gets one more."""
        costs = []
        for rank in self.ranks(world_size):
            elements = self.layers * self.layer_elements(rank) + self.hidden * rank.vocab
            keys = self.layers * batch * context * 2 * rank.kv * self.head_dim * BF16
            attention = 4 * self.layers * batch * context * rank.query * self.head_dim
            costs.append((BF16 * elements + keys, 2.0 * batch * elements, attention))
        is_own = batch <= MAX_GEMV_ROWS
        total = self.layers * (KERNELS_PER_LAYER - is_own) + KERNELS_PER_STEP + EARLY_KERNELS_PER_STEP
        sums = NORMS_PER_LAYER * self.layers + 1 if world_size > 1 else 0
        if is_own:
            # What follows the last sum is the beginning of the hash, which is among those of the step.
            early = total - KERNELS_PER_STEP - max(sums - 1, 0)
        else:
            early = self.layers * EARLY_KERNELS_BESIDE_LIBRARY + EARLY_KERNELS_PER_STEP
        return Cost(
            *(max(cost) for cost in zip(*costs)),
            kernels=total - early,
            early_kernels=early,
            # Two of each layer and that of the embedding.
            sums=sums,
            sum_bytes=batch * self.hidden * BF16,
            gathers=int(world_size > 1),
        )

    def prompt(self, tokens: int, world_size: int) -> Cost:
        """All tokens of a prompt, and the draw of one."""
        costs = []
        for rank in self.ranks(world_size):
            elements = self.layers * self.layer_elements(rank)
            attention = 4 * self.layers * rank.query * self.head_dim * tokens * (tokens + 1) / 2
            costs.append((BF16 * (elements + self.hidden * rank.vocab), 2.0 * elements * tokens, attention))
        return Cost(
            *(max(cost) for cost in zip(*costs)),
            # Next to what they compute it matters little which of them begin early.
            kernels=self.layers * KERNELS_PER_LAYER + KERNELS_PER_STEP + EARLY_KERNELS_PER_STEP,
            sums=NORMS_PER_LAYER * self.layers + 1 if world_size > 1 else 0,
            sum_bytes=tokens * self.hidden * BF16,
            gathers=int(world_size > 1),
        )

    def picture(self, width: int, height: int, world_size: int) -> Cost:
        """The vision encoding of a picture, its blocks split by heads; embedding of patches and merger likewise by columns."""
        patches = (width // 14) * (height // 14)
        joined = self.v_width * self.v_merge
        merger = joined * (joined + self.v_out) / self.v_merge / world_size
        costs = []
        for rank in self.ranks(world_size):
            heads = rank.vision_heads * self.v_width // self.v_heads
            block = 4 * self.v_width * heads + 3 * self.v_width * rank.vision_mlp
            elements = self.v_depth * block + self.v_patch * self.v_width + merger
            seen = (self.v_depth - self.v_full) * min(self.v_window, patches) + self.v_full * patches
            costs.append((BF16 * elements, 2.0 * elements * patches, 4 * heads * seen * patches))
        return Cost(
            *(max(cost) for cost in zip(*costs)),
            kernels=self.v_depth * KERNELS_PER_BLOCK + 8,
            sums=2 * self.v_depth + 2 if world_size > 1 else 0,
            sum_bytes=patches * self.v_width * BF16,
        )

    def picture_tokens(self, width: int, height: int) -> int:
        return (width // 14) * (height // 14) // self.v_merge


def microseconds(cost: Cost, machine: dict, world_size: int, is_ahead: bool = False) -> dict[str, float]:
    """The parts of a step's time. Products wait for their weights or for the matrix units, whichever is longer."""
    read = cost.bytes / (machine["read_gb_per_s"] * machine["read_share"]) * 1e-3
    rate = machine["matrix_tflop_per_s"] * 1e6
    products = cost.product_flops / (rate * machine["matrix_share"])
    attention = cost.attention_flops / (rate * machine["attention_share"])
    sums = 0.0
    if world_size > 1:
        # A small sum is read whole from every other rank; of a large one each rank adds a part, which is sent to all: 2 (n - 1) / n.
        one_shot = (world_size - 1) * cost.sum_bytes
        two_shot = 2 * (world_size - 1) / world_size * cost.sum_bytes
        latency = machine["sum_latency_us"][str(world_size)]
        moved = min(one_shot, two_shot) / machine["sum_gb_per_s"] * 1e-3
        sums = cost.sums * (latency + moved) + cost.gathers * latency
    return {
        "weights and keys": read if read >= products else 0.0,
        "products": products if products > read else 0.0,
        "attention": attention if products > read else 0.0,
        "kernels": cost.kernels * machine["kernel_us"] + cost.early_kernels * machine["early_kernel_us"],
        "sums and gather": sums,
        "between steps": machine["ahead_us" if is_ahead else "step_us"],
    }


def tpot_ms(model: Model, machine: dict, batch: int, context: int, world_size: int, is_ahead: bool = True) -> float:
    return sum(microseconds(model.decode(batch, context, world_size), machine, world_size, is_ahead).values()) * 1e-3


def prompt_ms(model: Model, machine: dict, tokens: int, world_size: int) -> float:
    return sum(microseconds(model.prompt(tokens, world_size), machine, world_size).values()) * 1e-3


def picture_ms(model: Model, machine: dict, width: int, height: int, world_size: int) -> float:
    return sum(microseconds(model.picture(width, height, world_size), machine, world_size).values()) * 1e-3


def table(title: str, rows: list[tuple[str, list[str]]], markdown: bool) -> None:
    heads = [f"{world_size} GPU{'s' if world_size > 1 else ''}" for world_size in WORLD_SIZES]
    if markdown:
        print(f"| {title} | " + " | ".join(heads) + " |\n|---|" + "---|" * len(heads))
        for name, cells in rows:
            print(f"| {name} | " + " | ".join(cells) + " |")
    else:
        print(f"{title:56}" + "".join(f"{head:>12}" for head in heads))
        for name, cells in rows:
            print(f"{name:56}" + "".join(f"{cell:>12}" for cell in cells))
    print()


def print_tables(model: Model, machine: dict, markdown: bool) -> None:
    def of(cell) -> list[str]:
        return [cell(world_size) for world_size in WORLD_SIZES]

    print(f"{machine['name']}: {machine['read_gb_per_s']:.0f} GB/s, {machine['matrix_tflop_per_s']:.0f} TFLOP/s\n")
    split = [("query heads of each rank", of(lambda n: ",".join(str(rank.query) for rank in model.ranks(n))))]
    split += [("heads of keys and values of each rank", of(lambda n: ",".join(str(rank.kv) for rank in model.ranks(n))))]
    split += [("weights read by a decode step, GB on the fullest rank", of(lambda n: f"{model.decode(1, 0, n).bytes * 1e-9:.2f}"))]
    split += [("keys and values of a token, KB on the fullest rank", of(lambda n: f"{(model.decode(1, 1, n).bytes - model.decode(1, 0, n).bytes) * 1e-3:.1f}"))]
    split += [("prompt of 1,000 tokens, TFLOP on the fullest rank", of(lambda n: f"{(model.prompt(1000, n).product_flops + model.prompt(1000, n).attention_flops) * 1e-12:.2f}"))]
    split += [("1036 x 672 picture, TFLOP on the fullest rank", of(lambda n: f"{(model.picture(1036, 672, n).product_flops + model.picture(1036, 672, n).attention_flops) * 1e-12:.2f}"))]
    split += [(f"kernels of a decode step, batch {batch}, and those that begin early", of(lambda n, b=batch: f"{model.decode(b, 1024, n).kernels + model.decode(b, 1024, n).early_kernels}, {model.decode(b, 1024, n).early_kernels}")) for batch in (1, 32)]
    split += [("sums over ranks in a decode step", of(lambda n: str(model.decode(1, 1024, n).sums)))]
    table("a step", split, markdown)
    rows = [
        (f"TPOT, {batch} x {context:,} tokens, ms", of(lambda n, b=batch, c=context: f"{tpot_ms(model, machine, b, c, n):.2f}"))
        for context in (1024, 32768)
        for batch in (1, 8, 32)
    ]
    table("decode", rows, markdown)
    rows = [
        (f"TTFT, prompt of {tokens:,} tokens, ms", of(lambda n, t=tokens: f"{prompt_ms(model, machine, t, n) + machine['service_ttft_us'] * 1e-3:.1f}"))
        for tokens in (1024, 8192, 32768)
    ]
    rows.append(("vision encoding of a 1036 x 672 picture, ms", of(lambda n: f"{picture_ms(model, machine, 1036, 672, n):.1f}")))
    tokens = model.picture_tokens(1036, 672) + 40
    rows.append(
        (
            f"TTFT, that picture and a short question ({tokens} tokens), ms",
            of(lambda n: f"{picture_ms(model, machine, 1036, 672, n) + prompt_ms(model, machine, tokens, n) + machine['service_ttft_us'] * 1e-3:.1f}"),
        )
    )
    table("prompts and pictures", rows, markdown)
    parts = microseconds(model.decode(1, 1024, 1), machine, 1, True)
    rows = [
        (name, of(lambda n, name=name: f"{microseconds(model.decode(1, 1024, n), machine, n, True)[name]:.0f}"))
        for name in parts
        if name not in ("products", "attention")
    ]
    table("where a token's time goes at batch 1 and 1,024 tokens, us", rows, markdown)


def check(model: Model, machine: dict, path: Path) -> None:
    """What the model says beside what was measured at world size 1."""
    if not path.exists():
        sys.exit(f"{path} is not there: run the stage `in_process` first")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    measured = {line["name"]: line for line in lines if "ms" in line}
    reads = [line["bytes"] / line["ms"] * 1e-6 for name, line in measured.items() if "of the GPU's memory" in name or name.startswith("copy in")]
    products = [line["flops"] / line["ms"] * 1e-9 for name, line in measured.items() if name.startswith("product of")]
    machine = dict(machine)
    if reads:
        machine["read_gb_per_s"] = max(reads)
    if products:
        machine["matrix_tflop_per_s"] = max(products)
    print(f"ceilings: {machine['read_gb_per_s']:.1f} GB/s, {machine['matrix_tflop_per_s']:.1f} TFLOP/s")
    print(f"{'':52}{'model, ms':>12}{'measured':>12}{'measured / model':>18}")
    found = 0
    for name, line in measured.items():
        if match := re.fullmatch(r"decode step of (\d+) x (\d+) tokens", name):
            # Measured one after the other, by whoever waits for each.
            says = tpot_ms(model, machine, int(match[1]), int(match[2]), 1, False)
        elif match := re.fullmatch(r"prompt of (\d+) tokens", name):
            says = prompt_ms(model, machine, int(match[1]), 1)
        elif match := re.fullmatch(r"vision encoding of (\d+) x (\d+) pixels", name):
            says = picture_ms(model, machine, int(match[1]), int(match[2]), 1)
        else:
            continue
        found += 1
        print(f"{name:52}{says:12.3f}{line['ms']:12.3f}{line['ms'] / says:18.2f}")
    if found == 0:
        sys.exit(f"{path} has no measure of a whole step")


def self_test() -> None:
    """Against what is known of the 7B checkpoint and of its split."""
    model = Model(json.loads((HERE.parent / "tokenizer/model/config.json").read_text()))
    assert model.checkpoint_bytes() == 16_584_333_312, model.checkpoint_bytes()
    assert heads_of_ranks(28, 4, 8) == [(4, 1), (3, 1)] * 4
    assert heads_of_ranks(28, 4, 4) == [(7, 1)] * 4
    assert max(kv for _, kv in heads_of_ranks(28, 4, 3)) == 2
    assert [columns(18944, rank, 8) for rank in range(8)] == [2368] * 8
    assert [columns(3420, rank, 8) for rank in range(8)] == [432] * 6 + [416] * 2
    assert [(model.decode(batch, 1, n).kernels, model.decode(batch, 1, n).early_kernels) for batch, n in ((1, 1), (9, 1), (8, 2))] == [(6, 256), (230, 60), (62, 200)]
    assert model.decode(1, 1, 1).bytes - model.decode(1, 0, 1).bytes == 57_344
    print("as known")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=HERE.parent / "tokenizer/model/config.json", help="default: that of the 7B model")
    parser.add_argument("--machine", type=Path, help="JSON with what is to be other than assumed")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--check", type=Path, metavar="FILE", help="lines of JSON of shard/examples/gpu")
    parser.add_argument("--self-test", action="store_true")
    arguments = parser.parse_args()
    machine = MACHINE | (json.loads(arguments.machine.read_text()) if arguments.machine else {})
    model = Model(json.loads(arguments.config.read_text()))
    if arguments.self_test:
        self_test()
    elif arguments.check:
        check(model, machine, arguments.check)
    else:
        print_tables(model, machine, arguments.markdown)


if __name__ == "__main__":
    main()

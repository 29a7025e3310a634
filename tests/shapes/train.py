"""Trains the checkpoint on scenes that are drawn as they are needed.

    python train.py FOLDER --photographs PHOTOGRAPHS --steps 20000

FOLDER gets `state.pt` every few minutes, from which the same command goes on, and `train.log`. One process for each of `--processes`, one
thread each; they draw different scenes and share gradients.
"""

import argparse
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from batches import Batch, Batches
from model import TEXT, Model, initialize
from scenes import COLORS, KINDS, Backgrounds

# How often each kind of batch is drawn.
KINDS_OF_BATCH = {"shapes": 0.58, "number": 0.06, "video": 0.24, "pair": 0.12}
# (layer, head): heads that are taught to look at what is asked about.
LOOKING = [(2, 0), (3, 3)]
STATE_EVERY_S = 180
REPORT_EVERY = 50


class Hints(nn.Module):
    """Heads that exist during training only: what a cell shows, and where, from its feature and from inner layers of text."""

    def __init__(self):
        super().__init__()
        width = TEXT["hidden_size"]
        self.sizes = [1 + len(KINDS), 1 + len(COLORS), 11, 1, 4]
        self.what = nn.Linear(width, sum(self.sizes))
        # Column and row of the cell; the box of what it shows.
        self.place = nn.Linear(width, 2)
        self.box = nn.Linear(width, 4)
        self.velocity = nn.Linear(width, 2)
        # The box that is asked for, from each token of the answer.
        self.answer = nn.Linear(width, 4)
        self.time = nn.Linear(width, 1)
        self.appears = nn.Linear(width, 1)

    def of_features(self, features: Tensor, batch: Batch) -> Tensor:
        kind, color, digit, center, box = self.what(features.reshape(-1, features.shape[-1])).split(self.sizes, dim=1)
        labels = batch.labels
        rows, columns = (side // 28 for side in batch.frames.shape[-2:])
        cell = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1) + 0.5
        cell = cell.repeat(len(batch.frames), 2)
        shows = torch.from_numpy((labels.kind > 0) | (labels.digit > 0))
        target = torch.from_numpy(labels.box) - cell
        loss = F.cross_entropy(kind, torch.from_numpy(labels.kind)) + F.cross_entropy(color, torch.from_numpy(labels.color))
        loss = loss + F.cross_entropy(digit, torch.from_numpy(labels.digit))
        loss = loss + F.binary_cross_entropy_with_logits(center[:, 0], torch.from_numpy(labels.center).float())
        if shows.any():
            loss = loss + F.smooth_l1_loss(box[shows], target[shows], beta=0.1)
        return loss

    def of_states(self, states: list[Tensor], batch: Batch) -> Tensor:
        rows, columns = (side // 28 for side in batch.frames.shape[-2:])
        cell = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1).float().repeat(len(batch.frames), 1)
        loss = F.smooth_l1_loss(self.place(states[1][batch.pad]), cell / 4, beta=0.1)
        shows = torch.from_numpy(batch.labels.kind > 0)
        if shows.any():
            loss = loss + F.smooth_l1_loss(self.box(states[2][batch.pad][shows]), torch.from_numpy(batch.labels.box)[shows] / 4, beta=0.1)
        velocity = torch.from_numpy(batch.labels.velocity)
        known = ~velocity[:, 0].isnan()
        if known.any():
            loss = loss + F.smooth_l1_loss(self.velocity(states[2][batch.pad][known]), velocity[known], beta=0.1)
        if batch.labels.time.any():
            time = self.time(states[1][batch.pad])[:, 0]
            loss = loss + F.smooth_l1_loss(time, torch.from_numpy(batch.labels.time) / 4, beta=0.1)
            appears = self.appears(states[2][batch.pad][shows])[:, 0]
            loss = loss + F.binary_cross_entropy_with_logits(appears, torch.from_numpy(batch.labels.appears)[shows].float())
        asked = [look for look in batch.looks if look.question.box]
        if asked:
            row = torch.cat([torch.full((len(look.tokens),), look.row) for look in asked])
            token = torch.cat([torch.from_numpy(look.tokens) for look in asked])
            box = torch.cat([torch.tensor(look.question.box).expand(len(look.tokens), 4) for look in asked]) / (4 * 28)
            loss = loss + F.smooth_l1_loss(self.answer(states[3][row, token]), box, beta=0.1)
        return loss


def looking(model: Model, batch: Batch) -> Tensor:
    """How far a head of each layer of `LOOKING` is from looking at nothing but what is asked about."""
    losses = []
    if not batch.looks:
        return torch.zeros(())
    row = torch.cat([torch.full((len(look.tokens),), look.row) for look in batch.looks])
    token = torch.cat([torch.from_numpy(look.tokens) for look in batch.looks])
    wanted = torch.zeros(len(row), batch.ids.shape[1], dtype=torch.bool)
    at = 0
    for look in batch.looks:
        wanted[at : at + len(look.tokens), torch.from_numpy(look.cells)] = True
        at += len(look.tokens)
    seen = batch.mask[row, 0, token]
    for layer, head in LOOKING:
        attention = model.model.layers[layer].self_attn
        query = attention.last_q[row, head, token].float()
        keys = attention.last_k[:, head // (attention.heads // attention.kv_heads)].float()
        scores = torch.einsum("nd,nld->nl", query, keys[row]) / query.shape[-1] ** 0.5
        chances = scores.masked_fill(~seen, -torch.inf).log_softmax(dim=1)
        losses.append(-chances.masked_fill(~wanted, -torch.inf).logsumexp(dim=1).mean())
    return torch.stack(losses).mean()


class Muon:
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), each process for its share of the matrices."""

    def __init__(self, matrices: list[nn.Parameter], rank: int, world: int):
        self.matrices = matrices
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]
        self.mine = [index % world == rank for index in range(len(matrices))]
        self.world = world

    @staticmethod
    def orthogonal(matrix: Tensor) -> Tensor:
        a, b, c = 3.4445, -4.7750, 2.0315
        x = matrix.flatten(1).bfloat16()
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        return (x.T if tall else x).reshape(matrix.shape).float()

    def step(self, rate: float, momentum: float = 0.95) -> None:
        updates = []
        for matrix, momentum_of, mine in zip(self.matrices, self.momenta, self.mine):
            momentum_of.lerp_(matrix.grad, 1 - momentum)
            updates.append(self.orthogonal(matrix.grad.lerp(momentum_of, momentum)) if mine else torch.zeros_like(matrix))
        if self.world > 1:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat)
            updates = [part.view_as(matrix) for part, matrix in zip(flat.split([m.numel() for m in self.matrices]), self.matrices)]
        for matrix, update in zip(self.matrices, updates):
            rows, columns = matrix.flatten(1).shape
            matrix.data.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)


def rate_at(step: int, args: argparse.Namespace) -> float:
    """The learning rate as a part of the highest: up, level, and down to nothing over the last `decay` steps."""
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / args.decay)


class Trainer:
    """One process of them, with what it has learnt and how."""

    def __init__(self, rank: int, args: argparse.Namespace):
        self.rank, self.args = rank, args
        tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
        self.model, self.hints = Model(tokenizer.get_vocab_size()), Hints()
        initialize(self.model, args.seed)
        self.parameters = [*self.model.parameters(), *self.hints.parameters()]
        matrices = [p for name, p in self.model.named_parameters() if p.dim() > 1 and "embed_tokens" not in name]
        others = [p for p in self.parameters if not any(p is matrix for matrix in matrices)]
        self.muon = Muon(matrices, rank, args.processes)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        self.batches = Batches(tokenizer, Backgrounds(list(args.photographs.glob("*.jpg")), varied=True))
        self.step, self.seen = 0, 0
        self.rights, self.losses = defaultdict(list), defaultdict(list)

    def resume(self, path: Path) -> None:
        state = torch.load(path)
        self.step, self.seen = state["step"], state["seen"]
        self.model.load_state_dict(state["model"])
        self.hints.load_state_dict(state["hints"])
        self.adam.load_state_dict(state["adam"])
        for momentum, saved in zip(self.muon.momenta, state["momenta"]):
            momentum.copy_(saved)

    def save(self, path: Path) -> None:
        """Never leaves half a file."""
        state = {
            "step": self.step, "seen": self.seen, "model": self.model.state_dict(), "hints": self.hints.state_dict(),
            "adam": self.adam.state_dict(), "momenta": self.muon.momenta,
        }  # fmt: skip
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)

    def draw(self) -> Batch:
        """The batch of this step; of the same shape in every process."""
        plan = np.random.default_rng((self.args.seed, self.step))
        kind = str(plan.choice(list(KINDS_OF_BATCH), p=list(KINDS_OF_BATCH.values())))
        if self.step < self.args.vision_steps and kind in ("video", "pair"):
            kind = "shapes"
        return self.batches.draw(plan, np.random.default_rng((self.args.seed, self.step, 1 + self.rank)), self.args.cells, kind)

    def loss(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            features = self.model.visual(batch.frames)
            parts = {"what": self.hints.of_features(features.float(), batch)}
            if self.step >= self.args.vision_steps:
                states = self.model(batch.ids, features.flatten(0, 1), batch.pad, batch.positions, batch.mask)
                parts["where"] = self.hints.of_states([state.float() for state in states], batch)
                parts["look"] = looking(self.model, batch)
                learnt = batch.targets >= 0
                logits = self.model.logits(states[-1][learnt]).float()
                parts["text"] = F.cross_entropy(logits, batch.targets[learnt])
                count_right(self.rights, batch, logits, batch.targets[learnt], learnt)
        for name, part in parts.items():
            self.losses[name].append(part.item())
        weights = {"what": self.args.hints, "where": self.args.hints, "look": self.args.looks, "text": 1.0}
        return sum((weights[name] * part for name, part in parts.items()), torch.zeros(()))

    def learn(self) -> None:
        """One step."""
        batch = self.draw()
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.loss(batch).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        if self.args.processes > 1:
            dist.all_reduce(gradients)
            gradients /= self.args.processes
        gradients *= min(1.0, self.args.clip / (float(gradients.norm()) + 1e-6))
        for parameter, part in zip(self.parameters, gradients.split([p.numel() for p in self.parameters])):
            parameter.grad = part.view_as(parameter)
        rate = rate_at(self.step, self.args)
        self.adam.param_groups[0]["lr"] = self.args.adam_rate * rate
        self.adam.step()
        self.muon.step(self.args.muon_rate * rate)
        self.seen += self.args.processes * len(batch.ids)
        self.step += 1

    def report(self, seconds: float) -> None:
        """One line of the log, over the steps since the last one."""
        told = " ".join(f"{name} {np.mean(values):.3f}" for name, values in self.losses.items())
        right = " ".join(f"{task.replace(' ', '-')} {np.mean(values):.2f}" for task, values in sorted(self.rights.items()))
        rate = rate_at(self.step - 1, self.args)
        line = f"{self.step} seen {self.seen} rate {rate:.2f} {seconds / REPORT_EVERY:.2f} s/step | {told} | {right}"
        print(line, flush=True)
        with (self.args.folder / "train.log").open("a") as log:
            log.write(line + "\n")
        self.losses.clear()
        if self.step % (4 * REPORT_EVERY) == 0:
            self.rights.clear()


def train(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.nice(args.nice)
    torch.manual_seed(args.seed)
    if args.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{args.folder.resolve()}/rendezvous", rank=rank, world_size=args.processes)
    trainer, path = Trainer(rank, args), args.folder / "state.pt"
    if path.exists():
        trainer.resume(path)
    began = reported = saved = time.monotonic()
    while trainer.step < args.steps:
        trainer.learn()
        now = time.monotonic()
        if rank == 0 and trainer.step % REPORT_EVERY == 0:
            trainer.report(now - reported)
            reported = now
        if rank == 0 and (now - saved > STATE_EVERY_S or trainer.step == args.steps):
            trainer.save(path)
            saved = now
    if rank == 0:
        print(f"at step {trainer.step} after {(time.monotonic() - began) / 60:.0f} min", flush=True)


def count_right(rights: dict, batch: Batch, logits: Tensor, targets: Tensor, learnt: Tensor) -> None:
    """Of each answer, whether every token is the most probable one after those before it: whether greedy decoding gives it."""
    wrong = (logits.argmax(dim=1) != targets).numpy()
    whose = batch.answer_of[learnt].numpy()
    per_answer = np.zeros(len(batch.answers), dtype=bool)
    np.logical_or.at(per_answer, whose, wrong)
    for question, is_wrong in zip(batch.answers, per_answer):
        rights[question.task].append(not is_wrong)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--vision-steps", type=int, default=800, help="first steps in which only what cells show is learnt")
    parser.add_argument("--decay", type=int, default=3_000, help="last steps over which the rate falls to 0")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--cells", type=int, default=640, help="cells of a step and process")
    parser.add_argument("--muon-rate", type=float, default=0.005)
    parser.add_argument("--adam-rate", type=float, default=1e-3)
    parser.add_argument("--hints", type=float, default=0.3)
    parser.add_argument("--looks", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "tokenizer.json").exists():
        import json

        from vocabulary import cut

        (args.folder / "tokenizer.json").write_text(json.dumps(cut(), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    (args.folder / "rendezvous").unlink(missing_ok=True)
    if args.processes == 1:
        train(0, args)
    else:
        torch.multiprocessing.spawn(train, (args,), nprocs=args.processes)

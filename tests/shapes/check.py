"""Compares what is trained with the reference on the same weights: pixels, prompts, positions and logits of every kind of batch.

    python check.py CHECKPOINT PHOTOGRAPHS
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from batches import Batches
from export import REPOSITORY
from model import Model
from scenes import Backgrounds, Scene

sys.path.append(str(REPOSITORY / "tests" / "goldens" / "recipe"))
from reference import load_model, load_processor  # noqa: E402

TOLERANCE = 1e-4


def conversation(media: list[Scene], question: str) -> list[dict]:
    parts = [{"type": "video" if scene.rate else "image"} for scene in media]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def inputs(processor, media: list[Scene], question: str, answer: str) -> dict:
    """What the reference's processor makes of a conversation that ends with an answer."""
    text = processor.apply_chat_template(conversation(media, question), add_generation_prompt=True, tokenize=False)
    if not media[0].rate:
        return processor(text=[text + answer], images=[Image.fromarray(scene.frames[0]) for scene in media], return_tensors="pt")
    scene = media[0]
    pixels = scene.frames.shape[1] * scene.frames.shape[2]
    # The default bounds enlarge a small frame.
    size = {"shortest_edge": pixels, "longest_edge": pixels * len(scene.frames)}
    made = processor(
        text=[text + answer], videos=[torch.from_numpy(scene.frames).permute(0, 3, 1, 2)], return_tensors="pt",
        videos_kwargs={"do_sample_frames": False, "size": size, "do_resize": False, "fps": scene.rate},
    )  # fmt: skip
    made["second_per_grid_ts"] = torch.tensor([2 / scene.rate])
    return made


def main(folder: Path, photographs: Path) -> None:
    model, processor = load_model(folder, torch.float32), load_processor(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own = Model(tokenizer.get_vocab_size())
    own.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    batches = Batches(tokenizer, Backgrounds(list(photographs.glob("*.jpg"))))
    for kind in ("shapes", "number", "pair", "video"):
        worst = 0.0
        for seed in range(4):
            media_of: list[list[Scene]] = []
            assemble = batches.assemble

            def remember(rng, items, *rest):
                media_of.extend(media for media, _ in items)
                return assemble(rng, items, *rest)

            batches.assemble = remember
            batch = batches.draw(np.random.default_rng(seed), np.random.default_rng(seed), 200, kind)
            batches.assemble = assemble
            with torch.no_grad():
                states = own(batch.ids, own.visual(batch.frames).flatten(0, 1), batch.pad, batch.positions, batch.mask)[-1]
                for index, question in enumerate(batch.answers):
                    row, token = (where[0] for where in torch.nonzero(batch.answer_of == index, as_tuple=True))
                    made = inputs(processor, media_of[row], question.text, question.answer)
                    logits = model(**made).logits[0]
                    length = int((batch.answer_of == index).sum())
                    expected = logits[-length:]
                    # The answer's last token is followed by the end of the turn, which the processor was not given.
                    got = own.logits(states[row, token : token + length])
                    worst = max(worst, float((expected - got).abs().max()))
        print(f"{kind}: logits differ by at most {worst:.2e}")
        if worst > TOLERANCE:
            raise SystemExit(f"{kind}: more than {TOLERANCE}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""A tokenizer cut from the family's own: all bytes, the tokens that the texts need, and the control tokens."""

import json
import lzma
import sys
from pathlib import Path

from tokenizers import Tokenizer

from tasks import all_texts

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENIZER = REPOSITORY / "tests" / "tokenizer"
BYTE_TOKENS = 256
# Of the chat template, and of texts that people may type.
MORE_TEXTS = [
    "system\nYou are a helpful assistant.\nuser\nassistant\n",
    "Describe this picture. Describe the video. Is there a shape in the image? Yes, no. Where are they? What does it do? Which one is it?",
    "What colour is it? What number is it? Tell me what you see. to the right of, below, on top, between, inside, picture 1, Picture 2: ",
    "pink brown gray grey cyan diamond heart arrow line pentagon hexagon rectangle oval Red Green Blue Yellow Purple White Black Orange",
]


def full_tokenizer() -> dict:
    return json.loads(lzma.open(TOKENIZER / "tokenizer.json.xz").read())


def cut() -> dict:
    """The tokenizer.json with the tokens that the texts need and those that these are merged from, renumbered in their order."""
    document = full_tokenizer()
    model = document["model"]
    by_id = sorted(model["vocab"], key=model["vocab"].get)
    parts = {"".join(pair.split(" ")): tuple(pair.split(" ")) for pair in reversed(model["merges"])}
    full = Tokenizer.from_str(json.dumps(document))
    needed: set[str] = set()

    def need(token: str) -> None:
        if token not in needed:
            needed.add(token)
            for part in parts.get(token, ()):
                need(part)

    texts = all_texts() + MORE_TEXTS
    for text in texts:
        for token in full.encode(text).tokens:
            need(token)
    kept = by_id[:BYTE_TOKENS] + [token for token in by_id[BYTE_TOKENS:] if token in needed]
    model["vocab"] = {token: index for index, token in enumerate(kept)}
    model["merges"] = [pair for pair in model["merges"] if {"".join(pair.split(" ")), *pair.split(" ")} <= set(kept)]
    for index, token in enumerate(document["added_tokens"]):
        token["id"] = len(kept) + index
    short = Tokenizer.from_str(json.dumps(document))
    for text in texts:
        if short.encode(text).tokens != full.encode(text).tokens:
            raise RuntimeError(f"{text!r} is cut into {short.encode(text).tokens}, not {full.encode(text).tokens}")
    return document


def added_tokens(document: dict) -> dict[str, int]:
    return {token["content"]: token["id"] for token in document["added_tokens"]}


if __name__ == "__main__":
    document = cut()
    Path(sys.argv[1]).write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{len(document['model']['vocab'])} tokens and {len(document['added_tokens'])} control tokens")

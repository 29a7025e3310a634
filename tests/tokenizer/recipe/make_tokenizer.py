"""Makes tests/tokenizer/tokenizer.json.xz from the vocabulary in the PyPI package dashscope 2.0.2 (Apache-2.0).

pip download --no-deps dashscope==2.0.2; unzip dashscope-*.whl; make_tokenizer.py dashscope/resources/qwen.tiktoken

The vocabulary there lists byte strings by rank. A merge is not listed: it is what byte-pair encoding makes of a token with only the
ranks below its own, which are the two parts that the last merge joined.
"""

import base64
import json
import lzma
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]

# The pattern of the family's text splitting (Qwen's own `tokenization_qwen2`).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in own}
    for shift, byte in enumerate(byte for byte in range(256) if byte not in characters):
        characters[byte] = chr(256 + shift)
    return characters


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that make the token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, len(ranks)), at) for at, (a, b) in enumerate(zip(parts, parts[1:]))]
        rank, at = min(pairs)
        if rank >= ranks[token]:
            raise RuntimeError(f"{token!r} is not made of earlier tokens")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def main(vocabulary: Path) -> None:
    ranks = {}
    for line in vocabulary.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    characters = byte_characters()

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    in_order = sorted(ranks, key=ranks.get)
    merges = [" ".join(map(spelled, last_merge(token, ranks))) for token in in_order if len(token) > 1]
    settings = json.loads((FOLDER / "model" / "tokenizer_config.json").read_text())
    added = [{"id": int(index), **token} for index, token in settings["added_tokens_decoder"].items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {spelled(token): ranks[token] for token in in_order},
            "merges": merges,
        },
    }
    target = FOLDER / "tokenizer.json.xz"
    if target.exists():
        same = json.loads(lzma.open(target).read()) == document
        print("the same as before" if same else "DIFFERS from before")
        if same:
            return
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    target.write_bytes(lzma.compress(data, preset=9))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

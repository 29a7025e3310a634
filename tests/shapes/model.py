"""The architecture of Qwen2.5-VL for training: batches of equal shape, the parameters' names as the released checkpoints have them.

What `transformers` computes for the same weights is computed here without its generality, several times faster on a processor; `check.py`
compares the two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MERGE, PATCH = 2, 14
CELL = MERGE * PATCH
WINDOW_CELLS = 112 // CELL
EPSILON = 1e-6

TEXT = {
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 448,
    # With heads this narrow the slowest frequencies of 1,000,000 hardly turn over a picture.
    "rope_theta": 20.0,
    "mrope_section": [4, 6, 6],
}
VISION = {
    "hidden_size": 128,
    "depth": 4,
    "num_heads": 4,
    "intermediate_size": 320,
    "fullatt_block_indexes": [1, 3],
}
HEAD_DIM = 32
TOKENS_PER_SECOND = 2


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPSILON)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [batch, heads, length, dim] by halves."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of [batch, heads, length, dim]. In bf16 on a processor this is twice as fast, backwards, as what torch has for it."""
    scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1).to(v.dtype) @ v


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where the mask is set."""
    return torch.where(mask, 0.0, -1e4).to(dtype)


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, bias)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = VisionAttention(width, heads)
        self.mlp = GatedMLP(width, inner, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, bias)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (2, PATCH, PATCH), (2, PATCH, PATCH), bias=False)


class Merger(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        merged = width * MERGE * MERGE
        self.ln_q = RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, out))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return self.mlp(self.ln_q(x).view(batch, length // MERGE**2, -1))


class Vision(nn.Module):
    """From patches to one feature for each cell of 2 x 2 patches. Patches are ordered cell by cell; windows are masks."""

    def __init__(self, out: int):
        super().__init__()
        width, heads, inner = VISION["hidden_size"], VISION["num_heads"], VISION["intermediate_size"]
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(VisionBlock(width, heads, inner) for _ in range(VISION["depth"]))
        self.merger = Merger(width, out)
        self._geometries: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def geometry(self, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """cos and sin [patches, 16] and which patches share a window [patches, patches], of rows x columns cells."""
        if (rows, columns) not in self._geometries:
            row, column, y, x = torch.meshgrid(
                torch.arange(rows), torch.arange(columns), torch.arange(MERGE), torch.arange(MERGE), indexing="ij"
            )
            dim = HEAD_DIM // 2
            frequencies = 1.0 / 10_000.0 ** (torch.arange(0, dim, 2) / dim)
            angles = torch.stack([row * MERGE + y, column * MERGE + x], dim=-1).view(-1, 2, 1) * frequencies
            window = (row // WINDOW_CELLS * 1000 + column // WINDOW_CELLS).flatten()
            mask = window[:, None] == window[None]
            angles = angles.flatten(1)
            self._geometries[rows, columns] = angles.cos(), angles.sin(), mask
        return self._geometries[rows, columns]

    def forward(self, frames: Tensor) -> Tensor:
        """Features [n, cells, out] of [n, 1 or 2, 3, height, width], normalized; one frame stands for two of the same."""
        count, pair, _, height, width = frames.shape
        rows, columns = height // CELL, width // CELL
        patches = frames.view(count, pair, 3, rows, MERGE, PATCH, columns, MERGE, PATCH)
        patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(count, rows * columns * MERGE**2, -1)
        weight = self.patch_embed.proj.weight
        if pair == 1:
            weight = weight.sum(dim=2)
        x = patches.to(weight.dtype) @ weight.flatten(1).T
        cos, sin, mask = self.geometry(rows, columns)
        cos, sin, bias = cos.to(x.dtype), sin.to(x.dtype), as_bias(mask, x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if index in VISION["fullatt_block_indexes"] else bias)
        return self.merger(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        width, self.heads, self.kv_heads = (TEXT[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        self.q_proj = nn.Linear(width, self.heads * HEAD_DIM)
        self.k_proj = nn.Linear(width, self.kv_heads * HEAD_DIM)
        self.v_proj = nn.Linear(width, self.kv_heads * HEAD_DIM)
        self.o_proj = nn.Linear(self.heads * HEAD_DIM, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, length, -1, HEAD_DIM).transpose(1, 2)

        q, k, v = rotate(heads(self.q_proj(x)), cos, sin), rotate(heads(self.k_proj(x)), cos, sin), heads(self.v_proj(x))
        # For the loss on where heads look.
        self.last_q, self.last_k = q, k
        group = self.heads // self.kv_heads
        mixed = attend(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), bias)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(TEXT["hidden_size"]), RMSNorm(TEXT["hidden_size"])
        self.self_attn = Attention()
        self.mlp = GatedMLP(TEXT["hidden_size"], TEXT["intermediate_size"], bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, bias)
        return x + self.mlp(self.post_attention_layernorm(x))


class Text(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, TEXT["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(TEXT["num_hidden_layers"]))
        self.norm = RMSNorm(TEXT["hidden_size"])

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, 1, length, 16] of M-RoPE positions [batch, 3, length]."""
        frequencies = 1.0 / TEXT["rope_theta"] ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        axis = torch.repeat_interleave(torch.arange(3), torch.tensor(TEXT["mrope_section"]))
        angles = positions.float()[:, axis].transpose(1, 2) * frequencies
        return angles.cos()[:, None], angles.sin()[:, None]


class Model(nn.Module):
    """`visual`, `model` and the tied head."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.visual = Vision(TEXT["hidden_size"])
        self.model = Text(vocab_size)

    def embed(self, ids: Tensor, features: Tensor, pad: Tensor) -> Tensor:
        """Embeddings [batch, length, hidden], with features [cells of the whole batch, hidden] where `pad` is set."""
        x = F.embedding(ids, self.model.embed_tokens.weight).to(features.dtype)
        return x.masked_scatter(pad[:, :, None], features)

    def forward(self, ids: Tensor, features: Tensor, pad: Tensor, positions: Tensor, mask: Tensor) -> list[Tensor]:
        """The hidden states after each layer, the last one normalized. `mask` is [batch, 1, length, length]."""
        x = self.embed(ids, features, pad)
        cos, sin = (part.to(x.dtype) for part in self.model.angles(positions))
        bias = as_bias(mask, x.dtype)
        states = []
        for layer in self.model.layers:
            x = layer(x, cos, sin, bias)
            states.append(x)
        return [*states, self.model.norm(x)]

    def logits(self, states: Tensor) -> Tensor:
        return states @ self.model.embed_tokens.weight.T


def initialize(model: Model, seed: int) -> None:
    """Weights before training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith("bias"):
                weight.zero_()
            elif "embed_tokens" in name:
                weight.normal_(0, 0.05, generator=generator)
            elif weight.dim() > 1:
                fan_in = weight[0].numel()
                scale = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")) else 1.0
                weight.normal_(0, scale / fan_in**0.5, generator=generator)

"""Attention as people write it by hand, one module each; and what resembles it: kernels, retention, additive scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.families.family import BATCH, HEAD_DIM, HEADS, INNER, TEXT, WIDTH, Axes, Example, Form
from models.families.heldout_common import HeldOut
from models.families.torch_modules import attend, hidden, merge_heads, split_heads

PIXELS: tuple[Axes, ...] = ({0: "batch"},)


class Projections(nn.Module):
    """Queries, keys, values and output of one width, no biases on request."""

    def __init__(self, form: Form = "eager", bias: bool = True, kv_width: int = WIDTH) -> None:
        super().__init__()
        self.form = form
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_width, bias), nn.Linear(WIDTH, kv_width, bias)


class NanoGPT(Projections):
    """One packed weight, split in three; a triangular buffer cut to length hides the future."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        b, t, c = x.size()
        q, k, v = (p.view(b, t, HEADS, c // HEADS).transpose(1, 2) for p in self.c_attn(x).split(c, dim=2))
        if self.form == "sdpa":
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
            y = functional.softmax(scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")), dim=-1) @ v
        return x + self.o(y.transpose(1, 2).contiguous().view(b, t, c))


class HeadList(nn.Module):
    """One small module per head with weights of its own, results side by side (as in teaching material)."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(WIDTH, HEAD_DIM, bias=False) for _ in range(3)) for _ in range(HEADS)
        )
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        past = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        results = []
        for q, k, v in self.heads:
            scores = (q(x) @ k(x).transpose(-2, -1) * HEAD_DIM**-0.5).masked_fill(past == 0, float("-inf"))
            results.append(scores.softmax(-1) @ v(x))
        return x + self.proj(torch.cat(results, -1))


class SingleHead(Projections):
    """One head over the full width: three-dimensional products without any head axis."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        scores = torch.bmm(self.q(x), self.k(x).transpose(1, 2)) / WIDTH**0.5
        return x + self.o(torch.bmm(torch.softmax(scores, dim=2), self.v(x)))


class EinsumHeads(Projections):
    """Head axes kept where they fall: products by einsum over (batch, tokens, heads, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k, v = (p(x).unflatten(-1, (HEADS, HEAD_DIM)) for p in (self.q, self.k, self.v))
        weights = torch.einsum("bqhd,bkhd->bhqk", q / HEAD_DIM**0.5, k).softmax(-1)
        return x + self.o(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


class EinsumWeights(nn.Module):
    """Weights with a head axis of their own, applied and merged by einsum (as JAX code does)."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.zeros(WIDTH, HEADS, HEAD_DIM)) for _ in range(3))
        self.wo = nn.Parameter(torch.zeros(HEADS, HEAD_DIM, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k, v = (torch.einsum("bsc,chd->bshd", x, w) for w in (self.wq, self.wk, self.wv))
        weights = torch.einsum("bshd,bthd->bhst", q, k).mul(HEAD_DIM**-0.5).softmax(-1)
        return x + torch.einsum("bshd,hdc->bsc", torch.einsum("bhst,bthd->bshd", weights, v), self.wo)


class MultiQuery(Projections):
    """Many query heads, one key and value head without a head axis."""

    def __init__(self, form: Form) -> None:
        super().__init__(form, bias=False, kv_width=HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k, v = split_heads(self.q(x)), self.k(x), self.v(x)
        weights = torch.einsum("bhid,bjd->bhij", q * HEAD_DIM**-0.5, k).softmax(-1)
        return x + self.o(merge_heads(torch.einsum("bhij,bjd->bhid", weights, v)))


class FoldedHeads(Projections):
    """Heads folded into the batch, heads first; the scale inside baddbmm with an additive mask."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        b = x.shape[0]
        q, k, v = (torch.cat(p(x).split(HEAD_DIM, 2), 0) for p in (self.q, self.k, self.v))
        weights = torch.softmax(q.bmm(k.transpose(1, 2)) / HEAD_DIM**0.5, -1)
        return x + self.o(torch.cat(weights.bmm(v).split(b, 0), 2))


class TimeFirst(Projections):
    """Tokens before batch items, heads folded into the batch, as torch's own module does."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x_SBC = x.transpose(0, 1)
        s, b, _ = x_SBC.shape
        q, k, v = (p(x_SBC).view(s, b * HEADS, HEAD_DIM).transpose(0, 1) for p in (self.q, self.k, self.v))
        context = torch.bmm(torch.softmax(torch.bmm(q * HEAD_DIM**-0.5, k.transpose(1, 2)), -1), v)
        return x + self.o(context.transpose(0, 1).reshape(s, b, WIDTH)).transpose(0, 1)


class KeysFirst(Projections):
    """Scores with keys before queries, softmax over the second axis from the end."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k, v = split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x))
        weights_BHTS = (k @ q.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-2)
        return x + self.o(merge_heads(weights_BHTS.transpose(-1, -2) @ v))


class GatedHeads(Projections):
    """A sigmoid gate on the result before the output projection."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        context = attend(split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x)), self.form)
        return x + self.o(merge_heads(context) * torch.sigmoid(self.gate(x)))


class CosineHeads(Projections):
    """Unit queries and keys with a learned temperature for every head, which is clamped."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k = (
            functional.normalize(split_heads(self.q(x)), dim=-1),
            functional.normalize(split_heads(self.k(x)), dim=-1),
        )
        weights = (q @ k.transpose(-2, -1) * self.temperature.clamp(max=4.6).exp()).softmax(-1)
        return x + self.o(merge_heads(weights @ split_heads(self.v(x))))


class MemoryTokens(Projections):
    """Learned keys and values in front of those of the tokens, and a null key for nobody."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.memory = nn.Parameter(torch.zeros(2, HEADS, 3, HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        mk, mv = (m.expand(x.shape[0], -1, -1, -1) for m in self.memory)
        k = torch.cat([mk, split_heads(self.k(x))], 2)
        v = torch.cat([mv, split_heads(self.v(x))], 2)
        return x + self.o(merge_heads(attend(split_heads(self.q(x)), k, v, self.form)))


class ChunkedAttention(Projections):
    """Queries in two chunks, each against all keys, to save memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k, v = split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x))
        parts = [attend(part, k, v, self.form) for part in (q[:, :, :4], q[:, :, 4:])]
        return x + self.o(merge_heads(torch.cat(parts, 2)))


class ImagePixels(nn.Module):
    """The spatial attention of diffusion models: group norm, packed 1x1 convolution, one head over pixels."""

    def __init__(self, form: Form, heads: int = HEADS) -> None:
        super().__init__()
        self.form, self.heads = form, heads
        self.norm, self.qkv = nn.GroupNorm(8, WIDTH), nn.Conv1d(WIDTH, 3 * WIDTH, 1)
        self.proj = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> the same."""
        b, c, h, w = x.shape
        flat = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm(flat)).reshape(b * self.heads, -1, h * w).chunk(3, dim=1)
        scale = (c // self.heads) ** -0.25
        weights = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(-1)
        context = torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, -1)
        return (flat + self.proj(context)).reshape(b, c, h, w)


class NonLocal(nn.Module):
    """The non-local block (Wang et al. 2018): half the channels, no scale, convolutions all around."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(WIDTH, WIDTH // 2, 1) for _ in range(3))
        self.out = nn.Sequential(nn.Conv2d(WIDTH // 2, WIDTH, 1), nn.BatchNorm2d(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> the same."""
        b, _, h, w = x.shape
        theta, phi, g = (p(x).view(b, WIDTH // 2, -1) for p in (self.theta, self.phi, self.g))
        y = (theta.permute(0, 2, 1) @ phi).softmax(-1) @ g.permute(0, 2, 1)
        return x + self.out(y.permute(0, 2, 1).reshape(b, WIDTH // 2, h, w))


class DiffusionBlock(nn.Module):
    """Self-attention, cross-attention to text, gated feed-forward: the transformer block inside a U-Net."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.cross = nn.ModuleList(nn.Linear(w, WIDTH, bias=False) for w in (WIDTH, 32, 32))
        self.outs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.up, self.down, self.form = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH), form

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(B, S, C) and (B, T, 32)."""
        for norm, (q, k, v), out, source in zip(
            self.norms[:2], (self.own, self.cross), self.outs, (None, text), strict=True
        ):
            h = norm(x)
            s = h if source is None else source
            x = x + out(merge_heads(attend(split_heads(q(h)), split_heads(k(s)), split_heads(v(s)), self.form)))
        value, gate = self.up(self.norms[2](x)).chunk(2, -1)
        return x + self.down(value * functional.gelu(gate))


class SetPooling(nn.Module):
    """Induced points attend to a set, the set to them, then learned seeds to the set (Lee et al. 2019)."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.points, self.seeds = nn.Parameter(torch.zeros(1, 5, WIDTH)), nn.Parameter(torch.zeros(1, 3, WIDTH))
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)) for _ in range(3))

    def mab(self, block: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Queries stay in the residual path; no projection after the heads but one with an activation."""
        q, k, v = (p(z) for p, z in zip(list(block)[:3], (x, y, y), strict=True))  # type: ignore[call-overload]
        qh, kh, vh = (torch.cat(z.split(HEAD_DIM, 2), 0) for z in (q, k, v))
        weights = torch.softmax(qh.bmm(kh.transpose(1, 2)) / WIDTH**0.5, 2)
        out = torch.cat((qh + weights.bmm(vh)).split(q.size(0), 0), 2)
        return out + functional.relu(block[3](out))  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, 3, C)."""
        b = x.shape[0]
        induced = self.mab(self.blocks[0], self.points.repeat(b, 1, 1), x)
        return self.mab(self.blocks[2], self.seeds.repeat(b, 1, 1), self.mab(self.blocks[1], x, induced))


class PooledByQuery(nn.Module):
    """One learned query through torch's own module gives one vector for each item."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, C)."""
        return self.attention(self.query.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0][:, 0]


def plain(make: Callable[[Form], nn.Module], tokens: int = 10) -> Callable[[Form], Example]:
    """An example of hidden states."""
    return lambda form: Example(make(form), (hidden(tokens),), ("x",), (TEXT,))


def pixels(make: Callable[[Form], nn.Module]) -> Callable[[Form], Example]:
    """An example of feature maps."""
    return lambda form: Example(make(form), (torch.randn(BATCH, WIDTH, 4, 6),), ("x",), PIXELS)


def _diffusion(form: Form) -> Example:
    inputs = (hidden(), torch.randn(BATCH, 7, 32))
    return Example(DiffusionBlock(form), inputs, ("x", "text"), (TEXT, {0: "batch", 1: "words"}))


HELD_OUT_MODULES = (
    HeldOut("nanogpt", plain(NanoGPT), 1),
    HeldOut("head_list", plain(HeadList), HEADS, sdpa=False),
    HeldOut("single_head", plain(SingleHead), 1, sdpa=False),
    HeldOut("einsum_heads", plain(EinsumHeads), 1, sdpa=False),
    HeldOut("einsum_weights", plain(EinsumWeights), 1, sdpa=False),
    HeldOut("multi_query", plain(MultiQuery), 1, sdpa=False),
    HeldOut("folded_heads", plain(FoldedHeads), 1, sdpa=False),
    HeldOut("time_first", plain(TimeFirst), 1, sdpa=False),
    HeldOut("keys_first", plain(KeysFirst), 1, sdpa=False),
    HeldOut("gated_heads", plain(GatedHeads), 1),
    HeldOut("cosine_heads", plain(CosineHeads), 1, sdpa=False),
    HeldOut("memory_tokens", plain(MemoryTokens), 1),
    HeldOut("chunked", plain(ChunkedAttention), 2),
    HeldOut("image_pixels", pixels(ImagePixels), 1, sdpa=False),
    HeldOut("image_pixels_one_head", pixels(lambda form: ImagePixels(form, 1)), 1, sdpa=False),
    HeldOut("non_local", pixels(NonLocal), 1, sdpa=False),
    HeldOut("diffusion_block", _diffusion, 2),
    HeldOut("set_pooling", plain(SetPooling), 3, sdpa=False),
    HeldOut("pooled_by_query", plain(PooledByQuery), 1, sdpa=False),
)

"""Near misses and odd relatives of attention: some are attention in a strange dress, most are none at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.families.family import BATCH, HEAD_DIM, HEADS, TEXT, VOCABULARY, WIDTH, Example, Form
from models.families.heldout_common import HeldOut, text
from models.families.heldout_modules import Projections, pixels, plain
from models.families.torch_modules import merge_heads, split_heads


class RelativeShift(Projections):
    """Transformer-XL: content and position scores with a bias each, positions aligned by a shift."""

    def __init__(self, form: Form) -> None:
        super().__init__(form, bias=False)
        self.r = nn.Linear(WIDTH, WIDTH, bias=False)
        self.u, self.w = (nn.Parameter(torch.zeros(HEADS, HEAD_DIM)) for _ in range(2))
        self.register_buffer("table", torch.randn(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, HEADS, HEAD_DIM) for p in (self.q, self.k, self.v))
        r = self.r(self.table[:s]).view(s, HEADS, HEAD_DIM)
        content = torch.einsum("bihd,bjhd->bhij", q + self.u, k)
        position = torch.einsum("bihd,jhd->bhij", q + self.w, r)
        padded = functional.pad(position, (1, 0)).view(b, HEADS, s + 1, s)[:, :, 1:]
        scores = (content + padded.view(b, HEADS, s, s)) * HEAD_DIM**-0.5
        future = torch.triu(torch.ones(s, s), 1).bool()
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return x + self.o(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, s, WIDTH))


class LuongAttention(nn.Module):
    """A recurrent decoder state asks encoder states by dot product (Luong et al. 2015): no projections but one."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.rnn, self.general = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, encoded: Tensor) -> Tensor:
        """(B, S, C) and (B, T, C)."""
        state = self.rnn(x)[0]
        weights = (state @ self.general(encoded).transpose(1, 2)).softmax(-1)
        return torch.tanh(self.out(torch.cat([weights @ encoded, state], -1)))


class BareAttention(nn.Module):
    """No weights at all between the input and the result: the classical retrieval of a Hopfield layer."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        return x + self.after((0.2 * x @ x.transpose(1, 2)).softmax(-1) @ x)


class BahdanauAttention(nn.Module):
    """Additive scores (Bahdanau et al. 2015): tanh of a sum, then a vector. There is no product of two activations."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.w, self.u, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        scores = self.v(torch.tanh(self.w(x)[:, :, None] + self.u(x)[:, None])).squeeze(-1)
        return x + scores.softmax(-1) @ x


class GraphAttention(nn.Module):
    """GAT (Velickovic et al. 2018): sums of two numbers per edge, leaky, over neighbours."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.w, self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HEADS), nn.Linear(WIDTH, HEADS)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """(B, S, C) and (B, S, S)."""
        h = self.w(x)
        scores = self.left(h).transpose(1, 2)[..., None] + self.right(h).transpose(1, 2)[..., None, :]
        scores = functional.leaky_relu(scores, 0.2).masked_fill(edges[:, None] < 0, -1e9)
        return x + merge_heads(scores.softmax(-1) @ split_heads(h))


class KernelAttention(Projections):
    """Linear attention with a positive kernel (Katharopoulos et al. 2020): keys meet values before queries do."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k = functional.elu(split_heads(self.q(x))) + 1, functional.elu(split_heads(self.k(x))) + 1
        context = k.transpose(-1, -2) @ split_heads(self.v(x))
        return x + self.o(merge_heads(q @ context / (q @ k.sum(-2)[..., None])))


class Performer(Projections):
    """Random features of the softmax kernel (Choromanski et al. 2021)."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.register_buffer("features", torch.randn(HEAD_DIM, 16))

    def kernel(self, x: Tensor) -> Tensor:
        """Positive features."""
        scores = x @ self.features
        return torch.exp(scores - (x * x).sum(-1, keepdim=True) / 2 - scores.amax(-1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k = self.kernel(0.5 * split_heads(self.q(x))), self.kernel(0.5 * split_heads(self.k(x)))
        numbers = q @ (k.transpose(-1, -2) @ split_heads(self.v(x)))
        return x + self.o(merge_heads(numbers / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)))


class Retention(Projections):
    """Products with a decay and no softmax (Sun et al. 2023)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        place = torch.arange(x.shape[1])
        decay = torch.tril(0.9 ** (place[:, None] - place).clamp(min=0).float())
        scores = split_heads(self.q(x)) @ split_heads(self.k(x)).transpose(-1, -2) * decay
        return x + self.o(merge_heads(functional.normalize(scores @ split_heads(self.v(x)), dim=-1)))


class SigmoidAttention(Projections):
    """Every key is weighed on its own: a sigmoid in place of the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        scores = split_heads(self.q(x)) @ split_heads(self.k(x)).transpose(-1, -2) * HEAD_DIM**-0.5
        return x + self.o(merge_heads(torch.sigmoid(scores - 2.3) @ split_heads(self.v(x))))


class OverHeads(Projections):
    """A softmax over heads, not over keys."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        scores = split_heads(self.q(x)) @ split_heads(self.k(x)).transpose(-1, -2) * HEAD_DIM**-0.5
        return x + self.o(merge_heads(scores.softmax(1) @ split_heads(self.v(x))))


class Sinkhorn(Projections):
    """Rows and columns normalised in turn: a softmax whose result is changed before it meets the values."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        scores = split_heads(self.q(x)) @ split_heads(self.k(x)).transpose(-1, -2) * HEAD_DIM**-0.5
        weights = scores.softmax(-1)
        weights = weights / weights.sum(-2, keepdim=True)
        return x + self.o(merge_heads(weights / weights.sum(-1, keepdim=True) @ split_heads(self.v(x))))


class ChannelAttention(Projections):
    """Transposed attention: channels attend to channels (Ali et al. 2021, Zamir et al. 2022)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k, v = (split_heads(p(x)).transpose(-1, -2) for p in (self.q, self.k, self.v))
        weights = (functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-1, -2)).softmax(-1)
        return x + self.o(merge_heads((weights @ v).transpose(-1, -2)))


class SlotAttention(Projections):
    """Slots compete for tokens: softmax over queries, then weighted means (Locatello et al. 2020)."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self.slots = nn.Parameter(torch.zeros(1, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, 5, C)."""
        slots = self.slots.expand(x.shape[0], -1, -1)
        weights = (self.q(slots) @ self.k(x).transpose(1, 2) * WIDTH**-0.5).softmax(1) + 1e-8
        return slots + self.o(weights / weights.sum(-1, keepdim=True) @ self.v(x))


class PooledTokens(nn.Module):
    """One learned score per token, then a weighted mean: pooling, not attention between tokens."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.score, self.out = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, C)."""
        return self.out((self.score(x).softmax(1).transpose(1, 2) @ x)[:, 0])


class SqueezeExcite(nn.Module):
    """Channel gates of a convolutional network, by a softmax for once."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> the same."""
        gate = self.up(functional.relu(self.down(x.mean((2, 3))))).softmax(-1)
        return x + self.conv(x) * gate[:, :, None, None]


class CapsuleRouting(nn.Module):
    """Routing by agreement (Sabour et al. 2017), two rounds."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, WIDTH, 8))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, 4, 8)."""
        votes = torch.einsum("bsc,ncd->bsnd", x, self.weight)
        logits = torch.zeros(votes.shape[:3])
        for _ in range(2):
            result = torch.einsum("bsn,bsnd->bnd", logits.softmax(-1), votes)
            result = functional.normalize(result, dim=-1)
            logits = logits + torch.einsum("bnd,bsnd->bsn", result, votes)
        return result


class SagAttention(nn.Module):
    """Self-attention of image generators (Zhang et al. 2019): keys first, thin queries, a learned gain."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(WIDTH, 8, 1), nn.Conv2d(WIDTH, 8, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> the same."""
        b, c, h, w = x.size()
        q, k = self.q(x).view(b, -1, h * w).permute(0, 2, 1), self.k(x).view(b, -1, h * w)
        weights = torch.softmax(torch.bmm(q, k), dim=-1)
        out = torch.bmm(self.v(x).view(b, -1, h * w), weights.permute(0, 2, 1)).view(b, c, h, w)
        return self.gamma * out + x


def _luong(form: Form) -> Example:
    inputs = (torch.randn(BATCH, 7, WIDTH), torch.randn(BATCH, 10, WIDTH))
    return Example(LuongAttention(form), inputs, ("x", "encoded"), ({0: "batch"}, {0: "batch", 1: "seq"}))


def _graph(form: Form) -> Example:
    inputs = (torch.randn(BATCH, 10, WIDTH), torch.randn(BATCH, 10, 10))
    return Example(GraphAttention(form), inputs, ("x", "edges"), (TEXT, {0: "batch", 1: "seq", 2: "seq"}))


def _none(name: str, make: type[nn.Module]) -> HeldOut:
    return HeldOut(name, plain(make), 0, sdpa=False, negative=True)


HELD_OUT_NEAR = (
    HeldOut("image_generator", pixels(SagAttention), 1, sdpa=False),
    text(
        "rwkv",
        "Rwkv",
        0,
        sizes={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "context_length": 16,
            "attention_hidden_size": WIDTH,
        },
        names=("input_ids",),
        tokens=4,
        negative=True,
        fixed={"use_cache": False},
        sdpa=False,
    ),
    text(
        "mamba2",
        "Mamba2",
        0,
        sizes={
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "state_size": 4,
            "num_heads": 6,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
        names=("input_ids",),
        tokens=8,
        negative=True,
        fixed={"use_cache": False},
        sdpa=False,
    ),
    text(
        "reformer",
        "Reformer",
        2,
        sdpa=False,
        names=("input_ids",),
        tokens=16,
        sizes={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "attention_head_size": 8,
            "num_attention_heads": 4,
            "attn_layers": ["local", "lsh"],
            "num_buckets": 2,
            "lsh_attn_chunk_length": 4,
            "local_attn_chunk_length": 4,
            "num_hashes": 2,
            "feed_forward_size": 40,
            "axial_pos_embds": False,
            "max_position_embeddings": 64,
            "is_decoder": False,
            "hash_seed": 0,
        },
    ),
    HeldOut("relative_shift", plain(RelativeShift), 1, sdpa=False),
    HeldOut("luong", _luong, 1, sdpa=False),
    HeldOut("bare", plain(BareAttention), 1, sdpa=False),
    HeldOut("channel_attention", plain(ChannelAttention), 1, sdpa=False),
    HeldOut("graph_attention", _graph, 0, sdpa=False, negative=True),
    HeldOut("squeeze_excite", pixels(SqueezeExcite), 0, sdpa=False, negative=True),
    _none("bahdanau", BahdanauAttention),
    _none("kernel_attention", KernelAttention),
    _none("performer", Performer),
    _none("retention", Retention),
    _none("sigmoid_attention", SigmoidAttention),
    _none("over_heads", OverHeads),
    _none("sinkhorn", Sinkhorn),
    _none("slot_attention", SlotAttention),
    _none("pooled_tokens", PooledTokens),
    _none("capsules", CapsuleRouting),
)

"""What looks like attention and must not be taken for it: linear attention, mixed heads, soft routers, state spaces."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor, nn

from models.families.family import HEAD_DIM, HEADS, VOCABULARY, WIDTH, ByName, Example, Family, Form, token_ids
from models.families.torch_modules import PackedAttention, hidden_example, merge_heads, split_heads


class FourLinears(nn.Module):
    """Separate projections for queries, keys, values and output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, S, D) each."""
        return split_heads(self.q(x)), split_heads(self.k(x)), split_heads(self.v(x))


class LinearAttention(FourLinears):
    """Two softmaxes and no scores (Shen et al. 2021): nothing here is an attention over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k, v = self.project(x)
        context_BHDD = k.softmax(-2).transpose(-1, -2) @ v
        return x + self.o(merge_heads(q.softmax(-1) @ context_BHDD))


class TalkingHeads(FourLinears):
    """Attention whose heads are mixed before and after the softmax (Shazeer et al. 2020): heads are not separable."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS, bias=False), nn.Linear(HEADS, HEADS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        q, k, v = self.project(x)
        scores_BHST = (q @ k.transpose(-1, -2)) * HEAD_DIM**-0.5
        weights_BSTH = self.before(scores_BHST.permute(0, 2, 3, 1)).softmax(-2)
        return x + self.o(merge_heads(self.after(weights_BSTH).permute(0, 3, 1, 2) @ v))


class SoftRouter(nn.Module):
    """One real attention, then a softmax over experts that is none."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.attention, self.gate = PackedAttention("unbind", form), nn.Linear(WIDTH, 4)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x = self.attention(x)
        return torch.einsum("bne,edf,bnd->bnf", self.gate(x).softmax(-1), self.experts, x)


def _mamba(form: Form) -> Example:
    config = tf.MambaConfig(vocab_size=VOCABULARY, hidden_size=24, state_size=4, num_hidden_layers=1, use_cache=False)
    names = ("input_ids",)
    return Example(ByName(tf.MambaModel(config), names, use_cache=False), (token_ids(4),), names, ({0: "batch"},))


NEGATIVES = (
    Family("mamba", _mamba, 0, "gpt2", sdpa=False, negative=True),
    Family("linear_attention", lambda form: hidden_example(LinearAttention()), 0, sdpa=False, negative=True),
    Family("talking_heads", lambda form: hidden_example(TalkingHeads()), 1, sdpa=False, negative=True),
    Family("soft_router", lambda form: hidden_example(SoftRouter(form)), 1, negative=True),
)

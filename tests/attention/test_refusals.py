"""What must not be rewritten is refused with its reason by every pass; what is no attention is no site."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from models.fixtures import read_pack
from rewriter.attention.recognise import recognise
from rewriter.core.site import Recognition, State
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.inspection import refusals
from tests.attention import exported

PACK = Path(__file__).parent.parent / "fixtures" / "l17.tar.xz"


class Scored(nn.Module):
    """Attention of four heads whose scores, or tokens, pass something unusual."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "chosen tokens":
            x = x[:, x[0, :, 0].gt(-0.5).nonzero()[:, 0]]
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, tokens, 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / 6**0.5
        if self.kind == "squared":
            scores = scores * scores
        if self.kind == "centred":
            scores = scores - scores.mean(-1, True)
        result = scores.softmax(-1) @ v
        if self.kind == "norm after":
            result = nn.functional.layer_norm(result, (6,))
        return self.o(result.transpose(1, 2).reshape(batch, tokens, 24))


class Other(nn.Module):
    """Softmaxes that weigh something else than values by queries and keys."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 5)
        self.moves = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "classifier":
            return self.c(self.a(x).relu()).softmax(-1)
        if self.kind == "log-softmax":
            return nn.functional.log_softmax(self.c(x), -1)
        if self.kind == "squeeze-excite":
            return x * self.b(self.a(x.mean(1, keepdim=True)).relu()).softmax(-1)
        if self.kind == "crf":
            alpha = self.c(x)[:, 0]
            for step in range(1, 4):
                alpha = self.c(x)[:, step] + torch.logsumexp(alpha.unsqueeze(-1) + self.moves, 1)
            return alpha
        if self.kind == "capsules":
            votes, logits = self.a(x).view(x.shape[0], -1, 4, 6), torch.zeros(x.shape[0], x.shape[1], 4)
            for _ in range(3):
                poses = (logits.softmax(-1).unsqueeze(-1) * votes).sum(1, keepdim=True).tanh()
                logits = logits + (votes * poses).sum(-1)
            return poses
        gates = self.c(x).softmax(-1)  # experts
        return sum(gates[..., i : i + 1] * self.a(x * (i + 1)) for i in range(5))


def _graph(module: nn.Module) -> OnnxGraph:
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    return exported.export(module, [x], ["x"])


def _codes(found: Recognition) -> set[str]:
    """Codes of all refusals of all passes, and of what was not understood."""
    codes = {entry.refusal.code for entry in found.unrecognised}
    for site in found.attention:
        verdicts = refusals(site).values()
        codes |= {"ok" if verdict is None else verdict.code for verdict in verdicts}
        assert all(verdict is None or verdict.why for verdict in verdicts)
    return codes


@pytest.mark.parametrize(
    ("build", "codes"),
    [
        (partial(exported.block, exposed=True), {"exposed-probabilities"}),
        (partial(exported.block, mixing=True), {"head-mixing"}),
        (lambda: _graph(Scored("squared")), {"unknown-score-function"}),
    ],
    ids=["exposed", "mixing", "squared"],
)
def test_every_pass_gives_the_reason(build: object, codes: set[str]) -> None:
    assert callable(build)
    assert _codes(recognise(build())) == codes


@pytest.mark.parametrize("kind", ["norm after", "centred", "chosen tokens"])
def test_what_changes_nothing_inside_the_site_does_not_forbid_it(kind: str) -> None:
    """A norm stays behind the site, softmax does not see the mean of its scores, and no size is ever written down."""
    (site,) = recognise(_graph(Scored(kind))).attention
    assert (site.state, site.problems) == (State.LOWERABLE, ())


def test_a_cache_in_the_signature_is_left(tmp_path: Path) -> None:
    onnx.save(read_pack(PACK).models["gpt2_past.eager.l17"], tmp_path / "model.onnx")
    # What changes no tensor of the signature may still be done: the form in which attention is written.
    codes = _codes(recognise(load(tmp_path / "model.onnx")))
    assert codes - {"ok"} == {"cache-in-signature", "cache-change-not-allowed"}


@pytest.mark.parametrize("kind", ["classifier", "log-softmax", "squeeze-excite", "crf", "capsules", "experts"])
def test_other_softmaxes_are_no_attention(kind: str) -> None:
    found = recognise(_graph(Other(kind)))
    assert (found.attention, found.unrecognised) == ((), ())

"""The gate against wrong sites: every mutation that changes what a site computes must cost it its state."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from models.fixtures import read_pack
from rewriter.attention import recognise as recognition
from rewriter.attention import weights
from rewriter.attention.judge import Judge
from rewriter.attention.lower import result_of
from rewriter.core.refusal import Refusal
from rewriter.core.site import AttentionSite, FeedForwardSite, Projection, RaisedSite, ScoreBias, State
from rewriter.graph.onnx import load

FIXTURES = Path(__file__).parent.parent / "fixtures"
GRAPHS = (
    "bert.sdpa.l17",
    "bloom.eager.l17",
    "falcon.eager.d18",
    "gemma2.eager.d18",
    "gpt2.eager.l17",
    "gpt_neox.eager.d18",
    "packed_qk_norm.eager.l17",
    "qwen3.eager.d18",
    "swin.eager.l17",
    "t5.eager.l17",
)
Mutation = Callable[[Any], RaisedSite | None]


def _cycled(p: Projection) -> Projection:
    return replace(p, head_of=tuple((head + 1) % p.heads for head in p.head_of))


def _shifted_bias(site: AttentionSite, role: str) -> AttentionSite | None:
    operand = getattr(site, role)
    if operand.bias_GD is None:
        return None
    bias_GD = np.array(operand.bias_GD, np.float64)
    bias_GD[0, 0] += 0.01
    return replace(site, **{role: replace(operand, bias_GD=bias_GD)})


def _swapped_values(site: AttentionSite) -> AttentionSite | None:
    if site.value.weight_CGD is None or site.value.heads < 2:
        return None
    order = [1, 0, *range(2, site.value.heads)]
    bias = site.value.bias_GD
    bias = None if bias is None else bias[order]
    return replace(site, value=replace(site.value, weight_CGD=site.value.weight_CGD[:, order], bias_GD=bias))


def _causal_only(site: AttentionSite) -> AttentionSite | None:
    return replace(site, bias=ScoreBias("causal")) if site.mask in ("padding", "window", "additive") else None


def _turned(site: AttentionSite, **changes: Any) -> AttentionSite | None:
    if site.query.rotary is None or site.key.rotary is None:
        return None
    query, key = (replace(p, rotary=replace(p.rotary, **changes)) for p in (site.query, site.key))
    return replace(site, query=query, key=key)


def _other_groups(site: AttentionSite) -> AttentionSite | None:
    if site.kv_heads in (1, site.heads):
        return None
    order = tuple(head % site.kv_heads for head in range(site.heads))
    return replace(site, key=replace(site.key, head_of=order), value=replace(site.value, head_of=order))


def _larger_epsilon(site: AttentionSite) -> AttentionSite | None:
    norm = site.query.norm
    return norm and replace(site, query=replace(site.query, norm=replace(norm, epsilon=10 * norm.epsilon)))


def _moved_bias(site: AttentionSite) -> AttentionSite | None:
    axis = site.bias.heads_axis
    return replace(site, bias=replace(site.bias, keep=(*range(1, axis), 0))) if axis > 1 else None


def _transposed(site: AttentionSite) -> AttentionSite | None:
    weight = site.query.weight_CGD
    if weight is None or weight.shape[0] != weight.shape[1] * weight.shape[2]:
        return None
    turned = weight.reshape(weight.shape[0], -1).T.reshape(weight.shape)
    return replace(site, query=replace(site.query, weight_CGD=turned))


def _swapped_rows(site: AttentionSite) -> AttentionSite:
    assert site.output is not None
    order = [1, 0, *range(2, site.heads)]
    return replace(site, output=replace(site.output, weight_HDC=site.output.weight_HDC[order]))


ATTENTION: dict[str, Mutation] = {
    "scale": lambda s: replace(s, scale=1.01 * s.scale),
    "scale, a little": lambda s: replace(s, scale=(1 + 1e-7) * s.scale),
    "value heads swapped": _swapped_values,
    "value heads cycled": lambda s: replace(s, value=_cycled(s.value)) if s.value.heads > 1 else None,
    "key heads cycled": lambda s: replace(s, key=_cycled(s.key)) if s.key.heads > 1 else None,
    "groups interleaved": _other_groups,
    "output rows swapped": _swapped_rows,
    "query weights transposed": _transposed,
    "mask dropped": lambda s: None if s.bias.nothing else replace(s, bias=ScoreBias()),
    "causal instead of the mask": _causal_only,
    "bias of another head": _moved_bias,
    "rotation reversed": lambda s: _turned(s, sign=-s.query.rotary.sign if s.query.rotary else 0),
    "rotation of other pairs": lambda s: _turned(s, interleaved=not (s.query.rotary and s.query.rotary.interleaved)),
    "query bias shifted": lambda s: _shifted_bias(s, "query") if s.query.norm is None else None,
    "value bias shifted": lambda s: _shifted_bias(s, "value"),
    "soft-cap off": lambda s: replace(s, softcap=0.0) if s.softcap else None,
    "soft-cap": lambda s: replace(s, softcap=1.01 * s.softcap) if s.softcap else None,
    "epsilon": _larger_epsilon,
}
FEED_FORWARD: dict[str, Mutation] = {
    "branches exchanged": lambda s: None if s.gate_CF is None else replace(s, up_CF=s.gate_CF, gate_CF=s.up_CF),
    "hidden bias dropped": lambda s: None if s.up_bias_F is None else replace(s, up_bias_F=None),
    "units swapped": lambda s: replace(s, down_FC=s.down_FC[[1, 0, *range(2, s.width)]]),
    "output bias": lambda s: None if s.down_bias_C is None else replace(s, down_bias_C=s.down_bias_C * 1.01),
}


@dataclass
class Judged:
    """A judge that has seen a graph, with its sites and their anchors."""

    judge: Judge
    sites: list[tuple[RaisedSite, ir.Node]]

    def problem(self, site: RaisedSite, node: ir.Node, mutate: Mutation, derived: bool) -> Refusal | None:
        if derived:
            return self.judge._like_a_proved_one(site, node, lambda same: same)
        noisy = self.judge._noisy_sites[result_of(site)]
        wrong = mutate(noisy)
        self.judge.raise_site = lambda trace, anchor: wrong
        try:
            return self.judge._proved(site, node)
        finally:
            self.judge._noisy_sites[result_of(site)] = noisy


@cache
def _models() -> dict[str, onnx.ModelProto]:
    packs = [pair for name in ("l17", "d18") for pair in read_pack(FIXTURES / f"{name}.tar.xz").models.items()]
    return {name: model for name, model in packs if name in GRAPHS}


def _judged(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, model: onnx.ModelProto | None = None) -> Judged:
    kept: list[Judged] = []

    class Keeping(Judge):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.append(Judged(self, []))

        def judge(self, site: RaisedSite, node: ir.Node) -> RaisedSite:
            kept[0].sites.append((site, node))
            return super().judge(site, node)

    monkeypatch.setattr(recognition, "Judge", Keeping)
    onnx.save(model or _models()[name], folder / "model.onnx")
    recognition.recognise(load(folder / "model.onnx"))
    return kept[0]


def _masked_by(model: onnx.ModelProto, number: float) -> onnx.ModelProto:
    """The model with its lowest float as mask exchanged for another number."""
    copy, changed = onnx.ModelProto(), 0
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32 and array.size == 1 and float(array.min()) < -1e38:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, number), tensor.name))
            changed += 1
    assert changed
    return copy


def _mutants(judged: Judged) -> Iterator[tuple[str, bool, Refusal | None]]:
    for site, node in judged.sites:
        proved = result_of(site) in judged.judge._noisy_sites
        for name, mutate in (ATTENTION if isinstance(site, AttentionSite) else FEED_FORWARD).items():
            wrong = mutate(site)
            if wrong is not None:
                yield name, proved, judged.problem(wrong, node, mutate, derived=not proved)


@pytest.mark.parametrize("drawn", [False, True], ids=["own weights", "drawn weights"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_mutation_is_caught(name: str, drawn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if drawn:
        monkeypatch.setattr(weights.Weights.__init__, "__defaults__", (None, 1))
    outcomes = list(_mutants(_judged(name, tmp_path, monkeypatch)))
    assert len(outcomes) > 8
    assert collections.Counter(what for what, _, problem in outcomes if problem is None) == {}


def test_a_wrong_name_of_an_activation_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = _judged("bert.sdpa.l17", tmp_path, monkeypatch)
    ((site, _),) = [pair for pair in judged.sites if isinstance(pair[0], FeedForwardSite)][:1]
    assert isinstance(site, FeedForwardSite) and site.activation == "gelu"
    judged.judge._names_hold.clear()
    wrong = judged.judge._truly_named(replace(site, activation="gelu_tanh"), "wrong")
    right = judged.judge._truly_named(site, "right")
    assert isinstance(wrong, FeedForwardSite) and isinstance(right, FeedForwardSite)
    assert (wrong.activation, right.activation) == ("path", "gelu")


@pytest.mark.parametrize("number", [-1e9, -1e6])
def test_masks_that_swallow_digits_hide_nothing(number: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _masked_by(_models()["qwen3.eager.d18"], number)
    judged = _judged("", tmp_path, monkeypatch, model)
    seen = [*judged.sites]
    assert [judged.judge.judge(site, node).state for site, node in seen] == [State.LOWERABLE] * 4
    judged.sites = seen
    assert [what for what, _, problem in _mutants(judged) if problem is None] == []

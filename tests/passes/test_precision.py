from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from passes.precision import PrecisionPass
from rewriter.core.errors import OptionError
from rewriter.core.option import Option
from rewriter.core.passes_registry import discover
from rewriter.core.site import AttentionSite, FeedForwardSite, Site, State
from rewriter.core.smoothing import smoothed
from rewriter.core.target import Target
from tests.passes.contract import Contract, assert_legal
from tests.passes.reference import TARGET, Case, attention_case, feed_forward_case, product, relative_error, statistics

PASS = PrecisionPass()


class TestPrecision(Contract):
    name = "precision"
    target: ClassVar[Target] = replace(TARGET, features=("avx2", "avx512_bf16", "avx512_vnni"))

    def cases(self) -> list[Case]:
        return [
            attention_case(0, dtype=np.float32),
            attention_case(1, heads=4, kv_heads=2, rotary=True, mask="causal", dtype=np.float32),
            attention_case(2, norm=True, biases=False, dtype=np.float32),
            feed_forward_case(0, dtype=np.float32),
            feed_forward_case(1, gated=True, activation="silu", dtype=np.float32),
        ]

    def refused(self) -> dict[str, Site]:
        site = feed_forward_case(0, dtype=np.float32).site
        assert isinstance(site, FeedForwardSite)
        wide = np.zeros((site.width, 1), np.float32)
        return {
            "already-rounded": replace(site, precision="int8"),
            "not-fp32": feed_forward_case(0).site,
            "not-lowerable": replace(site, state=State.MAPPED),
            "value-escapes": replace(attention_case(0, dtype=np.float32).site, escapes=("scores",)),
            "too-wide": replace(site, down_FC=np.broadcast_to(wide[:1], (70_000, 1))),
        }

    def test_every_pass_refuses_the_other_kind_of_block_and_unproven_sites(self) -> None:
        for case in self.cases():  # both kinds of block are served
            assert PASS.refuse(case.site) is None
            assert PASS.refuse(replace(case.site, state=State.MAPPED)) is not None
            assert PASS.refuse(replace(case.site, escapes=("inner",))) is not None

    def test_offers_what_the_target_multiplies(self) -> None:
        site = self.cases()[0].site
        for features, formats in (((), []), (("avx512_vnni",), ["int8"]), (("avx512_bf16",), ["bf16"])):
            assert [o["dtype"] for o in PASS.options(site, replace(TARGET, features=features))] == formats
        assert [o["dtype"] for o in PASS.options(site, self.target)] == ["bf16", "int8"]

    def test_rounds_the_more_the_fewer_bits_and_little_at_all(self) -> None:
        for case in self.cases():
            errors = [
                relative_error(PASS.apply(case.site, o, None), case) for o in PASS.options(case.site, self.target)
            ]
            assert 0.0 < errors[0] < 2e-4 and errors[0] < errors[1] < 5e-3, errors

    def test_a_second_application_finds_nothing(self) -> None:
        for case in self.cases():
            for option in PASS.options(case.site, self.target):
                assert PASS.options(PASS.apply(case.site, option, None), self.target) == ()

    def test_is_written_like_every_option(self) -> None:
        site = self.cases()[0].site
        assert str(PASS.options(site, self.target)[1]) == "precision{dtype=int8}@layers.0.attention"

    def test_unknown_formats_are_refused(self) -> None:
        site = self.cases()[0].site
        for option in (Option.of("precision", site.id, dtype="int4"), Option.of("precision", site.id)):
            with pytest.raises(OptionError, match="no number format"):
                PASS.apply(site, option, None)


def test_comes_after_every_other_pass_but_the_form_and_keeps_what_they_did() -> None:
    known = discover()
    assert list(known)[-2:] == ["precision", "fused_sdpa"]
    case = attention_case(0, dtype=np.float32)
    assert isinstance(case.site, AttentionSite)
    pruned = known["head_pruning"].apply(
        case.site, Option.of("head_pruning", case.site.id, keep=2), statistics(case.site, case)
    )
    rounded = PASS.apply(pruned, Option.of("precision", case.site.id, dtype="int8"), None)
    assert isinstance(rounded, AttentionSite) and rounded.heads == 2
    assert_legal(rounded, case)


def uneven(case: Case) -> Case:
    """The same function with a few channels before the output projection a hundred times as large."""
    site = case.site
    if isinstance(site, AttentionSite):
        assert site.output is not None and site.value.weight_CGD is not None and site.value.bias_GD is not None
        size = np.where(np.arange(site.v_dim) < 2, 60.0, 1.0)
        value = replace(
            site.value, weight_CGD=(site.value.weight_CGD * size).astype(np.float32), bias_GD=site.value.bias_GD * size
        )
        output = replace(site.output, weight_HDC=(site.output.weight_HDC / size[:, None]).astype(np.float32))
        return Case(replace(site, value=value, output=output), case.values, case.valid_BS)
    assert isinstance(site, FeedForwardSite) and site.gate_CF is not None and site.gate_bias_F is not None
    size = np.where(np.arange(site.width) < 3, 60.0, 1.0)
    gate, bias = (site.gate_CF * size).astype(np.float32), (site.gate_bias_F * size).astype(np.float32)
    down = (site.down_FC / size[:, None]).astype(np.float32)
    return Case(replace(site, gate_CF=gate, gate_bias_F=bias, down_FC=down), case.values, case.valid_BS)


def test_large_channels_are_scaled_away_without_changing_the_function() -> None:
    cases = [
        attention_case(3, heads=4, kv_heads=2, dtype=np.float32),
        feed_forward_case(2, gated=True, activation="silu", dtype=np.float32),
    ]
    option = Option.of("precision", "x", dtype="int8")
    for case in map(uneven, cases):
        facts = statistics(case.site, case)
        scaled, plain = (PASS.apply(case.site, option, given) for given in (facts, None))
        assert relative_error(replace(scaled, precision="fp32"), case) < 1e-11
        assert 4 * relative_error(scaled, case) < relative_error(plain, case)
        assert_legal(scaled, case)


def test_units_of_a_curved_activation_are_left_alone() -> None:
    case = feed_forward_case(0, activation="tanh", dtype=np.float32)
    assert smoothed(case.site, statistics(case.site, case)) is case.site


def test_one_scale_per_token_beats_one_per_tensor() -> None:
    """Tokens differ in size (first tokens by much): the reason why activations have a scale each."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 96)) * np.exp(rng.normal(size=(64, 1)))
    weight = rng.normal(size=(96, 48))
    exact = x @ weight
    step = np.abs(x).max() / 127
    column = np.abs(weight).max(0) / 127
    whole = np.rint(x / step) @ np.rint(weight / column) * step * column

    def error(found: np.ndarray) -> float:
        return float(np.mean(np.sum((found - exact) ** 2, -1) / np.sum(exact**2, -1)))

    assert 10 * error(product(x, weight, "int8")) < error(whole)

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.local_window import LocalWindow, hidden_share
from rewriter.core.option import Option
from rewriter.core.site import AttentionSite, ScoreBias, Site
from tests.passes.contract import CalibratedContract, assert_legal
from tests.passes.reference import TARGET, Case, attention_case, output, probabilities, relative_error, statistics

PASS = LocalWindow()


def long(case: Case, tokens: int = 256) -> Case:
    """The same attention, said to have been seen with many tokens."""
    assert isinstance(case.site, AttentionSite)
    return Case(replace(case.site, example_shape=(2, tokens, tokens)), case.values, case.valid_BS)


def near_sighted(case: Case, decay: float = 0.15) -> Case:
    """Scores fall with distance, as relative position biases make them."""
    site = case.site
    assert isinstance(site, AttentionSite)
    tokens = case.valid_BS.shape[1]
    apart = np.abs(np.arange(tokens)[:, None] - np.arange(tokens)[None])
    masked = np.where(case.valid_BS[:, None, None, :], -decay * apart, -3.4e38)
    values = {**case.values, "mask": masked}
    return long(Case(replace(site, bias=ScoreBias("value", "mask")), values, case.valid_BS))


def attention(site: Site) -> AttentionSite:
    assert isinstance(site, AttentionSite)
    return site


class TestLocalWindow(CalibratedContract):
    name = "local_window"

    def cases(self) -> list[Case]:
        return [
            near_sighted(attention_case(0, batch=2, tokens=96)),
            near_sighted(attention_case(1, heads=4, kv_heads=2, mask="bool", rotary=True, batch=2, tokens=80)),
            long(attention_case(2, mask="causal", softcap=3.0, batch=2, tokens=80), 512),
        ]

    def refused(self) -> dict[str, Site]:
        site = attention(long(attention_case(0)).site)
        return {
            "cross-attention": replace(site, cross=True),
            "short-sequences": replace(site, example_shape=(2, 128, 128)),
            "already-local": replace(site, bias=replace(site.bias, window=8)),
            "cache-in-signature": replace(site, key=replace(site.key, present="present.0.key")),
        }

    def full(self, case: Case) -> Option:
        return Option.of(self.name, case.site.id, size=case.valid_BS.shape[1], sinks=4)

    def naive(self, case: Case, option: Option) -> Site:
        """As many keys, but the last ones of the sequence for all queries."""
        site, tokens = attention(case.site), case.valid_BS.shape[1]
        seen = np.arange(tokens) >= tokens - option.integer("size")
        before = case.values["mask"]
        hidden = np.where(before, 0.0, -np.inf) if before.dtype == bool else before
        return replace(site, bias=ScoreBias("value", self.remember(case, np.where(seen, hidden, -1e9))))

    def remember(self, case: Case, mask: np.ndarray) -> str:
        name = f"mask{abs(hash(mask.tobytes()))}"
        case.values[name] = mask  # type: ignore[index]
        return name

    def test_beats_the_naive_version(self) -> None:
        for case in self.cases()[:2]:
            for option in self.subject.options(case.site, self.target):
                ours = relative_error(self.subject.apply(case.site, option, self.facts(case)), case)
                assert ours < relative_error(self.naive(case, option), case)

    def test_rejects_levels_the_site_does_not_have(self) -> None:
        case = self.cases()[0]
        for size, sinks in ((0, 4), (32, -1), (1 << 20, 4)):
            self.assert_rejected(case, Option.of(self.name, case.site.id, size=size, sinks=sinks))

    def test_the_mass_by_distance_is_what_is_hidden(self) -> None:
        case = self.cases()[0]
        facts, weights = self.facts(case), probabilities(attention(case.site), case.values)
        assert facts is not None
        tokens = weights.shape[-1]
        apart = np.abs(np.arange(tokens)[:, None] - np.arange(tokens)[None])
        outside = (apart >= 32) & (np.arange(tokens) >= 4)[None]
        lost = (weights * outside).sum(axis=-1).transpose(0, 2, 1)[case.valid_BS]
        assert hidden_share(facts, 32) == pytest.approx(lost.mean(), rel=1e-9)

    def test_far_attention_is_doubted(self) -> None:
        far, near = (
            long(attention_case(3, batch=2, tokens=96)),
            near_sighted(attention_case(3, batch=2, tokens=96), 0.6),
        )
        option = Option.of(self.name, far.site.id, size=32, sinks=4)
        facts = [statistics(case.site, case) for case in (far, near)]
        found = PASS.doubt(far.site, option, facts[0])
        assert found is not None and found.code == "attention-is-far"
        assert PASS.doubt(near.site, option, facts[1]) is None

    def test_no_row_loses_its_last_key(self) -> None:
        """A query whose near keys are all padding still sees the others."""
        case = near_sighted(attention_case(4, batch=2, tokens=40))
        values = {**case.values, "mask": np.where(np.arange(40) < 3, 0.0, -np.inf)[None, None, None]}
        site = replace(attention(case.site), bias=ScoreBias("value", "mask", window=4, sinks=0))
        assert np.isfinite(output(site, values)).all()


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(4, 4, 4), (4, 2, 4), (2, 1, 8)]),
    mask=st.sampled_from(["none", "padding", "bool", "causal", "heads"]),
    rotary=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_random_sites(seed: int, shape: tuple[int, int, int], mask: str, rotary: bool, dtype: type) -> None:
    heads, kv_heads, dim = shape
    case = long(attention_case(seed, heads, kv_heads, dim, 12, 2, 40, mask, rotary, dtype=dtype))
    facts = statistics(case.site, case)
    for option in PASS.options(case.site, TARGET):
        assert_legal(PASS.apply(case.site, option, facts), case)
    full = PASS.apply(case.site, Option.of("local_window", case.site.id, size=40, sinks=4), facts)
    assert relative_error(full, case) < 1e-18

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from rewriter.attention.lower import lower
from rewriter.core.site import AttentionSite, FeedForwardSite, LinearSite, Site
from rewriter.graph.interpreter import Interpreter
from rewriter.rivals.budget import Reduced, Sizes
from rewriter.rivals.fisher import fisher, units_of
from rewriter.rivals.late_drop import late_drop
from rewriter.rivals.magnitude import head_sizes, magnitude, unit_sizes
from rewriter.rivals.mask_search import mask_search, rearranged
from rewriter.rivals.plain_svd import plain_svd
from tests.assembly.tiny import error, feeds, model

TOKENS = 16
RIVALS = {"magnitude": magnitude, "plain SVD": plain_svd, "late drop": late_drop}


def by_id(name: str) -> dict[str, Site]:
    return {site.id: site for site in model(name)[1].sites}


def lost(name: str, reduced: Reduced) -> float:
    graph, _ = model(name)
    return error(graph, list(reduced.sites.values()), feeds(graph, 5, 2))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("rival", RIVALS)
class TestEveryRival:
    def test_a_whole_budget_changes_nothing(self, name: str, rival: str) -> None:
        reduced = RIVALS[rival](by_id(name), 1.0, TOKENS)
        assert reduced.share == pytest.approx(1.0) and lost(name, reduced) < 1e-5

    def test_budget_is_kept_and_used(self, name: str, rival: str) -> None:
        sites = by_id(name)
        shares = [RIVALS[rival](sites, share, TOKENS).share for share in (0.9, 0.7, 0.5)]
        least = RIVALS[rival](sites, 0.01, TOKENS).share
        assert shares == sorted(shares, reverse=True) and least < 0.75
        assert all(share <= max(wanted, least) + 1e-9 for share, wanted in zip(shares, (0.9, 0.7, 0.5), strict=True))

    def test_input_stays_and_less_is_worse(self, name: str, rival: str) -> None:
        sites = by_id(name)
        before = {key: id(site) for key, site in sites.items()}
        mild, strong = (lost(name, RIVALS[rival](sites, share, TOKENS)) for share in (0.9, 0.3))
        assert 0 < mild < strong and {key: id(site) for key, site in sites.items()} == before


def test_magnitude_keeps_the_largest() -> None:
    sites = by_id("bert")
    kept = magnitude(sites, 0.6, TOKENS).sites
    for name, site in sites.items():
        small = kept[name]
        if isinstance(site, FeedForwardSite) and isinstance(small, FeedForwardSite):
            assert unit_sizes(small).min() >= np.sort(unit_sizes(site))[::-1][: small.width].min() - 1e-6
        elif isinstance(site, AttentionSite) and isinstance(small, AttentionSite):
            assert head_sizes(small).sum() == pytest.approx(np.sort(head_sizes(site))[::-1][: small.heads].sum())


def test_late_drop_begins_at_the_end() -> None:
    sites = by_id("bert")
    kept = late_drop(sites, 0.95, TOKENS).sites
    gone = [name for name, site in kept.items() if isinstance(site, LinearSite)]
    last = max((site for site in sites.values() if isinstance(site, AttentionSite)), key=lambda site: site.order)
    assert gone == [last.id]


def test_svd_cuts_the_product_of_queries_and_keys() -> None:
    site = next(site for site in by_id("bert").values() if isinstance(site, AttentionSite))
    cut = plain_svd({site.id: site}, 0.5, TOKENS).sites[site.id]
    assert isinstance(cut, AttentionSite)
    for head in range(site.heads):
        product, reduced = (
            np.asarray(one.query.weight_CGD[:, head] @ one.key.weight_CGD[:, head].T, np.float64)  # type: ignore[index]
            for one in (site, cut)
        )
        values = np.linalg.svd(product, compute_uv=False)
        rank = round(0.5 * site.qk_dim)
        assert np.linalg.norm(product - reduced) == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-3)


class TestMaskSearch:
    def test_gradients_are_those_of_masks(self) -> None:
        graph, found = model("bert")
        batches = feeds(graph, 0, 3)

        def loss(outputs: Mapping[str, Tensor], batch: int) -> Tensor:
            return sum(value.square().sum() for value in outputs.values() if value.is_floating_point())  # type: ignore[return-value]

        diagonal, matrix = fisher(graph, found.sites, batches, loss)
        site = next(site for site in found.sites if isinstance(site, AttentionSite))
        nudged = [_nudged_loss(graph, found.sites, site, batch, loss) for batch in batches]
        np.testing.assert_allclose(diagonal[site.id][1], sum(slope**2 for slope in nudged), rtol=2e-2)
        for one in found.sites:
            assert diagonal[one.id].shape == (units_of(one),)
            np.testing.assert_allclose(np.diagonal(matrix[one.id]), diagonal[one.id], rtol=1e-6)

    def test_best_split_of_a_small_problem(self) -> None:
        sites = by_id("bert")
        rng = np.random.default_rng(3)
        diagonal = {name: rng.random(units_of(site)) for name, site in sites.items()}
        matrix = {name: np.diag(values) for name, values in diagonal.items()}
        reduced = mask_search(sites, diagonal, matrix, 0.6, TOKENS)
        assert 0.55 < reduced.share <= 0.6
        assert _worth(sites, reduced, diagonal) >= 0.999 * _best_worth(sites, diagonal, 0.6)

    @pytest.mark.parametrize("seed", range(5))
    def test_rearranging_finds_what_no_swap_improves(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((12, 8))
        matrix = rows.T @ rows
        kept = rearranged([0, 1, 2], matrix)
        forms = {pick: _form(matrix, pick) for pick in itertools.combinations(range(8), 3)}
        neighbours = [pick for pick in forms if len(set(pick) & set(kept)) >= 2]
        assert len(kept) == 3 and forms[tuple(kept)] <= min(forms[pick] for pick in neighbours) + 1e-9
        assert forms[tuple(kept)] <= forms[0, 1, 2]


def _nudged_loss(graph, sites, site, batch, loss) -> float:  # type: ignore[no-untyped-def]
    """Slope of the loss as the mask of head 1 moves, by central differences in double precision."""
    from dataclasses import replace

    values = []
    for factor in (1.001, 0.999):
        weight = site.output.weight_HDC.astype(np.float64)
        weight[1] *= factor
        changed = replace(site, output=replace(site.output, weight_HDC=weight))
        lowered = lower(graph, [changed if one.id == site.id else one for one in sites], exact=True)
        with torch.no_grad():
            values.append(float(loss(Interpreter(lowered, dtype=torch.float64).run(batch), 0)))
    return (values[0] - values[1]) / 0.002


def _form(matrix: np.ndarray, kept: tuple[int, ...]) -> float:
    removed = np.array([float(index not in kept) for index in range(len(matrix))])
    return float(removed @ matrix @ removed)


def _worth(sites: Mapping[str, Site], reduced: Reduced, diagonal: Mapping[str, np.ndarray]) -> float:
    counts = {name: units_of(site) for name, site in reduced.sites.items()}
    return sum(float(np.sort(diagonal[name])[::-1][: counts[name]].sum()) for name in sites)


def _best_worth(sites: Mapping[str, Site], diagonal: Mapping[str, np.ndarray], share: float) -> float:
    """By trying every number of heads, with as many units as then fit."""
    sizes = Sizes(sites, TOKENS)

    def ranked(kind: type) -> list[tuple[float, float]]:
        found = [
            (float(value), sizes.flops(site) / units_of(site))
            for name, site in sites.items()
            if isinstance(site, kind)
            for value in diagonal[name]
        ]
        return sorted(found, reverse=True)

    heads, units = ranked(AttentionSite), ranked(FeedForwardSite)
    best = 0.0
    for count in range(len(heads) + 1):
        left = share * sizes.whole - sum(price for _, price in heads[:count])
        fitting = sum(total <= left for total in itertools.accumulate(price for _, price in units))
        if left >= 0:
            best = max(best, sum(v for v, _ in heads[:count]) + sum(v for v, _ in units[:fitting]))
    return best

"""What the benchmarks of tuning, variants and prediction put into their tables."""

from __future__ import annotations

import numpy as np
import pytest

from rewriter.benchmark import gemm_peak, prediction, variant_cost
from rewriter.benchmark.gemm_peak import Reached, epilogue
from rewriter.benchmark.prediction import Predicted, draw
from rewriter.benchmark.variant_cost import Cost, narrowed
from rewriter.core.errors import ModelError
from rewriter.core.option import Option
from rewriter.core.site import FeedForwardSite


def test_gemms_are_as_models_have_them() -> None:
    assert epilogue("128x1536x384") == (128, 1536, 384, "gelu", False)
    assert epilogue("128x384x1536") == (128, 384, 1536, "", True)
    with pytest.raises(ModelError, match="no GEMM"):
        epilogue("128x1536")


def test_shares_of_the_peak() -> None:
    row = Reached("1x2x3", "fp32", default_s=4e-4, seconds=2e-4, products_s=1e-4, memory_s=1.5e-4, tile="8 x 3, 8")
    assert "| 200 us | 25 % | 50 % | 75 % (memory) |" in row.row()
    assert "1 thread(s). Peaks: fp32 100 GOP/s; 30 GB/s" in gemm_peak.table([row], {"fp32": 1e11, "bytes": 3e10}, 1)


def test_medians_over_repetitions() -> None:
    runs = [[Cost("known", 0.1, built, 0.2, 0)] for built in (0.5, 0.9, 0.6)]
    assert "| known | 0 | 0.10 s | 0.60 s | 0.20 s | 0.90 s |" in variant_cost.table(runs)


def test_a_narrower_feed_forward_keeps_its_width() -> None:
    site = FeedForwardSite("ff", "x", np.ones((4, 6)), np.ones(6), np.ones((6, 4)), np.ones(4), "y")
    cut = narrowed(site, 5)
    assert isinstance(cut, FeedForwardSite)
    assert cut.up_CF.shape == (4, 5) and cut.down_FC.shape == (5, 4) and cut.up_bias_F is not None
    assert cut.up_bias_F.shape == (5,) and cut.gate_CF is None


def test_plans_differ_and_repeat_with_their_seed() -> None:
    choices = {f"s{n}": ((), (Option("a", ()),), (Option("b", ()),)) for n in range(6)}
    plans = draw(choices, 8, 3)
    assert plans == draw(choices, 8, 3) != draw(choices, 8, 4)
    assert all(set(plan) == set(choices) for plan in plans) and any(any(plan.values()) for plan in plans)


def test_errors_are_relative_to_what_was_measured() -> None:
    rows = [Predicted("a", 0.95, 1.0), Predicted("b", 2.2, 2.0), Predicted("c", 3.03, 3.0)]
    text = prediction.table(rows)
    assert "| a | 950.00 ms | 1000.00 ms | -5.0 % |" in text
    assert "Median error 5.0 % (signed +1.0 %), largest 10.0 %, Spearman 1.000, 3 plans." in text

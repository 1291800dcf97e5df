"""Every pass does on torch graphs what it does on ONNX graphs, or says why it cannot."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import rewriter
from rewriter.assembly.assemble import assemble
from rewriter.attention.lower import lower
from rewriter.core.errors import OptionError
from rewriter.core.option import Option, Plan
from rewriter.core.passes_registry import discover
from rewriter.core.target import Target
from rewriter.graph.interpreter import Interpreter
from rewriter.torch_graphs.sites import TorchSites
from tests.passes.reference import TARGET
from tests.torch_graphs.blocks import WIDTH, in_form

PASSES = discover()
WIDE = Target(**{**vars(TARGET), "features": (*TARGET.features, "avx512_vnni", "avx512_bf16")})
# Number formats are the runtime's affair: torch computes in the dtype of its parameters.
NOT_IN_FX = {"precision"}


@cache
def sites(name: str) -> TorchSites:
    model, example = in_form(name, "module")
    return rewriter.sites(model, **example)


# Heads of six dims leave low rank no level that tiles like, so its options are named here.
RANKS = {name: (Option.of(name, "layers.0.attention", rank=4),) for name in ("low_rank_qk", "low_rank_vo")}
# Sequences of ten tokens leave no room for a window, and these blocks have no cache: both refuse here.
NOT_HERE = {"local_window", "low_rank_cache"}


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 11, WIDTH, generator=generator) for _ in range(6)]


def strongest(name: str, block: str) -> list[Option]:
    """The strongest level at each site, where the pass has one."""
    offered = [PASSES[name].options(site, WIDE) for site in sites(block)]
    return list(RANKS.get(name, ())) or [options[-1] for options in offered if options]


CASES = [(name, block) for name in PASSES for block in ("sdpa", "causal") if strongest(name, block)]


def test_every_pass_has_a_case() -> None:
    assert {name for name, _ in CASES} >= set(PASSES) - NOT_HERE
    assert all(PASSES[name].refuse(site) for name in NOT_HERE for site in sites("sdpa"))


@pytest.mark.parametrize(("name", "block"), CASES)
def test_torch_and_onnx_agree(name: str, block: str) -> None:
    found, plan = sites(block), Plan.of(strongest(name, block))
    if name in NOT_IN_FX:
        with pytest.raises(OptionError):
            rewriter.apply(found, plan, data())
        return
    made = rewriter.apply(found, plan, data())
    assert not made.refused and set(made.sites) >= {option.site for option in plan.options}
    feeds = [found.bridge.feeds_of(batch) for batch in data()]
    assembled = assemble(found.graph, list(found), plan, PASSES, feeds)
    lowered = Interpreter(lower(found.graph, list(assembled.sites.values())))
    for batch, feed in zip(data()[:2], feeds, strict=False):
        (expected,) = lowered.run(feed).values()
        torch.testing.assert_close(made.module(batch), expected, rtol=1e-4, atol=1e-5)
    if PASSES[name].kind == "exact":
        model, _ = in_form(block, "module")
        torch.testing.assert_close(made.module(data()[0]), model(data()[0]), rtol=1e-4, atol=1e-5)

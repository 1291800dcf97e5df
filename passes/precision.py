"""Round what the linear layers of a sub-block multiply to fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from rewriter.core.errors import OptionError
from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass, attention_refusal, describes, feed_forward_refusal
from rewriter.core.site import Array, FeedForwardSite, LinearSite, Precision, Site
from rewriter.core.smoothing import smoothed
from rewriter.core.statistics import Statistics
from rewriter.core.target import Target

FORMATS: tuple[Precision, ...] = ("bf16", "int8")  # the milder one first
_MOST_TERMS = 1 << 16  # sums of that many products of bytes fit into 32 bits


@dataclass(frozen=True)
class PrecisionPass(Pass):
    """Multiply in bfloat16 or in 8-bit integers, with sums, norms, softmax and the residual stream in fp32.

    What it does
        ``bf16`` rounds both operands of every linear layer of the sub-block to 8 bits of mantissa. ``int8`` scales
        every column of a weight by its largest magnitude to whole numbers from -127 to 127, every token between its
        least and its largest number to whole numbers from 0 to 255 while the model runs, and adds their products
        exactly. Before that the channels which the output projection reads are scaled, exactly, where a few large ones
        would widen the steps of whole tokens: in values, gates and rectified units. Scores and the mixing of values are
        in bf16 with either. The weights stay as they are until the graph is built, so that the output projection is
        re-solved in full precision.
    When it applies
        Weights are fp32 and the target has the instructions (AVX512-BF16, AVX512-VNNI); a sub-block is rounded once.
    Exact or calibrated
        Calibrated: its error must be measured, and the output projection is fitted to the rounded features. Without
        statistics it rounds and leaves channels as they are.
    What it costs
        Nothing to apply. One pass over each token to find its scale at run time.
    Before and after
        ``x W + b`` -> ``s_token s_column (round(x / s_token) round(W / s_column)) + b``: a fourth of the memory traffic
        for weights and four times the products per instruction.
    Source
        Scales per token and per channel as in LLM.int8 (Dettmers et al. 2022) and ZeroQuant (Yao et al. 2022); scaled
        channels as in SmoothQuant (Xiao et al. 2023), inside of the block; what one scale per tensor loses beside them
        is in tests/passes/test_precision.py.
    """

    name: ClassVar[str] = "precision"
    kind: ClassVar[Literal["exact", "calibrated"]] = "calibrated"
    order: ClassVar[int] = 90

    def refuse(self, site: Site) -> Refusal | None:
        """See `Pass.refuse`; also when the site is rounded already."""
        if not isinstance(site, LinearSite):
            refusal = feed_forward_refusal(site) if isinstance(site, FeedForwardSite) else attention_refusal(site)
            if refusal is not None:
                return refusal
        if site.precision != "fp32":
            return Refusal("already-rounded", f"the products of {site.id} are in {site.precision} already")
        weights = _weights(site)
        if any(weight.dtype != np.float32 for weight in weights):
            return Refusal("not-fp32", f"the weights of {site.id} are {weights[0].dtype}, only fp32 is rounded")
        if any(weight.shape[0] > _MOST_TERMS for weight in weights):
            return Refusal("too-wide", f"sums of more than {_MOST_TERMS} products of bytes leave 32 bits")
        return None

    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """The formats that the target multiplies, the milder first."""
        if self.refuse(site) is not None:
            return ()
        return tuple(Option.of(self.name, site.id, dtype=dtype) for dtype in FORMATS if target.multiplies(dtype))

    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """See `Pass.apply`; `statistics` may be missing. What a target lacks is not asked: plans move."""
        refusal = self.refuse(site)
        if refusal is not None:
            raise OptionError(f"{option} does not apply: {refusal.why}", "Leave the option out of the plan")
        for dtype in FORMATS:
            if dict(option.parameters).get("dtype") == dtype:
                known = statistics is not None and describes(statistics, site, ())
                if dtype == "int8" and statistics is not None and known:
                    site = smoothed(site, statistics)
                return replace(site, precision=dtype)
        raise OptionError(f"{option} names no number format", f"Write dtype={' or dtype='.join(FORMATS)}")


def _weights(site: Site) -> list[Array]:
    """Every weight as a matrix (terms of a sum, columns)."""
    if isinstance(site, FeedForwardSite):
        found = [site.up_CF, site.gate_CF, site.down_FC]
    elif isinstance(site, LinearSite):
        found = [site.inner.weight_CGD, *([site.output.weight_HDC.reshape(site.features, -1)] if site.features else [])]
    else:
        operands = [part.weight_CGD for part in (site.query, site.key, site.value)]
        weight_HDC = None if site.output is None else site.output.weight_HDC
        found = [*operands, None if weight_HDC is None else weight_HDC.reshape(-1, weight_HDC.shape[-1])]
    return [weight for weight in found if weight is not None]

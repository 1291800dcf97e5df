"""The contract of a pass: data in, data out. One file in `passes/` holds one subclass of `Pass`.

The framework finds passes by listing that folder, and enforces what a pass must not promise by itself: the input is
unchanged, options print and parse, refusals have reasons (tests/passes/contract.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from rewriter.core.errors import OptionError
from rewriter.core.linalg import ridge_towards
from rewriter.core.option import Option, Value
from rewriter.core.refusal import Refusal
from rewriter.core.site import Array, AttentionSite, FeedForwardSite, LinearSite, Site, State
from rewriter.core.statistics import Array64, AttentionStatistics, Detail, FeedForwardStatistics, Statistics
from rewriter.core.target import Target

RIDGE = 1e-3  # towards the current weights, in every re-solve a pass does by itself; assembly chooses its own anew


class Pass(ABC):
    """One rewrite of a raised site.

    `kind` is ``exact`` (same function in exact arithmetic, needs no data) or ``calibrated`` (needs statistics, its
    output projection is solved anew by `rewriter.assembly`). `order` sorts passes that meet at one site: exact
    ones below 10, cuts of whole heads before ranks. `requires` names the statistics that `apply` reads besides the
    regression of the output projection. A pass that does not combine is tried at a site without other cuts. An exact
    pass is applied wherever it can be, unless it is `timed`: then its options compete by time. A pass that
    `changes_cache` refuses every site unless it is `permitted`.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["exact", "calibrated"]]
    order: ClassVar[int] = 50
    requires: ClassVar[frozenset[Detail]] = frozenset()
    combines: ClassVar[bool] = True
    timed: ClassVar[bool] = False
    changes_cache: ClassVar[bool] = False

    def permitted(self) -> Pass:
        """The same pass with leave to change the sizes of caches in the model's signature."""
        return self

    def needs(self, option: Option) -> frozenset[Detail]:
        """The statistics that `apply` reads for this very option."""
        return self.requires

    @classmethod
    def option(cls, site: str = "", **parameters: Value) -> Option:
        """This pass with its parameters, as a choice for a plan: ``HeadPruning.option(keep=8)``."""
        return Option.of(cls.name, site, **parameters)

    @abstractmethod
    def refuse(self, site: Site) -> Refusal | None:
        """Why this pass must leave the site alone, or None."""

    @abstractmethod
    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """The choices worth pricing at this site, cheapest cut first; empty if refused. Options carry the site's id."""

    @abstractmethod
    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """The rewritten site. `statistics` is given to calibrated passes and describes this very site."""

    def doubt(self, site: Site, option: Option, statistics: Statistics) -> Refusal | None:
        """Why what was seen on data speaks against an option, or None; a search then leaves the option out."""
        return None

    def losses(self, site: Site, statistics: Statistics) -> Mapping[Option, float]:
        """The squared output error of options that follow from `statistics` alone, for all levels in one sweep.

        In the units of `Regression.loss`, ridge penalty included; empty where an option's error shows only when run.
        """
        return {}

    def feature_map(self, site: Site, option: Option, statistics: Statistics) -> Array | None:
        """How the input of the output projection changes: indices of kept columns, or a matrix (F, F').

        `Regression.map` then gives the rewritten site's regression without a forward pass. None: no such map.
        """
        return None


def describes(statistics: Statistics, site: Site, wanted: Collection[Detail]) -> bool:
    """Whether statistics are about a site of these sizes: after some rewrites they must be taken anew."""
    if statistics.regression.gram.shape[0] != output_weights(site).shape[0]:
        return False
    if not isinstance(site, AttentionSite) or not isinstance(statistics, AttentionStatistics) or "heads" not in wanted:
        return True
    dim = site.qk_dim
    sizes = statistics.query_HDD.shape == (site.heads, dim, dim) and statistics.key_GDD.shape[0] == site.key.heads
    return sizes and ("mixed" not in wanted or statistics.mixed_HKK is not None)


def attention_refusal(site: Site, cached: bool = False) -> Refusal | None:
    """What any rewrite of an attention's weights needs: mapped, lowerable, nothing read from outside, no cache.

    With `cached` a cache is no reason.
    """
    if not isinstance(site, AttentionSite):
        if isinstance(site, LinearSite):
            return Refusal("already-replaced", f"{site.id} is no attention any more")
        return Refusal("not-attention", f"{site.id} is a feed-forward, not an attention")
    reason = _first_problem(site)
    if not site.mapped or site.output is None:
        return reason or _opaque_refusal(site)
    if site.state is not State.LOWERABLE:
        why = "writing this attention anew was not shown to be the identity"
        return reason or Refusal("not-lowerable", why, site.nodes[:1])
    if site.escapes:
        return Refusal("value-escapes", f"values inside are read from outside: {', '.join(site.escapes)}", site.escapes)
    if site.cached and not cached:
        return Refusal("cache-in-signature", "a key/value cache is part of the model's inputs or outputs")
    return None


def _first_problem(site: AttentionSite | FeedForwardSite) -> Refusal | None:
    """The first thing noticed that keeps a site from being rewritten; a bias made from queries or keys does not."""
    return next((problem for problem in site.problems if not problem.code.startswith("bias-depends-on")), None)


def _opaque_refusal(site: AttentionSite) -> Refusal:
    roles = {"queries": site.query, "keys": site.key, "values": site.value}
    unknown = [role for role, operand in roles.items() if not operand.mapped]
    operands = [roles[role] for role in unknown]
    if site.cross and operands and all(operand.opaque for operand in operands):
        why = "keys or values are inputs of the model, not computed in it"
        return Refusal("cache-in-signature", why, tuple(operand.opaque for operand in operands))
    reasons = [operand.opaque_why for operand in operands if operand.opaque_why]
    what = ", ".join(unknown) or "some operand"
    why = f"the weights of {what} are not known per head" + (f": {reasons[0]}" if reasons else "")
    return Refusal("not-mapped", why, site.nodes[:1])


def feed_forward_refusal(site: Site) -> Refusal | None:
    """What any rewrite of a feed-forward's weights needs: lowerable, nothing read from outside."""
    if not isinstance(site, FeedForwardSite):
        return Refusal("not-feed-forward", f"{site.id} is an attention, not a feed-forward")
    if site.state is not State.LOWERABLE:
        why = "writing this block anew was not shown to be the identity"
        return _first_problem(site) or Refusal("not-lowerable", why, site.nodes[:1])
    if site.escapes:
        return Refusal("value-escapes", f"values inside are read from outside: {', '.join(site.escapes)}", site.escapes)
    return None


def attention_input(
    refusal: Refusal | None, site: Site, option: Option, statistics: Statistics | None
) -> tuple[AttentionSite, AttentionStatistics]:
    """The typed arguments of an attention pass's `apply`; raises `OptionError` where it must not be applied."""
    if refusal is not None:
        raise OptionError(f"{option} does not apply: {refusal.why}", "Leave the option out of the plan")
    if not isinstance(site, AttentionSite) or not isinstance(statistics, AttentionStatistics):
        raise OptionError(f"{option} needs statistics of an attention", "Give calibration data with --data")
    return site, statistics


def feed_forward_input(
    refusal: Refusal | None, site: Site, option: Option, statistics: Statistics | None
) -> tuple[FeedForwardSite, FeedForwardStatistics]:
    """The typed arguments of a feed-forward pass's `apply`; raises `OptionError` where it must not be applied."""
    if refusal is not None:
        raise OptionError(f"{option} does not apply: {refusal.why}", "Leave the option out of the plan")
    if not isinstance(site, FeedForwardSite) or not isinstance(statistics, FeedForwardStatistics):
        raise OptionError(f"{option} needs statistics of a feed-forward", "Give calibration data with --data")
    return site, statistics


def out_of_range(option: Option, key: str, low: int, high: int) -> OptionError:
    """The error for a level that the site does not have."""
    return OptionError(f"{option}: {key} must lie between {low} and {high}", "Choose a level that the site has")


def resolve_output(site: Site, statistics: Statistics, ridge: float = RIDGE, level: float | None = None) -> Site:
    """The site with its output projection fitted anew by `linalg.ridge_towards`; a missing bias is added."""
    weights = ridge_towards(statistics.regression, output_weights(site), ridge, level)
    return with_output_weights(site, weights)


def output_weights(site: Site) -> Array64:
    """The output projection as (F+1, C) in float64, bias in the last row."""
    if isinstance(site, FeedForwardSite):
        weight, bias = site.down_FC, site.down_bias_C
    else:
        assert site.output is not None
        weight, bias = site.output.weight_HDC.reshape(-1, site.output.weight_HDC.shape[-1]), site.output.bias_C
    zeros = np.zeros(weight.shape[1])
    return np.vstack([weight.astype(np.float64), (zeros if bias is None else bias.astype(np.float64))[None]])


def with_output_weights(site: Site, weights: Array64) -> Site:
    """The inverse of `output_weights`, in the dtype the site already has."""
    if isinstance(site, LinearSite) and not site.features and site.output.bias_C is None:
        return site  # nothing at all was asked for
    if isinstance(site, FeedForwardSite):
        dtype = site.down_FC.dtype
        return replace(site, down_FC=weights[:-1].astype(dtype), down_bias_C=weights[-1].astype(dtype))
    assert site.output is not None
    before = site.output.weight_HDC
    heads = before.shape[0] if isinstance(site, LinearSite) else site.heads
    weight_HDC = weights[:-1].reshape(heads, -1 if heads else 0, weights.shape[1]).astype(before.dtype)
    output = replace(site.output, weight_HDC=weight_HDC, bias_C=weights[-1].astype(before.dtype))
    return replace(site, output=output)

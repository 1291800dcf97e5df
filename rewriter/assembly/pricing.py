"""The local error of every option at every site, on the original model's own activations, in one walk.

Options that change features linearly (heads, value ranks, hidden units) follow from the site's statistics alone; the
others are run on a probe of the tokens. Combinations that begin alike share their work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from rewriter.assembly.rewriting import Passes, Rewritten, required
from rewriter.attention.lower import fragment, lower
from rewriter.calibration.statistics import RegressionAccumulator
from rewriter.calibration.walk import (
    Tokens,
    feature_name,
    inner_names,
    learn_tokens,
    output_name,
    rows_of,
    statistics_of,
)
from rewriter.core.option import Option
from rewriter.core.rewrite import describes, output_weights, resolve_output
from rewriter.core.site import Site, State
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Stepper

Feeds = Mapping[str, np.ndarray]
Options = tuple[Option, ...]
Advance = Callable[[float, str], None]


def price_options(
    graph: OnnxGraph,
    sites: Sequence[Site],
    options_by_site: Mapping[str, Sequence[Options]],
    passes: Passes,
    batches: Sequence[Feeds],
    probe_tokens: int = 4096,
    advance: Advance | None = None,
) -> dict[str, dict[Options, float]]:
    """By site and combination: the share of the output's spread lost, everything below left as it was.

    The output projection is fitted anew each time; shares are corrected for that (`Regression.loss_share`), and are
    infinite where there are too few tokens to say. `probe_tokens` bounds how many tokens an option is run on.
    """
    ordered = [site for site in sorted(sites, key=lambda site: site.order) if site.state is State.LOWERABLE]
    found: dict[str, dict[Options, float]] = {}
    with torch.no_grad():
        pricer = _Pricer(graph, ordered, passes, list(batches), probe_tokens)
        for index, site in enumerate(ordered):
            if options_by_site.get(site.id):
                found[site.id] = pricer.price(site, options_by_site[site.id])
            pricer.leave(index)
            if advance:
                advance((index + 1) / len(ordered), site.id)
    return found


class _Pricer:
    """The original model on all batches, up to the site priced last."""

    def __init__(
        self, graph: OnnxGraph, sites: Sequence[Site], passes: Passes, batches: list[Feeds], probe_tokens: int
    ) -> None:
        self.graph, self.sites, self.passes, self.probe_tokens = graph, sites, passes, probe_tokens
        self.lowered = lower(graph, sites)
        self.stepper = Stepper(self.lowered, batches)
        self.tokens = Tokens()

    def price(self, site: Site, combinations: Sequence[Options]) -> dict[Options, float]:
        """The share lost by every combination at one site."""
        batches = list(range(self.stepper.batches))
        unchanged = ((None, None) for _ in batches)
        wanted = required(itertools.chain.from_iterable(combinations), self.passes)
        facts = statistics_of(site, self.lowered, self.stepper, self.tokens, batches, unchanged, wanted)
        states: dict[Options, Rewritten] = {(): Rewritten(site, facts.at(0.0))}
        found: dict[Options, float] = {}
        for options in combinations:
            if any(self.passes[one.name].doubt(site, one, facts.at(0.0)) for one in options):
                found[options] = float("inf")
                continue
            state = self._reach(options, states)
            found[options] = state.statistics.regression.loss_share(output_weights(state.site)) if options else 0.0
        return found

    def leave(self, index: int) -> None:
        """Go on to the next site, and drop what only this one needed."""
        site = self.sites[index]
        future = set[str]()
        for later in self.sites[index + 1 :]:
            future |= inner_names(self.lowered, later)
        for batch in range(self.stepper.batches) if future else ():
            learn_tokens(site, self.lowered, self.stepper, batch, self.tokens)
            self.stepper.advance([output_name(site)], batch)
            self.stepper.prune(future, batch)

    def _reach(self, options: Options, states: dict[Options, Rewritten]) -> Rewritten:
        if options in states:
            return states[options]
        before = self._fresh(self._reach(options[:-1], states), options[-1])
        state = before.then(options[-1], self.passes)
        if not state.measured:
            state = self._probed(state)
        states[options] = state
        return state

    def _fresh(self, state: Rewritten, option: Option) -> Rewritten:
        """With statistics of the site as rewritten so far, where those at hand are of other sizes."""
        wanted = required([option], self.passes)
        if not state.stale and describes(state.statistics, state.site, wanted):
            return state
        batches = list(range(self.stepper.batches))
        targets = ((self.stepper.value(output_name(state.site), batch), None) for batch in batches)
        facts = statistics_of(
            state.site, self.lowered, self.stepper, self.tokens, batches, targets, wanted, self.graph
        )  # fmt: skip
        return Rewritten(state.site, facts.at(0.0), measured=False)

    def _probed(self, state: Rewritten) -> Rewritten:
        """The same site with features as they are when it is run, and its output fitted to them."""
        made, seen = fragment(self.graph, state.site), 0
        found = RegressionAccumulator(output_weights(state.site))
        for batch in range(self.stepper.batches):
            if seen >= self.probe_tokens:
                break
            features = self.stepper.run_fragment(made, batch, [feature_name(state.site)])[feature_name(state.site)]
            picked = self.tokens.of(batch, tuple(features.shape[:-1]))
            rows, target, _ = rows_of(state.site, features, self.stepper.value(output_name(state.site), batch), None)
            found.add(rows[picked], None if target is None else target[picked])
            seen += int(picked.sum())
        statistics = state.statistics.with_regression(found.result().target(0.0))
        return Rewritten(resolve_output(state.site, statistics), statistics)

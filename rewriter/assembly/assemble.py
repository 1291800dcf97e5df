"""From a plan to rewritten sites: bottom-up, teacher and student side by side, so that earlier error is absorbed.

At every sub-block the statistics are those of the rewritten student below it, and the output projection is fitted so
that the student's stream returns to the teacher's. Source: the joint re-solve of K-prune (Park et al. 2023) and ZipLM
(Kurtic et al. 2023), with a ridge towards the present weights and a veto by held-back data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rewriter.assembly.pricing import price_options
from rewriter.assembly.residual import residual_of
from rewriter.assembly.rewriting import Passes, Rewritten, apply_exact, calibrated_options, required
from rewriter.assembly.solve import Fit, fit
from rewriter.attention.lower import fragment, lower
from rewriter.calibration.statistics import RegressionAccumulator, StreamRegression
from rewriter.calibration.walk import (
    SiteStatistics,
    Tokens,
    feature_name,
    inner_names,
    learn_tokens,
    output_name,
    rows_of,
    statistics_of,
)
from rewriter.core.errors import DataError
from rewriter.core.option import Option, Plan
from rewriter.core.rewrite import describes, output_weights, with_output_weights
from rewriter.core.site import Site, State
from rewriter.core.statistics import Detail
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Stepper

__all__ = ["Assembled", "assemble", "price_options"]

Feeds = Mapping[str, np.ndarray]
Advance = Callable[[float, str], None]
Resolve = Literal["changed", "all"]


@dataclass(frozen=True)
class Assembled:
    """Every site that took part, by id, as the plan leaves it, and how output projections were fitted."""

    sites: dict[str, Site]
    fits: dict[str, Fit] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, float]:
        """Share of each fitted site's output that is lost on held-back data."""
        return {site: fitted.loss_after for site, fitted in self.fits.items()}


def assemble(
    graph: OnnxGraph,
    sites: Sequence[Site],
    plan: Plan,
    passes: Passes,
    batches: Sequence[Feeds],
    select_batches: Sequence[Feeds] | None = None,
    resolve: Resolve = "all",
    share: float = 1.0,
    advance: Advance | None = None,
) -> Assembled:
    """Rewritten sites for a plan. `sites` are those of `graph`, of which the lowerable ones take part.

    `batches` are feeds to calibrate on, `select_batches` feeds that judge fits (by default every fourth batch is held
    back). ``resolve="all"`` also refits unchanged sub-blocks above the first change where that helps. `share` keeps a
    part of the tokens. Raises `OptionError` for options that do not apply, `DataError` without data where it is needed.
    """
    lowerable = [site for site in sorted(sites, key=lambda site: site.order) if site.state is State.LOWERABLE]
    base = apply_exact(lowerable, plan, passes)
    wanted = {site.id: calibrated_options(plan.at(site.id), passes) for site in base}
    if not any(wanted.values()):
        return Assembled({site.id: site for site in base})
    if not batches:
        raise DataError("the plan has calibrated options but there is no calibration data", "Give --data")
    with torch.no_grad():
        walk = _Walk(graph, base, list(batches), None if select_batches is None else list(select_batches), share)
        for index, site in enumerate(base):
            if advance:
                advance(index / len(base), site.id)
            walk.visit(index, wanted[site.id], passes, resolve)
    return Assembled({site.id: walk.changed.get(site.id, site) for site in base}, walk.fits)


class _Walk:
    """Teacher and student on all batches, up to the site visited last."""

    def __init__(
        self, graph: OnnxGraph, sites: list[Site], batches: list[Feeds], select: list[Feeds] | None, share: float
    ) -> None:
        self.graph, self.sites = graph, sites
        self.lowered = lower(graph, sites)
        self.held_back = select is None
        self.feeds = batches + (select or [])
        everything = list(range(len(self.feeds)))
        self.select = everything[len(batches) :] if select else everything[3::4] or everything[-1:]
        self.calibrate = [batch for batch in everything if batch not in self.select] or everything
        self.teacher = Stepper(self.lowered, self.feeds)
        self.student: Stepper | None = None
        self.tokens = Tokens(share)
        self.residuals = [
            residual_of(self.lowered, output_name(site), [output_name(later) for later in sites[index + 1 :]])
            for index, site in enumerate(sites)
        ]
        self.changed: dict[str, Site] = {}
        self.fits: dict[str, Fit] = {}

    def visit(self, index: int, options: tuple[Option, ...], passes: Passes, resolve: Resolve) -> None:
        """Rewrite one site, fit its output, and let the student go on from there."""
        site = self.sites[index]
        if options or (self.student is not None and resolve == "all"):
            calibrate, select = (
                self._measure(index, batches, required(options, passes)) for batches in (self.calibrate, self.select)
            )
            rewritten = Rewritten(site, calibrate.at(1.0))
            for option in options:
                rewritten = self._fresh(index, rewritten, option, passes).then(option, passes)
            fitted = self._fit(index, rewritten, calibrate.regression, select.regression)
            self.fits[site.id] = fitted
            if options or not fitted.kept:
                self.changed[site.id] = with_output_weights(rewritten.site, fitted.weights)
            self._go_on(index, self.changed.get(site.id, site))
        else:
            self._pass_by(index)

    def _pass_by(self, index: int) -> None:
        """Leave a site as it is."""
        site, future = self.sites[index], self._future(index)
        for stepper in (self.teacher, self.student):
            for batch in range(len(self.feeds)) if stepper and future else ():
                assert stepper is not None
                learn_tokens(site, self.lowered, stepper, batch, self.tokens)
                stepper.advance([output_name(site)], batch)
                stepper.prune(future, batch)

    def _fresh(self, index: int, rewritten: Rewritten, option: Option, passes: Passes) -> Rewritten:
        """With statistics of the site as rewritten so far, where those at hand are of other sizes."""
        wanted = required([option], passes)
        if not rewritten.stale and describes(rewritten.statistics, rewritten.site, wanted):
            return rewritten
        facts = self._measure(index, self.calibrate, wanted, rewritten.site)
        return Rewritten(rewritten.site, facts.at(1.0), measured=False)

    def _measure(
        self, index: int, batches: list[int], wanted: frozenset[Detail], rewritten: Site | None = None
    ) -> SiteStatistics:
        """Statistics of the site as it stands on the student's stream, against the teacher's output."""
        source = self.student or self.teacher
        site = rewritten or self.sites[index]
        targets: Iterator[tuple[Tensor | None, Tensor | None]] = self._targets(index, batches)
        if self.student is None:
            targets = ((None, None) for _ in targets)
        graph = None if rewritten is None else self.graph
        return statistics_of(site, self.lowered, source, self.tokens, batches, targets, wanted, graph)

    def _targets(self, index: int, batches: list[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
        site, residual = self.sites[index], self.residuals[index]
        output, source = output_name(site), self.student or self.teacher
        kept = {*self._needed(index), *self._future(index)}
        for batch in batches:
            wanted = self.teacher.value(output, batch)
            drift = None
            if self.student is not None and residual is not None:
                drift = self.teacher.value(residual, batch) - self.student.value(residual, batch)
                drift = drift if drift.shape[-1:] == wanted.shape[-1:] and drift.numel() == wanted.numel() else None
            yield wanted, drift
            # Until it is fitted the teacher's output stands in for the student's, so that what made it can be dropped.
            source.override(output, batch, wanted)
            for stepper in {id(self.teacher): self.teacher, id(source): source}.values():
                stepper.prune(kept, batch)

    def _fit(self, index: int, rewritten: Rewritten, calibrate: StreamRegression, select: StreamRegression) -> Fit:
        if rewritten.measured:
            for mapping in rewritten.maps:
                calibrate, select = calibrate.map(mapping), select.map(mapping)
        else:
            calibrate, select = (self._run(index, rewritten.site, part) for part in (self.calibrate, self.select))
        current = output_weights(rewritten.site)
        return fit(calibrate, select, current, self.student is not None, refit=self.held_back)

    def _run(self, index: int, site: Site, batches: list[int]) -> StreamRegression:
        """The regression of a rewritten site's own features, by running it on the student's stream."""
        source, made = self.student or self.teacher, fragment(self.graph, site)
        found = RegressionAccumulator(output_weights(site))
        for batch, (output, drift) in zip(batches, self._targets(index, batches), strict=True):
            features = source.run_fragment(made, batch, [feature_name(site)])[feature_name(site)]
            picked = self.tokens.of(batch, tuple(features.shape[:-1]))
            rows, target, residual = rows_of(site, features, output, drift)
            found.add(rows[picked], *(None if part is None else part[picked] for part in (target, residual)))
        return found.result()

    def _go_on(self, index: int, site: Site) -> None:
        """Put the site's new output into the student's stream."""
        if self.student is None:
            self.student = Stepper(self.lowered, self.feeds)
            for batch in range(len(self.feeds)):
                for name in self.teacher.held(batch):
                    self.student.override(name, batch, self.teacher.value(name, batch))
        made, output, future = fragment(self.graph, site), output_name(site), self._future(index)
        for batch in range(len(self.feeds)) if future else ():
            self.student.override(output, batch, self.student.run_fragment(made, batch, [output])[output])
            self.student.prune(future, batch)
            self.teacher.prune(future, batch)

    def _needed(self, index: int) -> set[str]:
        """What this site's fragment and targets read."""
        names = {output_name(self.sites[index]), *fragment(self.graph, self.sites[index]).reads()}
        return names | {name for name in (self.residuals[index],) if name}

    def _future(self, index: int) -> set[str]:
        """What the sites above will ask for."""
        names = {name for name in self.residuals[index + 1 :] if name}
        for later in self.sites[index + 1 :]:
            names |= inner_names(self.lowered, later)
        return names

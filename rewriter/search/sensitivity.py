"""From a local error to a damage: how much the model's metric suffers per unit of a sub-block's relative output error.

Local errors come from statistics alone and are cheap; what they mean for the metric differs by site. One whole-model
score of one representative option per site calibrates the scale (algorithms: Gram-loss proxy, calibrated by a few
scored options).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from rewriter.core.option import Plan
from rewriter.search.problem import Choice, Options, Problem, undominated

LocalErrors = Mapping[str, Mapping[Options, float]]

_FLOOR = 1e-7  # damage of an option that no score could tell from zero


def representative(errors: Mapping[Options, float]) -> Options | None:
    """The option nearest to the middle (geometric mean) of a site's local errors: big enough to be seen in a score."""
    usable = {options: error for options, error in errors.items() if options and np.isfinite(error) and error > 0}
    if not usable:
        return None
    middle = float(np.exp(np.mean(np.log(list(usable.values())))))
    return min(usable, key=lambda options: (abs(np.log(usable[options] / middle)), options))


def slopes(
    errors: LocalErrors, damage_of: Callable[[Plan], float], advance: Callable[[float, str], None] | None = None
) -> dict[str, float]:
    """Damage per unit of local error at each site, by scoring one representative option each."""
    found: dict[str, float] = {}
    for done, (site, by_options) in enumerate(errors.items()):
        options = representative(by_options)
        if options is not None:
            damage = damage_of(Plan({site: options}))
            found[site] = max(damage, _FLOOR) / by_options[options]
            if advance:
                advance((done + 1) / len(errors), f"{', '.join(map(str, options))}: {100 * damage:.3f} points")
    return found


def build_problem(
    latencies_s: Mapping[str, Mapping[Options, float]], errors: LocalErrors, slope: Mapping[str, float]
) -> Problem:
    """Choices with predicted latency and damage; options without a finite time or error are not choices at all."""
    sites: dict[str, tuple[Choice, ...]] = {}
    for site, by_options in latencies_s.items():
        choices = [Choice(site, (), by_options[()], 0.0)]
        for options, latency_s in by_options.items():
            damage = slope.get(site, np.nan) * errors.get(site, {}).get(options, np.nan)
            if options and np.isfinite(latency_s) and np.isfinite(damage):
                choices.append(Choice(site, options, latency_s, max(float(damage), _FLOOR)))
        sites[site] = undominated(choices)
    return Problem(sites)

"""Which combinations of options are worth pricing at one site.

Every calibrated pass offers levels; what can be combined at a site is the product of "leave alone" and a thinned ladder
of levels per pass. Effort decides how fine the ladders are.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from rewriter.core.forms import FORMS, FUSED_SDPA
from rewriter.core.option import Option
from rewriter.core.options import Effort
from rewriter.core.rewrite import Pass
from rewriter.core.site import Recognition, Site, State
from rewriter.core.target import Target
from rewriter.search.problem import Options
from rewriter.search.selection import PRECISION, Selection

# Levels per pass, by effort: when a pass cuts alone at its site, when several cut there, when it combines with none.
_LEVELS_ALONE: Mapping[Effort, int] = {"quick": 4, "normal": 7, "thorough": 24}
_LEVELS_TOGETHER: Mapping[Effort, int] = {"quick": 1, "normal": 2, "thorough": 5}
_LEVELS_APART: Mapping[Effort, int] = {"quick": 1, "normal": 2, "thorough": 8}


def candidates(site: Site, selection: Selection, target: Target, effort: Effort) -> tuple[Options, ...]:
    """Combinations of calibrated options at this site, the empty one first; options in the order of application.

    Number formats multiply whatever the cuts give.
    """
    calibrated = [one for one in selection.passes.values() if one.kind == "calibrated" or one.timed]
    offered = {one.name: levels for one in calibrated if (levels := _offered(selection, one, site, target))}
    alone = [levels for name, levels in offered.items() if not selection.passes[name].combines]
    cuts = [levels for name, levels in offered.items() if name != PRECISION and selection.passes[name].combines]
    count = (_LEVELS_ALONE if len(cuts) < 2 else _LEVELS_TOGETHER)[effort]
    ladders = [((), *((option,) for option in thin(levels, count))) for levels in cuts]
    combined = [tuple(itertools.chain.from_iterable(picked)) for picked in itertools.product(*ladders)]
    combined += [(option,) for levels in alone for option in thin(levels, _LEVELS_APART[effort])]
    formats = offered.get(PRECISION, ())
    if not formats:
        return tuple(combined)
    # Rounding costs so much less quality than it saves time that combined cuts are tried on top of it only.
    single = [combination for combination in combined if len(combination) <= 1]
    return (*single, *((*combination, rounded) for rounded in formats for combination in combined))


def _offered(selection: Selection, one: Pass, site: Site, target: Target) -> tuple[Option, ...]:
    """The options of a pass, without forms of attention that TVM, which prices them, has not or takes anyway."""
    found = selection.options(one, site, target)
    return found if one.name != FUSED_SDPA else tuple(o for o in found if o["form"] in FORMS["tvm"][1:])


def thin(levels: Sequence[Option], count: int) -> tuple[Option, ...]:
    """At most `count` of the levels, spread over the milder two thirds of a ladder that is longer.

    The strongest cuts of a long ladder (a single head left, say) are hardly ever within a budget, and the mildest step
    saves hardly any time.
    """
    if len(levels) <= count:
        return tuple(levels)
    first = min(1, len(levels) - count)
    last = max(first + count, round(2 / 3 * len(levels))) - 1
    step = (last - first) / max(count - 1, 1)
    return tuple(levels[round(first + i * step)] for i in range(count))


def all_candidates(
    recognition: Recognition, selection: Selection, target: Target, effort: Effort
) -> dict[str, tuple[Options, ...]]:
    """Candidates of every site that may be rewritten, by site, in data-flow order."""
    return {
        site.id: found
        for site in recognition.sites
        if site.state is State.LOWERABLE and len(found := candidates(site, selection, target, effort)) > 1
    }


def exact_options(recognition: Recognition, selection: Selection, target: Target) -> dict[str, Options]:
    """The exact options of every lowerable site: taken together, they are the exact variant."""
    found: dict[str, Options] = {}
    for site in recognition.sites:
        if site.state is not State.LOWERABLE:
            continue
        exact = [one for one in selection.passes.values() if one.kind == "exact" and not one.timed]
        options = tuple(option for one in exact for option in selection.options(one, site, target))
        if options:
            found[site.id] = options
    return found

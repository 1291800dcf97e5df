"""Smaller caches of the sizes that were asked for: no search, but the same proof.

``--passes low_rank_cache{key=32,value=32} --allow-cache-change`` names the sizes. What a smaller cache is worth shows
in memory and at long contexts, which a latency measured at one shape may not see; so the variant need not be faster to
be kept. It must be as good as any other: what is not certified is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rewriter.assembly.assemble import assemble
from rewriter.core.option import Option, Plan
from rewriter.core.site import Site
from rewriter.search.problem import Options
from rewriter.search.refine import Trial
from rewriter.search.run import SIZES, Search, calibration_batches
from rewriter.search.scoring import Scorer
from rewriter.search.session import Session
from rewriter.search.variant import Variant, merge

ASKED = "as asked"


def asked_sizes(session: Session) -> Option | None:
    """The pass that changes caches with the parameters that were fixed for it; None if none were."""
    found = (
        session.selection.fixed[name]
        for name, one in session.selection.passes.items()
        if one.changes_cache and name in session.selection.fixed
    )
    return next(found, None) if session.options.allow_cache_change else None


def asked_plan(session: Session, sites: Sequence[Site], asked: Option) -> Plan:
    """The same sizes at every site whose cache may change; a note for each that stays."""
    chosen = []
    one = session.selection.passes[asked.name]
    for site in sites:
        refusal = one.refuse(site)
        if refusal is None:
            chosen.append(Option.of(asked.name, site.id, **dict(asked.parameters)))
        elif refusal.code != "not-attention":
            session.notes.append(f"the cache of {site.id} keeps its sizes: {refusal.why}")
    return Plan.of(chosen)


def assemble_asked(
    session: Session, scorer: Scorer, sites: Sequence[Site], exact: Mapping[str, Options], asked: Option
) -> Search:
    """One variant, solved on calibration data and scored on the selection split."""
    state = Search(session, scorer, sites, exact)
    plan = asked_plan(session, sites, asked)
    if plan.empty or session.splits is None:
        return state
    with session.progress.stage("assembly", f"assembling {asked} bottom-up and scoring it"):
        tokens, seed = SIZES[session.options.effort].tokens, session.options.seed
        batches = calibration_batches(session.splits.calibrate, tokens, scorer.crop, seed)
        rows = np.random.default_rng(seed).permutation(len(batches))
        held = max(1, len(batches) // 6)
        fit, choose = ([batches[i] for i in part] for part in (rows[held:], rows[:held]))
        built = assemble(session.graph, sites, plan, session.selection.passes, fit or choose, choose, "changed")
        order = [site.id for site in session.recognition.sites]
        variant = Variant.of(ASKED, session.graph, merge(exact, plan, order), built.sites.values())
        state.variants[ASKED] = variant
        state.paired[ASKED] = scorer.paired(variant.graph, caches=variant.caches)
        lost = state.paired[ASKED].drop
        session.progress.advance(1.0, f"{ASKED}: {100 * lost:.3f} points lost")
    state.trials = [Trial(ASKED, plan, 0.0, lost, lost)]
    return state

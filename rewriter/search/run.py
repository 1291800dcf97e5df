"""The search with data: price every option, calibrate what errors mean, solve, assemble, score, correct, repeat."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.accuracy.paired import Paired
from rewriter.assembly.assemble import assemble, price_options
from rewriter.attention.lower import fragment, lower
from rewriter.calibration.data import Dataset
from rewriter.core.option import Plan
from rewriter.core.options import Effort
from rewriter.core.site import Site
from rewriter.core.store import Store
from rewriter.graph.interpreter import Interpreter
from rewriter.runtimes.retry import call_twice
from rewriter.runtimes.workers import WorkerFailure
from rewriter.search.caches import cache_maps, converted
from rewriter.search.candidates import all_candidates
from rewriter.search.chain import signature
from rewriter.search.cost import CostTable, Priced
from rewriter.search.journal import Journal
from rewriter.search.problem import Options, Problem
from rewriter.search.refine import UNIFORM, Trial, refine
from rewriter.search.scoring import Scorer, spread
from rewriter.search.selection import PRECISION
from rewriter.search.sensitivity import LocalErrors, build_problem, slopes
from rewriter.search.session import Session
from rewriter.search.structure import blank_statistics, restructure
from rewriter.search.variant import Variant, merge

Feeds = dict[str, NDArray[Any]]

# A variant that uses the whole budget on the selection split has an even chance to exceed it on other data.
_AIM = 0.9
Anywhere = tuple[tuple[tuple[str, Any], ...], ...]


@dataclass(frozen=True)
class Size:
    """How much work one effort means.

    `tokens` calibrate a variant that may be kept, `draft_tokens` the first `drafts`, which teach how damages add
    up; `pricing_tokens` give local errors, `slope_tokens` and `slope_samples` the damage of one option per sub-block.
    """

    tokens: int
    draft_tokens: int
    pricing_tokens: int
    slope_tokens: int
    slope_samples: int
    assemblies: int
    drafts: int


SIZES: Mapping[Effort, Size] = {
    "quick": Size(12_000, 6_000, 6_000, 2_000, 32, assemblies=2, drafts=1),
    "normal": Size(20_000, 9_000, 9_000, 2_500, 40, assemblies=3, drafts=1),
    "thorough": Size(250_000, 60_000, 100_000, 30_000, 300, assemblies=12, drafts=3),
}


@dataclass
class Search:
    """The state of one search: variants by name as they are assembled, and the trials in order."""

    session: Session
    scorer: Scorer
    sites: Sequence[Site]
    exact: Mapping[str, Options]
    variants: dict[str, Variant] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    paired: dict[str, Paired] = field(default_factory=dict)
    latencies_s: dict[str, dict[Options, float]] = field(default_factory=dict)
    problem: Problem | None = None
    started_s: float = field(default_factory=time.monotonic)
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        session, scorer, splits = self.session, self.scorer, self.session.splits
        assert splits is not None
        data = {"calibrate": splits.calibrate.content_hash(), "select": scorer.data.content_hash()}
        how = {"metric": scorer.metric.name, "crop": scorer.crop, "seed": session.options.seed}
        exact = {site: list(map(str, options)) for site, options in self.exact.items()}
        self.journal = Journal(session.cache, session.graph, {**data, **how, "exact": exact})

    @property
    def budget(self) -> float:
        """How much of the metric may be lost, on its own scale."""
        drop = self.session.options.max_drop
        baseline = self.scorer.metric.high if self.scorer.metric.ideal_original else 1.0
        return drop.fraction * (baseline if drop.relative else 1.0)

    def out_of_time(self) -> bool:
        """Whether ``--max-time`` leaves no room for another trial."""
        limit_s = self.session.options.max_time_s
        return limit_s is not None and time.monotonic() - self.started_s > 0.6 * limit_s


def search(session: Session, scorer: Scorer, sites: Sequence[Site], exact: Mapping[str, Options]) -> Search:
    """Fill a `Search` with scored variants. `sites` are the lowerable sites after their exact options."""
    state = Search(session, scorer, sites, exact)
    effort = session.options.effort
    found = all_candidates(session.recognition, session.selection, session.target, effort)
    if not found:
        session.notes.append("no calibrated rewrite applies to this model")
        return state
    size = SIZES[effort]
    with session.progress.stage("statistics", f"measuring the local error of {sum(map(len, found.values()))} options"):
        errors = _local_errors(state, found, size.pricing_tokens)
    with session.progress.stage("costs", "compiling and timing each distinct option with TVM"):
        state.latencies_s = _latencies(state, found)
    with session.progress.stage("scale", "scoring one option per sub-block to learn what an error does to the metric"):
        slope = _slopes(state, errors, size)
    state.problem = build_problem(state.latencies_s, errors, slope)
    with session.progress.stage("assembly", "solving, assembling bottom-up and scoring whole variants"):
        _trials(state, state.problem, size)
    if state.journal.hits:
        session.notes.append(f"{state.journal.hits} results of earlier runs on this model and data were used again")
    return state


def calibration_batches(data: Dataset, tokens: int, crop: bool, seed: int, size: int = 16) -> list[Feeds]:
    """Random calibration samples with about this many tokens in all, in batches of similar length."""
    shuffled = spread(data, len(data), seed)
    lengths = shuffled.lengths()
    per_sample = np.ones(len(shuffled)) * _positions(data) if lengths is None else lengths
    count = int(np.searchsorted(np.cumsum(per_sample), tokens)) + 1
    chosen = shuffled.subset(np.arange(min(count, len(shuffled))))
    return [batch.feeds for batch in chosen.batches(size, crop=crop)]


def _positions(data: Dataset) -> int:
    return max(int(np.prod(array.shape[1:2])) for array in data.inputs.values())


def _local_errors(state: Search, found: Mapping[str, Sequence[Options]], tokens: int) -> LocalErrors:
    session = state.session
    assert session.splits is not None
    splits, advance = session.splits, session.progress.advance
    priced = {
        site: list(dict.fromkeys(c[:-1] if _compound(c) else c for c in combinations))
        for site, combinations in found.items()
    }

    def price(wanted: Mapping[str, Sequence[Options]]) -> LocalErrors:
        batches = calibration_batches(splits.calibrate, tokens, state.scorer.crop, session.options.seed)
        passes = session.selection.passes
        return price_options(session.graph, state.sites, wanted, passes, batches, advance=lambda d, _: advance(d))

    errors = state.journal.errors(priced, {"tokens": tokens}, price)
    for site, combinations in found.items():
        # Rounding errors add to those of cuts (measured: 0.14 points alone and on top of a 60 % mix alike).
        alone = errors[site]
        errors[site] = {c: alone[c] if c in alone else alone[c[:-1]] + alone[c[-1:]] for c in combinations}
    return errors


def _compound(options: Options) -> bool:
    """Whether a number format comes on top of cuts."""
    return len(options) > 1 and options[-1].name == PRECISION


def _latencies(state: Search, found: Mapping[str, Sequence[Options]]) -> dict[str, dict[Options, float]]:
    """Seconds of each option at each site: at the shape to optimise for, or on average over asked lengths.

    Sites that are alike share what was measured for the first of them.
    """
    inputs = priced_inputs(state.session)
    parts = [_latencies_at(state, found, feeds) for feeds in inputs]
    return {
        site: {options: sum(part[site][options] for part in parts) / len(parts) for options in combinations}
        for site, combinations in found.items()
    }


def priced_inputs(session: Session) -> list[Feeds]:
    """What options are timed on: one usual input, or the middles of the shorter and the longer half of asked requests.

    Two sizes cost twice the time of one, and show what is proportional to the tokens and what is to their square.
    """
    traffic = session.traffic
    if traffic is None or not traffic.asked or traffic.harm:
        return [dict(session.workload.feeds[0])]
    sizes = sorted(traffic.requests.sample(2, session.options.seed))
    return [traffic.make(*size, index) for index, size in enumerate(dict.fromkeys(sizes))]


def _latencies_at(
    state: Search, found: Mapping[str, Sequence[Options]], feeds: Feeds
) -> dict[str, dict[Options, float]]:
    session, by_id = state.session, {site.id: site for site in state.sites}
    plain = {name: Priced(by_id[name], fragment(session.graph, by_id[name])) for name in found}
    values = values_read(session, state.sites, list(plain.values()), feeds)
    first: dict[tuple[str, Anywhere], str] = {}
    like = {
        name: first.setdefault((signature(one.site, one.piece, values), _anywhere(found[name])), name)
        for name, one in plain.items()
    }
    table, latencies = cost_table(session), {}
    wanted = [priced for name in first.values() for priced in _priced(session, by_id[name], found[name], feeds)]
    intervals = iter(table.latencies_s(session.graph, wanted, values, session.progress.advance))
    session.variants_timed += table.measured
    measured = {name: [next(intervals).median for _ in found[name]] for name in first.values()}
    for name, combinations in found.items():
        latencies[name] = dict(zip(combinations, measured[like[name]], strict=True))
    return latencies


def _priced(session: Session, site: Site, combinations: Sequence[Options], feeds: Feeds) -> list[Priced]:
    blank = blank_statistics(site)
    rewritten = (restructure(site, options, session.selection.passes, blank) for options in combinations)
    return [
        Priced(one, fragment(session.graph, one, old_caches=False), _own_caches(session, one, feeds))
        for one in rewritten
    ]


def _own_caches(session: Session, site: Site, feeds: Feeds) -> dict[str, NDArray[Any]]:
    """The caches of a timed input as a rewritten site reads them."""
    maps = cache_maps(session.graph, [site])
    return converted({name: feeds[name] for name in maps}, maps)


def _anywhere(combinations: Sequence[Options]) -> Anywhere:
    """Combinations without the site they are for."""
    return tuple(tuple((option.name, option.parameters) for option in options) for options in combinations)


def values_read(
    session: Session, sites: Sequence[Site], priced: Sequence[Priced], feeds: Feeds | None = None
) -> dict[str, NDArray[Any]]:
    """The values that the priced sub-blocks read, at the shapes to be timed, from one run on a real input."""
    names = {name for one in priced for name in one.piece.reads()}
    run = Interpreter(lower(session.graph, list(sites))).run(feeds or session.workload.feeds[0], taps=sorted(names))
    return {name: run[name].numpy() for name in names}


def cost_table(session: Session) -> CostTable:
    """The cost table of this target, kept in the cache directory."""
    from rewriter.runtimes.tvm.artifact import engine_key

    threads = session.target.threads

    def build(graph: Any, shapes: Mapping[str, tuple[int, ...]], name: str) -> Any:
        return session.build(graph, name, session.pricing_engine, shapes)

    def time_all(artifacts: Sequence[Any], feeds: Sequence[Any]) -> list[list[float]]:
        paths = ([str(path) for path in artifacts], [str(path) for path in feeds])
        together = "rewriter.measurement.together:time_together"
        arguments = (session.engine, *paths, threads)
        answer = call_twice(session.timer, together, *arguments, timeout_s=300.0, told=session.notes.append)
        if isinstance(answer, WorkerFailure):
            session.notes.append(f"a group of options could not be timed: {answer}")
            return [[] for _ in artifacts]
        return list(answer)

    key = {"target": session.target.key(), "engine": engine_key()}
    return CostTable(Store(session.cache / "costs.jsonl"), key, build, time_all, session.folder / "chains")


def _slopes(state: Search, errors: LocalErrors, size: Size) -> dict[str, float]:
    session = state.session
    assert session.splits is not None
    tokens, seed = size.slope_tokens, session.options.seed
    batches = calibration_batches(session.splits.calibrate, tokens, state.scorer.crop, seed)

    def damage(plan: Plan) -> float:
        question = {"damage": str(plan), "tokens": tokens, "samples": size.slope_samples}
        return state.journal.number(question, lambda: scored(plan))

    def scored(plan: Plan) -> float:
        variant = _variant(state, "probe", plan, _assembled(state, plan, batches, batches[-1:]))
        return state.scorer.paired(variant.graph, size.slope_samples, variant.caches).drop

    return slopes(errors, damage, session.progress.advance)


def _trials(state: Search, problem: Problem, size: Size) -> None:
    session = state.session

    def damage(name: str, plan: Plan) -> float:
        # The uniform rival comes last and is a check on the search: a draft is enough for it.
        draft = len(state.variants) < size.drafts or name == UNIFORM
        variant = _solved(state, name, plan, size.draft_tokens if draft else size.tokens)
        state.variants[name] = variant
        question = {"tokens": size.draft_tokens if draft else size.tokens}
        state.paired[name] = state.journal.paired(
            plan, question, lambda: state.scorer.paired(variant.graph, caches=variant.caches)
        )
        lost = state.paired[name].drop
        session.progress.advance(len(state.variants) / (size.assemblies + 1), f"{name}: {100 * lost:.3f} points lost")
        return lost

    state.trials = refine(problem, damage, _AIM * state.budget, size.assemblies, state.out_of_time)


def _solved(state: Search, name: str, plan: Plan, tokens: int) -> Variant:
    """A whole variant with weights fitted on about this many tokens, now or in an earlier run."""

    def compute() -> Mapping[str, Site]:
        fit, choose = _halves(state, tokens)
        return _assembled(state, plan, fit, choose)

    sites = state.journal.variant(plan, {"tokens": tokens}, state.session.lowerable, compute)
    return _variant(state, name, plan, sites)


def _halves(state: Search, tokens: int) -> tuple[list[Feeds], list[Feeds]]:
    """Batches to fit on, and a sixth of them that chooses ridge and alpha; the selection split is for variants."""
    session = state.session
    assert session.splits is not None
    batches = calibration_batches(session.splits.calibrate, tokens, state.scorer.crop, session.options.seed)
    rows = np.random.default_rng(session.options.seed).permutation(len(batches))
    held_out = max(1, len(batches) // 6)
    return [batches[i] for i in rows[held_out:]], [batches[i] for i in rows[:held_out]]


def _assembled(state: Search, plan: Plan, batches: Sequence[Feeds], choose: Sequence[Feeds]) -> Mapping[str, Site]:
    session = state.session
    # Re-solving unchanged blocks above the first change costs 15 % more and gained nothing (measured on MiniLM).
    passes = session.selection.passes
    return assemble(session.graph, state.sites, plan, passes, batches, choose, resolve="changed").sites


def _variant(state: Search, name: str, plan: Plan, sites: Mapping[str, Site]) -> Variant:
    order = [site.id for site in state.session.recognition.sites]
    return Variant.of(name, state.session.graph, merge(state.exact, plan, order), sites.values())

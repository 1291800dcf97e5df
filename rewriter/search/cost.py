"""The cost table: what each distinct option costs on the target, found by compiling and timing it once per shape.

Results are kept in the cache directory, keyed by the sub-block's signature, the target and the engine's versions, and
found again next time. The raw staircase is kept: no line is fitted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.core.measurement import Interval, bootstrap_median
from rewriter.core.site import Site
from rewriter.core.store import Store
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.stepper import Fragment
from rewriter.search.chain import Chain, Values, build_chain, signature

# Builds the artifact of a graph at the given input shapes and returns its path.
Build = Callable[[OnnxGraph, Mapping[str, tuple[int, ...]], str], Path]
# Times artifacts with their feeds, in turn; one list of seconds each, empty for one that failed.
Time = Callable[[Sequence[Path], Sequence[Path]], list[list[float]]]

_NEVER = Interval(float("inf"), float("inf"), float("inf"))
_COPIES = 8
_BATCH = 12  # artifacts loaded and timed together; each group contains the reference again


@dataclass(frozen=True)
class Priced:
    """One rewritten site to be priced, with what is needed to build it.

    `own` are values that it reads in other sizes than the model's: caches that it changed.
    """

    site: Site
    piece: Fragment
    own: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class CostTable:
    """Latencies of sub-blocks by signature."""

    def __init__(self, store: Store, key: Mapping[str, Any], build: Build, time: Time, scratch: Path) -> None:
        self.store, self.key, self.build, self.time, self.scratch = store, dict(key), build, time, scratch
        self.measured = 0

    def latencies_s(
        self, graph: OnnxGraph, wanted: Sequence[Priced], values: Values, advance: Callable[[float], None] | None = None
    ) -> list[Interval]:
        """The latency of one copy of each wanted sub-block, seconds, in the order asked for.

        Those of equal signature are measured once. The first of a new group is re-measured in each batch and used to
        bring the batches to one scale, because a machine's speed drifts between them.
        """
        names = [signature(priced.site, priced.piece, {**values, **priced.own}) for priced in wanted]
        known = {name: found for name in set(names) if (found := self._find(name)) is not None}
        new = [name for name in dict.fromkeys(names) if name not in known]
        if new:
            # Ratios to a common reference carry over between batches and between runs; absolute times do not.
            reference = names[0]
            todo = {name: wanted[names.index(name)] for name in {reference: None, **dict.fromkeys(new)}}
            known |= self._measure(graph, todo, reference, known.get(reference), values, advance)
        return [known[name] for name in names]

    def _measure(
        self,
        graph: OnnxGraph,
        todo: Mapping[str, Priced],
        reference: str,
        reference_known: Interval | None,
        values: Values,
        advance: Callable[[float], None] | None,
    ) -> dict[str, Interval]:
        chains = {}
        for done, (name, priced) in enumerate(todo.items()):
            read = {**values, **priced.own}
            chains[name] = self._built(name, build_chain(graph, priced.site, priced.piece, read, _COPIES))
            if advance:
                advance(0.7 * (done + 1) / len(todo))
        found: dict[str, Interval] = {}
        base = reference_known
        others = [name for name in todo if name != reference]
        for at in range(0, max(1, len(others)), _BATCH):
            group = [reference, *others[at : at + _BATCH]]
            samples = self.time([chains[name][0] for name in group], [chains[name][1] for name in group])
            if not all(samples):
                # A failed or missing measurement can never win; it is not kept either, so next time it is tried again.
                found |= {name: _NEVER for name in group if name not in found}
                continue
            per_copy = [np.asarray(s) / _COPIES for s in samples]
            if base is None:
                base = bootstrap_median(per_copy[0].tolist())
                self._keep(reference, base)
            found[reference] = base
            for name, own in zip(group[1:], per_copy[1:], strict=True):
                found[name] = _scaled(base, own / per_copy[0])
                self._keep(name, found[name])
            if advance:
                advance(0.7 + 0.3 * min(1.0, (at + _BATCH) / max(1, len(others))))
        return found

    def _built(self, name: str, chain: Chain) -> tuple[Path, Path]:
        label = hashlib.sha256(name.encode()).hexdigest()[:16]
        self.scratch.mkdir(parents=True, exist_ok=True)
        feeds = self.scratch / f"{label}.npz"
        np.savez(feeds, **chain.feeds)  # type: ignore[arg-type]
        self.measured += 1
        return self.build(chain.graph, chain.shapes, f"chain-{label}"), feeds

    def _find(self, name: str) -> Interval | None:
        entry = self.store.get({**self.key, "signature": name})
        return None if entry is None else Interval(entry["median"], entry["low"], entry["high"])

    def _keep(self, name: str, latency_s: Interval) -> None:
        self.store.put({**self.key, "signature": name}, latency_s.as_dict())


def _scaled(base: Interval, ratios: NDArray[np.float64]) -> Interval:
    ratio = bootstrap_median(ratios.tolist())
    return Interval(base.median * ratio.median, base.median * ratio.low, base.median * ratio.high)

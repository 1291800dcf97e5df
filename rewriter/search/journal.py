"""What a search found out about one model on one set of data, kept in the cache: asking again costs nothing.

Local errors, scores and whole assembled variants are remembered by content: the model's fingerprint, the data's hash,
the metric and the sources of everything that computes them. So a run that was killed goes on where it was, and the
same question has its answer at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.accuracy.paired import Paired
from rewriter.assembly.plan_file import restore, save_plan
from rewriter.core.errors import UserError
from rewriter.core.option import Plan
from rewriter.core.site import Site
from rewriter.core.sources import source_digest
from rewriter.core.store import Store
from rewriter.graph.onnx import OnnxGraph
from rewriter.search.problem import Options

logger = logging.getLogger("rewriter")

KEPT_VARIANTS = 12  # a variant holds its new weights, up to the size of the model
_COMPUTING = (
    "rewriter.core", "rewriter.graph", "rewriter.attention", "rewriter.calibration", "rewriter.assembly",
    "rewriter.accuracy", "passes",
)  # fmt: skip


class Journal:
    """Answers by question, for one `subject`. `hits` counts what needed no computing."""

    def __init__(self, cache: Path, graph: OnnxGraph, subject: Mapping[str, Any]) -> None:
        self._store, self._folder, self._graph = Store(cache / "search.jsonl"), cache / "variants", graph
        everything = {"model": graph.fingerprint(), "code": source_digest(*_COMPUTING), **subject}
        self.subject = _digest(everything)
        self.hits = 0

    def number(self, question: Mapping[str, Any], compute: Callable[[], float]) -> float:
        """A number that was found before, or computed now."""
        return float(self.value(question, lambda: {"number": compute()})["number"])

    def value(self, question: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """An object of plain JSON types that was found before, or computed now."""
        known = self._known(question)
        if known is None:
            known = dict(compute())
            self._store.put({"subject": self.subject, **question}, known)
        return known

    def errors(
        self,
        combinations: Mapping[str, Sequence[Options]],
        question: Mapping[str, Any],
        compute: Callable[[Mapping[str, Sequence[Options]]], Mapping[str, Mapping[Options, float]]],
    ) -> dict[str, dict[Options, float]]:
        """Local errors of every combination at every site; `compute` is asked for the sites not known, together."""
        asked = {
            site: {"errors": site, "of": _digest(list(map(str, of))), **question} for site, of in combinations.items()
        }
        known = {site: self._known(about) for site, about in asked.items()}
        missing = {site: combinations[site] for site, found in known.items() if found is None}
        fresh = compute(missing) if missing else {}
        for site, found in fresh.items():
            values = {"values": [found[options] for options in combinations[site]]}
            self._store.put({"subject": self.subject, **asked[site]}, values)
            known[site] = values
        return {
            site: dict(zip(of, map(float, (known[site] or {})["values"]), strict=True))
            for site, of in combinations.items()
            if known[site] is not None
        }

    def variant(
        self, plan: Plan, question: Mapping[str, Any], before: Iterable[Site], compute: Callable[[], Mapping[str, Site]]
    ) -> Mapping[str, Site]:
        """Rewritten sites by id, with the weights that were solved before, or now. `before` are sites as recognised."""
        originals = {site.id: site for site in before}
        folder = self._folder / _digest({"subject": self.subject, "plan": str(plan), **question})
        if folder.exists():
            try:
                restored = restore(self._graph, originals.values(), folder)[1]
                folder.touch()
                self.hits += 1
                return {**originals, **restored}
            except UserError as problem:
                logger.info("a remembered variant is solved again: %s", problem)
                shutil.rmtree(folder, ignore_errors=True)
        found = compute()
        self._keep(folder, plan, originals.values(), found.values())
        return found

    def paired(self, plan: Plan, question: Mapping[str, Any], compute: Callable[[], Paired]) -> Paired:
        """A score sample by sample, of a variant on the selection split."""
        found = self.value({"scored": _digest(str(plan)), **question}, lambda: _plain(compute()))
        return Paired(**{**found, "original": np.array(found["original"]), "new": np.array(found["new"])})

    def _known(self, question: Mapping[str, Any]) -> dict[str, Any] | None:
        found = self._store.get({"subject": self.subject, **question})
        self.hits += found is not None
        return found

    def _keep(self, folder: Path, plan: Plan, before: Iterable[Site], after: Iterable[Site]) -> None:
        """Write a variant whole or not at all, and let the oldest go. No room is no reason to stop."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".") as scratch:
                place = Path(scratch) / "variant"
                place.mkdir()
                save_plan(place, self._graph, plan, before, after)
                place.replace(folder)
            kept = sorted(self._folder.glob("[!.]*"), key=lambda one: one.stat().st_mtime)
            for old in kept[:-KEPT_VARIANTS]:
                shutil.rmtree(old, ignore_errors=True)
        except (UserError, OSError) as problem:
            logger.info("a variant is not remembered: %s", problem)


def _plain(paired: Paired) -> dict[str, Any]:
    return {**asdict(paired), "original": paired.original.tolist(), "new": paired.new.tolist()}


def _digest(thing: Any) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:32]

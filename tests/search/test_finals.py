"""Who stands for a variant in the finals, who is worth building for, when an engine that rounds may be a candidate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rewriter.core.measurement import Measurement
from rewriter.core.option import Option, Plan
from rewriter.core.options import Runtime
from rewriter.measurement.bench import Subject
from rewriter.measurement.race import RaceResult
from rewriter.runtimes.workers import WorkerFailure
from rewriter.search import finals as module
from rewriter.search import rounding
from rewriter.search.certification import Candidate
from rewriter.search.engines import BY_KEY, PEERS, asked_peers
from rewriter.search.entrants import Entrants, entry_name
from rewriter.search.finals import ORIGINAL, RIVAL, RIVAL_INT8, Finals, under_onnxruntime
from rewriter.search.variant import Variant

TVM = "rewriter.runtimes.tvm.runtime:TvmRuntime"


def raced(asked: Runtime, **milliseconds: float) -> Finals:
    """Finals with these times; ``v__openvino`` is the entry ``v@openvino``."""
    times = {name.replace("__", "@").replace("_int8", "-int8"): value for name, value in milliseconds.items()}
    times = {RIVAL_INT8 if name == "onnxruntime-int8" else name: value for name, value in times.items()}
    result = RaceResult(
        {n: Measurement(n, tuple((v * 1e-3,) for _ in range(12))) for n, v in times.items()}, {}, "narrow"
    )
    return Finals(result, {name: Subject(name, runtime_of(name), Path(), ()) for name in times}, asked)


def runtime_of(entry: str) -> str:
    key = {RIVAL: "onnxruntime", RIVAL_INT8: "onnxruntime-int8"}.get(entry, entry.partition("@")[2])
    return BY_KEY[key].runtime if key else TVM


def variant(name: str, *options: Option) -> Variant:
    return cast(Variant, SimpleNamespace(name=name, plan=Plan.of(options), caches={}, graph=None))


def test_names_of_entries() -> None:
    assert entry_name(ORIGINAL, "onnxruntime") == RIVAL == under_onnxruntime(ORIGINAL)
    assert entry_name(ORIGINAL, "onnxruntime-int8") == RIVAL_INT8
    assert entry_name("v", "openvino") == "v@openvino" and entry_name(ORIGINAL, "openvino") == "original@openvino"
    assert len({engine.key for engine in PEERS}) == len({engine.runtime for engine in PEERS}) == len(PEERS)


def test_every_choice_asks_for_its_own_engines() -> None:
    assert asked_peers("tvm") == ()
    assert [engine.key for engine in asked_peers("torch")] == ["torch-eager", "torch-compile"]
    assert [engine.key for engine in asked_peers("openvino")] == ["openvino", "openvino-bf16", "openvino-int8"]
    assert asked_peers("auto") == PEERS


def test_the_fastest_that_keeps_the_numbers_stands_for_a_variant() -> None:
    times = {"original": 4.0, "onnxruntime": 5.0, "original__openvino": 3.0, "original__openvino_int8": 1.0}
    finals = raced("auto", **times, v=2.0, v__openvino=2.5)
    assert finals.entry(ORIGINAL) == "original@openvino" and finals.engine("original@openvino") == "openvino"
    assert finals.entry("v") == "v" and finals.engine("v") == "tvm"
    assert finals.rounded(ORIGINAL) == ["original@openvino-int8"] and finals.rounded("v") == []
    assert finals.faster("v") and not finals.faster("v", "v")
    assert raced("tvm", **times).entry(ORIGINAL) == "original" and raced("tvm", **times).rounded(ORIGINAL) == []
    assert raced("openvino", **times).entry(ORIGINAL) == "original@openvino"
    assert raced("torch", **times).entry(ORIGINAL) == RIVAL  # torch did not run the original


class Built:
    """Entrants that are there without building anything."""

    def __init__(self, **times: float) -> None:
        self.subjects = {name: Subject(name, runtime_of(name), Path(), ()) for name in times}
        self.originals = {name: BY_KEY[name.partition("@")[2]] for name in times if "@" in name}
        self.notes: list[str] = []
        self.dropped: list[str] = []

    def drop(self, name: str, why: str) -> None:
        self.dropped.append(name)


def test_engines_without_hope_run_the_original_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"original": 2.0, "original@openvino": 2.9, "original@torch-eager": 3.1, "original@openvino-bf16": 2.1}
    times |= {"original@openvino-int8": 1.5}
    result = RaceResult(
        {name: Measurement(name, ((seconds,),) * 3) for name, seconds in times.items()},
        {"original@torch-compile": WorkerFailure("crash", "it ended")}, "rounds",
    )  # fmt: skip
    monkeypatch.setattr(module, "_raced", lambda session, subjects, rules: result)
    entrants = Built(**times, **{"original@torch-compile": 0.0})
    engines = [BY_KEY[name.partition("@")[2]] for name in entrants.originals]
    kept = module._hopeful(cast(Any, None), cast(Entrants, entrants), engines)
    assert [engine.key for engine in kept] == ["openvino", "openvino-int8"]
    assert entrants.dropped == ["original@torch-compile"]
    assert any(note.startswith("torch-eager ran the original alone: it took 1.6 times") for note in entrants.notes)
    assert any(note.startswith("openvino-bf16 ran the original alone") for note in entrants.notes)


def test_what_rounds_takes_no_graph_that_rounds_already() -> None:
    entrants = Entrants.__new__(Entrants)
    entrants.subjects, entrants.originals, entrants.notes = {}, {}, []
    rounding_variant = variant("v", Option.of("precision", "layers.0.attention", dtype="int8"))
    assert not entrants.enter_in(BY_KEY["openvino-int8"], rounding_variant) and not entrants.subjects


def scored(monkeypatch: pytest.MonkeyPatch, drops: dict[str, float]) -> None:
    def of(session: object, scorer: object, subject: Subject, latency_s: float) -> Any:
        drop = drops[subject.name]
        return WorkerFailure("crash", "it ended") if drop < 0 else SimpleNamespace(drop=drop)

    monkeypatch.setattr(rounding, "_scored", of)
    monkeypatch.setattr(rounding, "worthy", lambda session, scorer, name, selected: selected.drop < 0.01)


def test_what_rounds_must_be_faster_and_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    finals = raced(
        "auto", original=4.0, original__openvino_int8=1.0, v=3.0, v__openvino_int8=2.9999, w__openvino_int8=1.0,
        x__openvino_int8=1.5,
    )  # fmt: skip
    drops = {"original@openvino-int8": 0.004, "w@openvino-int8": 0.02, "x@openvino-int8": -1.0}
    scored(monkeypatch, drops)
    variants = [variant(name) for name in (ORIGINAL, "v", "w", "x")]
    found, why = rounding.rounded_candidates(cast(Any, None), cast(Any, None), finals, variants, "v")
    assert [candidate.shipped.name for candidate in found] == ["original@openvino-int8"]
    assert why["v@openvino-int8"] == "not certainly faster than what needs no rounding"
    assert (
        "too much to be certified" in why["w@openvino-int8"] and "failed while being scored" in why["x@openvino-int8"]
    )


def test_candidates_beaten_in_time_and_loss_are_left_out() -> None:
    finals = raced("auto", original=4.0, v=1.0, original__openvino_int8=2.0, w__openvino_int8=0.5)

    def candidate(name: str, drop: float) -> Candidate:
        return Candidate(variant(name), finals.subjects[name], 0.0, cast(Any, SimpleNamespace(drop=drop)))

    slower, faster = candidate("original@openvino-int8", 0.005), candidate("w@openvino-int8", 0.009)
    own = candidate("v", 0.004)
    assert rounding.undominated(finals, [own], [slower, faster]) == [faster]
    assert rounding.undominated(finals, [], [slower, faster]) == [slower, faster]

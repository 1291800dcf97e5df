"""MetaSchedule with guarded workers: what it finds is right, remembered, and kept when a run is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from rewriter.core.errors import OptionError
from rewriter.core.options import Options
from rewriter.runtimes.tvm import metaschedule
from rewriter.runtimes.tvm.candidate import measure
from rewriter.runtimes.tvm.database import Subject, TuningDatabase
from rewriter.runtimes.tvm.metaschedule import Book, Measurer, MetaScheduler, content_of, packed
from rewriter.runtimes.tvm.target import tvm_target
from rewriter.runtimes.workers import Worker
from tests.runtimes.tvm.harness import numbers, target

SUBJECT = Subject.of("metaschedule:test", (8,), target())


def convolution(size: int = 16) -> Any:
    x, w = relax.Var("x", relax.TensorType((1, 3, size, size), "float32")), numbers(8, 3, 4, 4)
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.nn.conv2d(x, relax.const(w), strides=4))
        builder.emit_func_output(out)
    return builder.get()


def kernel(operation: Any) -> Any:
    x = relax.Var("x", relax.TensorType((8, 64), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(operation(x))
        builder.emit_func_output(out)
    module = relax.transform.LegalizeOps()(builder.get())
    (function,) = [f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


def run(module: Any, x: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(module, target=tvm_target(target())), tvm.cpu())
    return np.asarray(machine["main"](tvm.runtime.tensor(x)).numpy())


def test_a_convolution_is_searched_once_and_stays_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metaschedule, "WORTH_S", 0.0)
    monkeypatch.setattr(metaschedule, "DECIDES", 1e9)
    path, x = tmp_path / "t.jsonl", numbers(1, 3, 16, 16)
    module = MetaScheduler(target(), TuningDatabase(path), 2).polish(convolution(), {})
    np.testing.assert_allclose(run(module, x), run(convolution(), x), rtol=1e-4, atol=1e-4)
    ((_, record),) = TuningDatabase(path).store.items()
    assert record["trials"] == 2 and 0 < record["seconds"] <= record["default_seconds"]

    def refuse(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(MetaScheduler, "_search", refuse)
    again = MetaScheduler(target(), TuningDatabase(path), 2).polish(convolution(), {})
    assert tvm.ir.save_json(again) == tvm.ir.save_json(module)


def test_templates_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetaScheduler, "_tuned", lambda *_: pytest.fail("touched a template"))
    MetaScheduler(target(), TuningDatabase(tmp_path / "t.jsonl"), 2).polish(convolution(), {"conv2d": 0})


def test_a_wrong_or_broken_candidate_costs_only_itself(tmp_path: Path) -> None:
    """Neither a wrong result nor text that is no kernel can be chosen; the worker lives on."""
    plain, wrong = packed(kernel(relax.op.exp)), packed(kernel(relax.op.negative))
    book = Book(TuningDatabase(tmp_path / "t.jsonl"), SUBJECT, plain, 1.0, {})
    with Worker("candidates", 1) as worker:
        measurer = Measurer(worker, book, target())
        measurer.candidates = {"wrong": wrong, "broken": "no kernel", "right": plain}
        results = {name: measurer.measured(name) for name in list(measurer.candidates)}
        measurer.candidates = {"again": wrong}
        results["again"] = measurer.measured("again")
    assert "differs" in str(results["wrong"].error_msg) and results["broken"].error_msg
    assert results["right"].run_secs and book.record["kernel"] == plain and book.record["failures"] == 2
    # Written down with its reason, a failed one is not tried again.
    assert str(results["again"].error_msg) == TuningDatabase(tmp_path / "t.jsonl").failure(SUBJECT, content_of(wrong))


def test_a_killed_search_keeps_its_best_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    book = Book(TuningDatabase(path), SUBJECT, "plain", 1.0, {})
    book.take("a", 0.5)
    book.fail("b", "crash: SIGSEGV")
    book.take("c", 0.25)
    book.take("d", 0.75)
    found = TuningDatabase(path).find(SUBJECT)
    assert found is not None and (found["kernel"], found["seconds"], found["trials"]) == ("c", 0.25, 3)
    resumed = Book(TuningDatabase(path), SUBJECT, "plain", 2.0, found)
    assert (resumed.trials, resumed.record["seconds"]) == (3, 0.5)
    assert resumed.finish(8)["trials"] == 8 and TuningDatabase(path).find(SUBJECT) == resumed.record


def test_measuring_checks_first() -> None:
    plain = packed(kernel(relax.op.exp))
    assert measure(plain, plain, target()) > 0
    with pytest.raises(RuntimeError, match="differs"):
        measure(plain, packed(kernel(relax.op.negative)), target())


def test_it_cannot_search_where_nothing_is_timed() -> None:
    with pytest.raises(OptionError, match="on this machine"):
        Options(tuner="metaschedule", compile_only=True)

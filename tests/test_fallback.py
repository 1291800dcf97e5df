"""A model with an operator that TVM cannot run is optimised all the same: its variants are timed on ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from rewriter.cli import main
from rewriter.runtimes.tvm.operators import TABLE

ODD = "Hardmax"  # in ONNX Runtime and the interpreter, and in no table of TVM's operators


def with_odd_operator(source: Path, target: Path) -> Path:
    """The encoder with one more operator before its output."""
    assert ODD not in TABLE
    model = onnx.load(source)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["before" if name == output else name for name in node.output]
    model.graph.node.append(helper.make_node(ODD, ["before"], ["hard"], name="the odd one"))
    model.graph.node.append(helper.make_node("Add", ["before", "hard"], [output]))
    onnx.save(model, target)
    return target


def test_variants_are_timed_on_onnxruntime_alone(encoder: Path, tmp_path: Path) -> None:
    model = with_odd_operator(encoder, tmp_path / "odd.onnx")
    words = [model, "--target", "llvm", "--effort", "quick", "--cache-dir", tmp_path / "cache", "-o", tmp_path / "out"]
    words += ["--shape", "input_ids=1x16", "--shape", "attention_mask=1x16"]
    assert main([str(word) for word in words]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    named = [note for note in report["notes"] if f"TVM cannot run operator {ODD} (node 'the odd one')" in note]
    assert any(note.startswith("original could not be built") for note in named)
    assert any(note.startswith("model.so was not written") for note in named)
    assert report["best"]["runtime"] == "onnxruntime" and report["best"]["latency_s"]["median"] > 0
    assert not (tmp_path / "out" / "model.so").exists()
    ids = np.random.default_rng(0).integers(3, 40, (2, 16))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    wanted, found = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for path in (model, tmp_path / "out" / "model.onnx")
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)

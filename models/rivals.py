"""What other recognisers make of a graph: how many attentions they turn into one operator, and whether it is right.

Runs in a process of its own, because they may crash or hang.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from models.cells import Cell, family_of
from models.export import cast, run_plainly

FUSED = frozenset(
    ["Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "PackedMultiHeadAttention"]
)
VARIED_SIZES = ("swin", "segformer", "mobilevit")
TOLERANCE = 1e-3
Rival = Literal["optimizer", "onnxscript"]
RIVALS: tuple[Rival, ...] = ("optimizer", "onnxscript")


@dataclass(frozen=True)
class Verdict:
    """Attentions that became one operator, and how the new graph compares with the old one.

    `kind`: "right", "wrong", "does not run", "not compared" (the runtime cannot run the graph as exported), or "failed"
    (the rival itself). `why` is the error of the numbers or the message.
    """

    fused: int
    kind: str
    why: str = ""

    def __str__(self) -> str:
        return str(self.fused) if self.kind == "right" else f"{self.fused} {self.kind} ({self.why[:40]})"


def judge(rival: Rival, cell: Cell, path: Path) -> Verdict:
    """Let a rival work on a file and compare what it makes with what the file computes."""
    logging.disable(logging.CRITICAL)
    before = _fused(onnx.load(path))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = by_optimizer(path, cell) if rival == "optimizer" else by_onnxscript(path)
    except Exception as problem:  # noqa: BLE001 - recorded in the table
        return Verdict(0, "failed", _words(problem))
    found = _fused(model) - before
    return _compared(model, found, cell, path) if found > 0 else Verdict(0, "right")


def _compared(model: onnx.ModelProto, found: int, cell: Cell, path: Path) -> Verdict:
    example = cast(family_of(cell).build(cell.form), cell.variant)
    feeds = {name: tensor.numpy() for name, tensor in zip(example.names, example.inputs, strict=True)}
    try:
        expected = run_plainly(path, feeds)
    except Exception as problem:  # noqa: BLE001 - a graph the runtime refuses is recorded as such
        return Verdict(found, "not compared", _words(problem))
    with tempfile.TemporaryDirectory() as folder:
        fused = Path(folder) / "fused.onnx"
        onnx.save(model, fused)
        try:
            error = _error(run_plainly(fused, feeds), expected)
        except Exception as problem:  # noqa: BLE001 - recorded in the table
            return Verdict(found, "does not run", _words(problem))
    return Verdict(found, "right" if error < TOLERANCE else "wrong", f"{error:.1g}")


def _error(actual: list[Any], expected: list[Any]) -> float:
    """Largest absolute difference; infinite if shapes differ or a NaN is on one side."""
    worst = 0.0
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape or not np.array_equal(np.isnan(one), np.isnan(other)):
            return float("inf")
        worst = max(worst, float(np.abs(np.nan_to_num(one - other)).max(initial=0.0)))
    return worst


def _words(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:200]


def _fused(model: onnx.ModelProto) -> int:
    return sum(node.op_type in FUSED for node in model.graph.node)


def by_optimizer(path: Path, cell: Cell) -> onnx.ModelProto:
    """The graph after ONNX Runtime's transformers optimizer, told the right model type."""
    from onnxruntime.transformers import optimizer

    # where sizes differ between stages the optimizer has to find them itself
    heads, width = (0, 0) if cell.family in VARIED_SIZES else (4, 64 if "neox" in cell.family else 48)
    model_type = family_of(cell).ort_model_type
    return optimizer.optimize_model(
        str(path), model_type=model_type, num_heads=heads, hidden_size=width, opt_level=0
    ).model


def by_onnxscript(path: Path) -> onnx.ModelProto:
    """The graph after onnxscript's fusions for ONNX Runtime."""
    import onnx_ir
    from onnxscript.rewriter import ort_fusions

    result = ort_fusions.optimize_for_ort(onnx_ir.load(path))
    return onnx_ir.serde.serialize_model(result[0] if isinstance(result, tuple) else result)

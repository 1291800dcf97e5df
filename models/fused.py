"""``python -m models.fused``: exports after the fusions of ONNX Runtime and onnxscript, packed for the tests.

A graph is named after its cell and the way it was fused: ``opt`` by ONNX Runtime's transformers optimizer, ``script``
by onnxscript, ``extended`` by what a session of ONNX Runtime does by itself, ``both`` by the first and the last.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx

from models.cells import Cell, make
from models.fixtures import Pack, write_pack
from models.rivals import by_onnxscript, by_optimizer

# family, form, exporter, way: together every attention operator and every fusion around them that was ever emitted
PACKED = (
    ("bart", "eager", "d18", "script"),
    ("bert", "eager", "l17", "both"),
    ("bert", "sdpa", "d18", "extended"),
    ("clip_vision", "eager", "l17", "opt"),
    ("gemma2", "eager", "l17", "extended"),
    ("gpt2_past", "eager", "d18", "script"),
    ("gpt_neox", "sdpa", "d18", "script"),
    ("llama_past", "eager", "d18", "script"),
    ("phi3_past", "eager", "d18", "script"),
    ("qwen3_past", "eager", "d18", "script"),
    ("roberta", "sdpa", "d18", "script"),
    ("t5", "sdpa", "d18", "script"),
    ("vit", "sdpa", "d18", "script"),
    ("whisper", "eager", "d18", "script"),
    ("whisper", "sdpa", "d18", "script"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what is missing, fuse, and write the pack."""
    parser = argparse.ArgumentParser(prog="python -m models.fused", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/matrix"), help="where exports are kept")
    parser.add_argument("--pack", type=Path, required=True, help="the file to write")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    options.output.mkdir(parents=True, exist_ok=True)
    models = {}
    for family, form, variant, way in PACKED:
        cell = Cell(family, form, variant)
        make(cell, options.output)
        models[f"{cell.name}.{way}"] = fused(cell, way, options.output)
    options.pack.parent.mkdir(parents=True, exist_ok=True)
    write_pack(options.pack, Pack(models))
    return 0


def fused(cell: Cell, way: str, folder: Path) -> onnx.ModelProto:
    """The cell's graph fused in one of the ways."""
    path = cell.path(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        if way == "script":
            return by_onnxscript(path)
        if way == "extended":
            return by_session(path)
        model = by_optimizer(path, cell)
        if way == "opt":
            return model
        between = path.with_suffix(".optimised")
        onnx.save(model, between)
        return by_session(between)


def by_session(path: Path) -> onnx.ModelProto:
    """The graph as a session of ONNX Runtime runs it, without what only fits this processor."""
    import onnxruntime

    options, target = onnxruntime.SessionOptions(), path.with_suffix(".session")
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(target)


if __name__ == "__main__":
    sys.exit(main())

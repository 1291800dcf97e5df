"""Rows of a table by index, as embeddings need them: whole rows are copied on vectors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, loop, store


@dataclass(frozen=True)
class Gather:
    """table (R, C)[indices]; a negative index counts from the end, one beyond the table is held at its edge."""

    rows: int
    columns: int
    indices: tuple[int, ...]
    index_dtype: str = "int64"
    lanes: int = 16


def make_gather(spec: Gather, name: str = "gather") -> Any:
    """PrimFunc (table, indices, rows)."""
    count, index = prod(spec.indices), getattr(T, spec.index_dtype)

    def body(table: Buffer, indices: Buffer, out: Buffer) -> None:
        chosen = emit.flat(indices, (count,), spec.index_dtype)
        target = emit.flat(out, (count, spec.columns))
        with loop(count) as item:
            given = chosen[item]
            row = T.bind(given + T.Select(given < index(0), index(spec.rows), index(0)))
            safe = T.bind(T.Cast("int32", T.max(T.min(row, index(spec.rows - 1)), index(0))))
            with loop(spec.columns) as column:
                store(target, table[safe, column], item, column)

    arguments = [
        ("table", (spec.rows, spec.columns), "float32"),
        ("indices", spec.indices, spec.index_dtype),
        ("out", (*spec.indices, spec.columns), "float32"),
    ]
    return emit.prim_func(name, arguments, 1, body)

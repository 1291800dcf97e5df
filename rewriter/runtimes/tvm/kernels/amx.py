"""Tile instructions of AMX as statements of templates: configuration, loads, products, stores.

TVM has no intrinsics for AMX, but passes LLVM's on. A tile number is part of the instruction, so it is a Python
number here. Tiles belong to a thread and come without content: every thread configures them before its first tile
and releases them after its last. The process must have asked the system for permission, see `runtimes/tvm/amx.py`.
Meaning of the instructions: Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.core.target import MATRIX_FEATURES
from rewriter.runtimes.tvm.kernels import emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, store
from rewriter.runtimes.tvm.kernels.gemm import MATRIX_WORDS, Precision

ROWS = 16  # most rows of a tile
ROW_BYTES = 64  # most bytes of a row: 16 words of two or four k, or 16 sums
TILES = 8
PALETTE = 1
REQUIRES = "rewriter.requires"  # attribute of functions: the processor's flags without which they must not run
# Of bytes the left operand is unsigned (activations around a zero point) and the right one signed (weights).
_PRODUCTS: dict[Precision, str] = {"bf16": "llvm.x86.tdpbf16ps", "int8": "llvm.x86.tdpbusd"}
_CONFIG_WORDS = 16
assert ROW_BYTES == 4 * MATRIX_WORDS


def config_words(rows: Sequence[int]) -> list[int]:
    """The 64 bytes of a configuration as words: rows per tile, each row of `ROW_BYTES`; 0 rows leave a tile out."""
    content = bytearray(4 * _CONFIG_WORDS)
    content[0] = PALETTE
    for tile, count in enumerate(rows):
        content[16 + 2 * tile] = ROW_BYTES if count else 0
        content[48 + tile] = count
    return [int.from_bytes(content[at : at + 4], "little") for at in range(0, len(content), 4)]


@contextmanager
def configured(rows: Sequence[int]) -> Iterator[None]:
    """Statements with tiles of so many rows each, in this thread."""
    config = emit.scratch((_CONFIG_WORDS,), "int32", registers=True)
    for at, word in enumerate(config_words(rows)):
        store(config, T.int32(word), at)
    T.evaluate(_call("llvm.x86.ldtilecfg", T.address_of(config[0])))
    yield
    T.evaluate(_call("llvm.x86.tilerelease"))


def hold(*buffers: Buffer) -> None:
    """Keep new scratch as it was asked for: TVM shrinks it to the corners of what it sees accessed, without tiles."""
    for buffer in buffers:
        for corner in ([0] * len(buffer.shape), [int(size) - 1 for size in buffer.shape]):
            store(buffer, T.Cast(str(buffer.dtype), 0), *corner)


def zero(tile: int) -> None:
    """Sums of a tile begin anew."""
    T.evaluate(_call("llvm.x86.tilezero", T.int8(tile)))


def load(tile: int, address: Expression, stride_bytes: Index) -> None:
    """Rows of memory, `stride_bytes` apart."""
    T.evaluate(_call("llvm.x86.tileloadd64", T.int8(tile), address, _stride(stride_bytes)))


def keep(tile: int, address: Expression, stride_bytes: Index) -> None:
    """Write a tile to memory."""
    T.evaluate(_call("llvm.x86.tilestored64", T.int8(tile), address, _stride(stride_bytes)))


def dot(sums: int, a: int, b: int, precision: Precision) -> None:
    """sums += A B: rows of A are words of k, rows of B the same words of k for 16 columns."""
    T.evaluate(_call(_PRODUCTS[precision], T.int8(sums), T.int8(a), T.int8(b)))


def requiring(function: Any, precision: Precision) -> Any:
    """The function with a note of the flags it needs, for the manifest of an artifact."""
    return function.with_attr(REQUIRES, ",".join(MATRIX_FEATURES[precision]))


def required(functions: Iterable[Any]) -> tuple[str, ...]:
    """The flags that any of these functions notes."""
    noted = (function.attrs[REQUIRES] for function in functions if function.attrs and REQUIRES in function.attrs)
    return tuple(sorted({flag for flags in noted for flag in str(flags).split(",")}))


def _call(name: str, *arguments: Expression) -> Expression:
    return T.call_llvm_intrin("int32", name, *arguments)


def _stride(stride_bytes: Index) -> Expression:
    return T.int64(stride_bytes) if isinstance(stride_bytes, int) else stride_bytes

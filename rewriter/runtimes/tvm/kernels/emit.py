"""Helpers shared by the templates: vectors, edges, views, loops.

The templates are written against the IRBuilder, not as TVMScript text: building a function takes milliseconds
instead of the 0.1 to 0.5 s of parsing, and ordinary Python composes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812

TEMPLATE = "rewriter.template"  # an attribute of what is written here, as against TVM's own kernels

Expression = Any
Buffer = Any
Index = Any


def vec(start: Index, lanes: int) -> Expression:
    """`lanes` consecutive indices from `start`."""
    return T.Ramp(start, 1, lanes) if lanes > 1 else start


def splat(value: Expression | float, lanes: int) -> Expression:
    """One fp32 value in every lane."""
    scalar = T.float32(value) if isinstance(value, (int, float)) else value
    return T.Broadcast(scalar, lanes) if lanes > 1 else scalar


def zero_for(lanes: int) -> Expression:
    """A vector of zeros."""
    return splat(0.0, lanes)


def store(buffer: Buffer, value: Expression, *indices: Index) -> None:
    """buffer[indices] = value."""
    T.buffer_store(buffer, value, list(indices))


def loop(count: int | Expression, parallel: bool = False) -> AbstractContextManager[Any]:
    """A serial loop, or one over the threads of the pool. A loop of one still is a loop: it keeps templates uniform."""
    return _parallel(count) if parallel else T.serial(0, count)


@contextmanager
def _parallel(count: int | Expression) -> Iterator[Index]:
    """Each turn is a function of its own, whose arguments LLVM knows not to overlap.

    What it knows of a kernel's arguments is lost where TVM moves a parallel loop into a function for the pool: sums of
    products then leave the registers, and a GEMM runs at 106 GF/s or less where the serial one runs at 117 (measured).
    """
    with T.parallel(0, count) as index, T.attr(0, "compute_scope", "part_"):
        yield index
    # Otherwise what follows is said to come from that function, and LLVM's verifier refuses the module.
    T.evaluate(T.call_llvm_intrin("void", "llvm.donothing"))


class Rows:
    """A serial loop whose variable counts in steps."""

    def __init__(self, count: Index, step: int, start: Index = 0) -> None:
        self.loop, self.step, self.start = loop(count), step, start

    def __enter__(self) -> Index:
        return self.loop.__enter__() * self.step + self.start

    def __exit__(self, *details: Any) -> None:
        self.loop.__exit__(*details)


def scratch(shape: Sequence[int], dtype: str = "float32", registers: bool = False) -> Buffer:
    """Memory from here to the end of the enclosing body; `registers` for small arrays indexed by constants only.

    Not memory of a block: TVM would spend more than half of its time on how much of it is used (measured).
    """
    return T.alloc_buffer(tuple(shape), dtype, scope="local" if registers else "global")


def flat(buffer: Buffer, shape: Sequence[int], dtype: str = "float32") -> Buffer:
    """The same memory under another shape."""
    assert prod(shape) == prod(int(size) for size in buffer.shape), "a view keeps the number of elements"
    return T.decl_buffer(tuple(shape), dtype, data=buffer.data)


def whole(buffer: Buffer) -> Any:
    """The region of a whole buffer, for declared reads and writes."""
    return buffer[tuple(slice(0, int(size)) for size in buffer.shape)]


def tiles(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, size) of full tiles and the smaller last one, as constants."""
    for start in range(0, total, size):
        yield start, min(size, total - start)


def split(total: int, size: int) -> tuple[int, int]:
    """(number of full tiles, rest)."""
    return total // size, total % size


def prim_func(
    name: str,
    arguments: Iterable[tuple[str, Sequence[int], str]],
    outputs: int,
    body: Callable[..., None],
) -> Any:
    """A PrimFunc over buffers (name, shape, dtype), the last `outputs` of them written. `body` emits statements."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True, is_private=True):
            T.func_name(name)
            T.func_attr({"tirx.noalias": True, TEMPLATE: True})
            handles = [(T.arg(f"{key}_handle", T.handle()), shape, dtype) for key, shape, dtype in arguments]
            buffers = [T.match_buffer(handle, tuple(shape), dtype) for handle, shape, dtype in handles]
            with T.sblock("root_block"):
                T.reads([whole(b) for b in buffers[: len(buffers) - outputs]])
                T.writes([whole(b) for b in buffers[len(buffers) - outputs :]])
                body(*buffers)
        return builder.get()

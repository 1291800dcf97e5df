"""Rotary positions by halves, on heads as projections leave them: one pass that also puts heads before tokens.

J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels import emit
from rewriter.runtimes.tvm.kernels.emit import Buffer, Expression, Index, loop, splat, store, vec

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Rotary:
    """(batch, heads, tokens, dim) of x, turned in its leading `size` dims: u cos + sign rotate(u) sin.

    x is (batch, tokens, heads dim) if `flat`. `table` is the shape of cos and sin, with ones where they are the same
    for all.
    """

    batch: int
    heads: int
    tokens: int
    dim: int
    size: int
    table: Shape
    sign: float = 1.0
    flat: bool = False
    lanes: int = 16
    threads: int = 1

    @property
    def step(self) -> int:
        """Lanes that divide both halves and what is left as it is; 0 if there are none."""
        fits = (lanes for lanes in (16, 8, 4) if lanes <= self.lanes)
        return next((n for n in fits if self.size % (2 * n) == 0 and (self.dim - self.size) % n == 0), 0)

    @property
    def serves(self) -> bool:
        """Whether the kernel can do it."""
        whole = (self.batch, self.heads, self.tokens, self.size)
        fits = all(given in (1, size) for given, size in zip(self.table, whole, strict=True))
        return bool(self.step) and fits and self.table[3] == self.size


def make_rotary(spec: Rotary, name: str = "rotary") -> Any:
    """PrimFunc (x, cos, sin, y)."""
    y = (spec.batch, spec.heads, spec.tokens, spec.dim)
    x = (spec.batch, spec.tokens, spec.heads * spec.dim) if spec.flat else y
    arguments = [("x", x), ("cos", spec.table), ("sin", spec.table), ("y", y)]
    return emit.prim_func(name, [(key, shape, "float32") for key, shape in arguments], 1, _Writer(spec).body)


class _Writer:
    def __init__(self, spec: Rotary) -> None:
        self.spec = spec

    def body(self, x: Buffer, cos: Buffer, sin: Buffer, y: Buffer) -> None:
        """Token by token, as the threads share the rows of the products before."""
        spec = self.spec
        with loop(spec.batch * spec.tokens, parallel=spec.threads > 1) as row, T.sblock("token"):
            b, s = row // spec.tokens, row % spec.tokens
            with loop(spec.heads) as g:
                self._head(x, cos, sin, y, (b, g, s))

    def _head(self, x: Buffer, cos: Buffer, sin: Buffer, y: Buffer, at: tuple[Index, Index, Index]) -> None:
        spec, half = self.spec, self.spec.size // 2
        b, g, s = at
        place = [0 if given == 1 else index for given, index in zip(spec.table, at, strict=False)]

        def read(start: Index) -> Expression:
            if spec.flat:
                return x[b, s, vec(g * spec.dim + start, spec.step)]
            return x[b, g, s, vec(start, spec.step)]

        def write(value: Expression, start: Index) -> None:
            store(y, value, b, g, s, vec(start, spec.step))

        for d in range(0, half, spec.step):
            for here, there, sign in ((d, d + half, -spec.sign), (d + half, d, spec.sign)):
                row = vec(here, spec.step)
                turned = read(there) * splat(sign, spec.step) * sin[(*place, row)]
                write(read(here) * cos[(*place, row)] + turned, here)
        for d in range(spec.size, spec.dim, spec.step):
            write(read(d), d)

"""What an attention kernel computes and how it is cut: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels.emit import Index


@dataclass(frozen=True)
class Operand:
    """Where head g of batch b, token t, begins in a buffer: offset + b*batch + t*token + g*head elements."""

    shape: tuple[int, ...]
    heads: int
    dim: int
    batch: int
    token: int
    head: int
    offset: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    @classmethod
    def of(cls, shape: tuple[int, ...], heads: int, dtype: Literal["float32", "bfloat16"] = "float32") -> Operand:
        """Rank 3 is (B, tokens, heads * dim), rank 4 is (B, heads, tokens, dim)."""
        if len(shape) == 4:
            _, groups, tokens, dim = shape
            return cls(shape, groups, dim, groups * tokens * dim, dim, tokens * dim, 0, dtype)
        _, tokens, width = shape
        return cls(shape, heads, width // heads, tokens * width, width, width // heads, 0, dtype)


@dataclass(frozen=True)
class Bias:
    """Added to (or, as bool, allowing) scores; broadcasts to (B, H, S, T) from `shape` of rank 4."""

    shape: tuple[int, ...]
    kind: Literal["add", "bool"] = "add"

    @property
    def dtype(self) -> str:
        """Of the buffer."""
        return "float32" if self.kind == "add" else "bool"


@dataclass(frozen=True)
class Attention:
    """What one attention computes: B batches, S queries, T keys; heads map to operand heads by `*_head_of`."""

    B: int
    S: int
    T: int
    query: Operand
    key: Operand
    value: Operand
    query_head_of: tuple[int, ...]
    key_head_of: tuple[int, ...]
    value_head_of: tuple[int, ...]
    scale: float
    softcap: float = 0.0
    bias: Bias | None = None
    empty_rows: Literal["nan", "zero"] = "nan"
    lanes: int = 16
    threads: int = 1
    kept: Bias | None = None  # of kind bool: where False, the bias alone is the score
    sink: bool = False  # a logit per head that every row of the softmax holds beside its keys, with no value

    @property
    def heads(self) -> int:
        """Query heads."""
        return len(self.query_head_of)

    @property
    def repeats(self) -> int:
        """See `repeats_of`."""
        return repeats_of(self.key_head_of, self.value_head_of)


def repeats_of(key_head_of: Sequence[int], value_head_of: Sequence[int]) -> int:
    """How many neighbouring query heads read the same keys and values, in all groups alike."""
    pairs = list(zip(key_head_of, value_head_of, strict=True))
    sizes = (size for size in range(len(pairs), 0, -1) if len(pairs) % size == 0)
    return next(s for s in sizes if all(pair == pairs[h - h % s] for h, pair in enumerate(pairs)))


@dataclass(frozen=True)
class Tile:
    """`rows` x `vectors` registers; `queries` rows, whole tiles of them, at a time; up to `keys` keys per block."""

    rows: int = 12
    vectors: int = 2
    queries: int = 24
    keys: int = 256


def splits_of(attention: Attention, units: int) -> int:
    """In how many parts the queries of a group of heads are dealt out, so that every thread gets its share."""
    items = attention.B * attention.heads // attention.repeats
    enough = (
        n for n in range(1, units + 1) if items * n % attention.threads == 0 or items * n >= 8 * attention.threads
    )
    return next(enough, units)


def pick(table: tuple[int, ...], head: Index) -> Index:
    """table[head] as index arithmetic where it is regular, else as a chain of selections."""
    groups = max(table) + 1
    repeats = len(table) // groups
    if table == tuple(range(len(table))):
        return head
    if repeats and table == tuple(h // repeats for h in range(len(table))):
        return T.floordiv(head, repeats)
    chosen: Index = T.int32(table[-1])
    for h in range(len(table) - 2, -1, -1):
        chosen = T.Select(head == h, T.int32(table[h]), chosen)
    return chosen

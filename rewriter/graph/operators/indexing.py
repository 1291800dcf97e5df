"""Gathering, scattering, sorting and selecting."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.graph.operators.registry import Call, operator, sized


def _positive(index: Tensor, size: int) -> Tensor:
    index = index.long()
    return torch.where(index < 0, index + size, index)


@operator("Gather")
def gather(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """Slices of one axis."""
    axis = call.get("axis", 0) % x.ndim
    if index.ndim == 0:
        return x.select(axis, int(index))
    picked = torch.index_select(x, axis, _positive(index, x.shape[axis]).reshape(-1))
    return picked.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@operator("GatherElements")
def gather_elements(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """Single elements along one axis."""
    axis = call.get("axis", 0)
    return torch.gather(x, axis, _positive(index, x.shape[axis]))


@operator("GatherND")
def gather_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    """Slices addressed by tuples of indices, after `batch_dims` shared axes."""
    batch, depth = call.get("batch_dims", 0), index.shape[-1]
    parts = [_positive(part, x.shape[batch + i]) for i, part in enumerate(index.unbind(-1))]
    leading = [
        torch.arange(x.shape[axis]).reshape([-1 if axis == i else 1 for i in range(index.ndim - 1)])
        for axis in range(batch)
    ]
    return x[(*leading, *parts)] if leading or depth else x


@operator("ScatterND")
def scatter_nd(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Slices replaced, or combined with what was there."""
    parts = tuple(_positive(part, x.shape[i]) for i, part in enumerate(index.unbind(-1)))
    return _reduced(call, x, updates, parts)


def _reduced(call: Call, x: Tensor, updates: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    mode = call.get("reduction", "none")
    if mode in ("none", "add"):
        return torch.index_put(x, parts, updates, accumulate=mode == "add")
    # Flat positions make the remaining reductions one scatter.
    sizes, depth = x.shape[: len(parts)], len(parts)
    flat = torch.zeros_like(parts[0])
    for part, size in zip(parts, sizes, strict=True):
        flat = flat * size + part
    rows = x.reshape(sizes.numel(), -1)
    index = flat.reshape(-1, 1).expand(-1, rows.shape[1])
    result = rows.scatter_reduce(0, index, updates.reshape(-1, rows.shape[1]), _REDUCTIONS[mode])
    return result.reshape([*sizes, *x.shape[depth:]])


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter")
def scatter_elements(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """Single elements replaced along one axis, or combined with what was there."""
    axis, mode = call.get("axis", 0), call.get("reduction", "none")
    index = _positive(index, x.shape[axis])
    if mode == "none":
        return torch.scatter(x, axis, index, updates)
    return torch.scatter_reduce(x, axis, index, updates, _REDUCTIONS[mode])


@operator("TensorScatter")
def tensor_scatter(call: Call, past: Tensor, update: Tensor, starts: Tensor | None = None) -> Tensor:
    """A cache with new tokens written at `starts` (per batch item), turning around if circular."""
    axis = call.get("axis", -2) % past.ndim
    length, count = past.shape[axis], update.shape[axis]
    begin = torch.zeros(past.shape[0], dtype=torch.long) if starts is None else starts.long()
    index = begin[:, None] + torch.arange(count)
    index = index % length if call.get("mode", "linear") == "circular" else index
    shape = [past.shape[0] if a == 0 else count if a == axis else 1 for a in range(past.ndim)]
    return past.scatter(axis, index.reshape(shape).expand(update.shape), update)


@operator("NonZero")
def non_zero(call: Call, x: Tensor) -> Tensor:
    """Indices of the elements that are not zero, one row per axis."""
    return torch.nonzero(x).T.contiguous()


@operator("Compress")
def compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    """The slices (or flat elements) whose condition holds."""
    index = torch.nonzero(condition).reshape(-1)
    axis = call.get("axis")
    return x.reshape(-1)[index] if axis is None else x.index_select(axis, index)


@operator("OneHot")
def one_hot(call: Call, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    """The second of two values at an index, the first elsewhere."""
    size = int(depth.reshape(-1)[0])
    axis = call.get("axis", -1) % (index.ndim + 1)
    sized([*index.shape, size])
    steps = torch.arange(size).reshape([-1, *[1] * (index.ndim - axis)])
    hit = _positive(index, size).unsqueeze(axis) == steps
    return torch.where(hit, values[1], values[0])


@operator("TopK")
def top_k(call: Call, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest or smallest along one axis with their indices; equal ones in order of index."""
    count = int(k) if k is not None else call.need("k")
    axis, largest = call.get("axis", -1), bool(call.get("largest", 1))
    values, index = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), index.narrow(axis, 0, count)


@operator("Unique")
def unique(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    """Distinct values (or slices), sorted or in order of appearance, with first places, inverse and counts."""
    axis = call.get("axis")
    rows = x.reshape(-1) if axis is None else x
    dim = 0 if axis is None else axis
    values, inverse, counts = torch.unique(rows, sorted=True, return_inverse=True, return_counts=True, dim=dim)
    places = torch.arange(inverse.numel())
    first = torch.full((counts.numel(),), inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not call.get("sorted", 1):
        order = torch.argsort(first)
        rank = torch.argsort(order)
        values, first, counts, inverse = values.index_select(dim, order), first[order], counts[order], rank[inverse]
    return values, first, inverse, counts

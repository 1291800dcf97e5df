"""Reductions, arg-reductions and cumulative sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rewriter.graph.operators.registry import Call, ints, operator

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keep)
    count = torch.Size([x.shape[axis] for axis in axes]).numel()
    return torch.div(x.sum(axes, keep), count, rounding_mode="trunc").to(x.dtype)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _extreme(function: Callable[..., Tensor]) -> Reduction:
    def run(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return function(x.to(torch.uint8), axes, keep).to(torch.bool)
        return function(x, axes, keep)

    return run


# Name, function, opset from which the axes are an input.
_REDUCTIONS: list[tuple[str, Reduction, int]] = [
    ("ReduceMean", _mean, 18),
    ("ReduceSum", _sum, 13),
    ("ReduceMax", _extreme(torch.amax), 18),
    ("ReduceMin", _extreme(torch.amin), 18),
    ("ReduceProd", _product, 18),
    ("ReduceL1", lambda x, d, k: _sum(x.abs(), d, k), 18),
    ("ReduceL2", lambda x, d, k: _sum(x * x, d, k).sqrt(), 18),
    ("ReduceSumSquare", lambda x, d, k: _sum(x * x, d, k), 18),
    ("ReduceLogSum", lambda x, d, k: _sum(x, d, k).log(), 18),
    ("ReduceLogSumExp", lambda x, d, k: torch.logsumexp(x, d, k), 18),
]


def _register(name: str, function: Reduction, since: int) -> None:
    def reduce(call: Call, x: Tensor, axes: list[int] | None) -> Tensor:
        if not axes:
            if call.get("noop_with_empty_axes"):
                # Only the reduction is skipped; what happens to each element still does.
                return function(x.unsqueeze(0), [0], False)
            axes = list(range(x.ndim))
        return function(x, axes, bool(call.get("keepdims", 1))) if axes else function(x.unsqueeze(0), [0], False)

    @operator(name, since=since)
    def run(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        return reduce(call, x, None if axes is None else ints(axes))

    @operator(name)
    def run_by_attribute(call: Call, x: Tensor) -> Tensor:
        return reduce(call, x, call.get("axes"))


for _name, _function, _since in _REDUCTIONS:
    _register(_name, _function, _since)


def _arg(call: Call, x: Tensor, largest: bool) -> Tensor:
    axis, keep = call.get("axis", 0), bool(call.get("keepdims", 1))
    pick = torch.argmax if largest else torch.argmin
    if not call.get("select_last_index"):
        return pick(x, axis, keep)
    return x.shape[axis] - 1 - pick(x.flip(axis), axis, keep)


@operator("ArgMax")
def arg_max(call: Call, x: Tensor) -> Tensor:
    """Where the largest element is, the first or the last of equals."""
    return _arg(call, x, True)


@operator("ArgMin")
def arg_min(call: Call, x: Tensor) -> Tensor:
    """Where the smallest element is, the first or the last of equals."""
    return _arg(call, x, False)


@operator("CumSum")
def cumulative_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    """Running sums, optionally exclusive or from the end."""
    dim = int(axis)
    x = x.flip(dim) if call.get("reverse") else x
    result = torch.cumsum(x, dim, dtype=x.dtype)
    result = result - x if call.get("exclusive") else result
    return result.flip(dim) if call.get("reverse") else result


@operator("CumProd")
def cumulative_product(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    """Running products, optionally exclusive or from the end."""
    dim = int(axis)
    x = x.flip(dim) if call.get("reverse") else x
    if call.get("exclusive"):
        ones = torch.ones_like(x.narrow(dim, 0, 1))
        x = torch.cat([ones, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    result = torch.cumprod(x, dim, dtype=x.dtype)
    return result.flip(dim) if call.get("reverse") else result

"""Views and movement of data: nothing is computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.operators.registry import Call, ints, operator, sized


@operator("Concat")
def concat(call: Call, *tensors: Tensor) -> Tensor:
    """Tensors joined along one axis."""
    return torch.cat(tensors, call.get("axis", 1))


@operator("Expand")
def expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """Broadcast in both directions."""
    return x.expand(torch.broadcast_shapes(x.shape, sized(ints(shape))))


@operator("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    """Two axes: all before `axis`, all from it on."""
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(x.shape[:axis].numel(), x.shape[axis:].numel())


@operator("Reshape", since=5)
def reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    """A new shape; 0 copies the axis unless `allowzero`, -1 takes the rest."""
    return _reshaped(x, ints(shape), bool(call.get("allowzero")))


@operator("Reshape")
def reshape_by_attribute(call: Call, x: Tensor) -> Tensor:
    """The shape as an attribute, before opset 5."""
    return _reshaped(x, call.need("shape"), False)


def _reshaped(x: Tensor, sizes: list[int], allow_zero: bool) -> Tensor:
    target = [x.shape[i] if size == 0 and not allow_zero else size for i, size in enumerate(sizes)]
    if x.numel() == 0 and -1 in target:  # torch cannot infer an axis of an empty tensor
        known = torch.Size([size for size in target if size != -1]).numel()
        target = [0 if size == -1 and known == 0 else size for size in target]
    return x.reshape(target)


@operator("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    """Axes in a new order, reversed by default."""
    return x.permute(call.get("perm") or list(range(x.ndim))[::-1])


@operator("Squeeze", since=13)
def squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Axes of size one removed."""
    return _squeezed(x, None if axes is None else ints(axes))


@operator("Squeeze")
def squeeze_by_attribute(call: Call, x: Tensor) -> Tensor:
    """Axes as an attribute, before opset 13."""
    return _squeezed(x, call.get("axes"))


def _squeezed(x: Tensor, axes: list[int] | None) -> Tensor:
    if axes is None:
        return x.squeeze()
    bad = [axis for axis in axes if x.shape[axis] != 1]
    if bad:
        raise ValueError(f"axis {bad[0]} has size {x.shape[bad[0]]}, not 1")
    return x.squeeze(tuple(axes)) if axes else x


@operator("Unsqueeze", since=13)
def unsqueeze(call: Call, x: Tensor, axes: Tensor) -> Tensor:
    """Axes of size one added."""
    return _unsqueezed(x, ints(axes))


@operator("Unsqueeze")
def unsqueeze_by_attribute(call: Call, x: Tensor) -> Tensor:
    """Axes as an attribute, before opset 13."""
    return _unsqueezed(x, call.need("axes"))


def _unsqueezed(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Split", since=13)
def split(call: Call, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
    """Parts along one axis, sizes as an input; equal parts have a shorter last one."""
    return _split(call, x, None if sizes is None else ints(sizes))


@operator("Split", since=2)
def split_by_attribute(call: Call, x: Tensor) -> list[Tensor]:
    """Sizes as an attribute, before opset 13."""
    return _split(call, x, call.get("split"))


def _split(call: Call, x: Tensor, sizes: list[int] | None) -> list[Tensor]:
    axis = call.get("axis", 0)
    if sizes is not None:
        return list(x.split(sizes, axis))
    parts = call.get("num_outputs", call.outputs)
    pieces = list(x.split(max(-(-x.shape[axis] // parts), 1), axis))
    return pieces + [x.narrow(axis, 0, 0)] * (parts - len(pieces))


@operator("Slice", since=10)
def slice_tensor(
    call: Call, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    """Ranges of axes with numpy's rules, bounds as inputs."""
    first, last = ints(starts), ints(ends)
    picked = ints(axes) if axes is not None else list(range(len(first)))
    return _sliced(x, first, last, picked, ints(steps) if steps is not None else [1] * len(first))


@operator("Slice")
def slice_by_attributes(call: Call, x: Tensor) -> Tensor:
    """Bounds as attributes, before opset 10."""
    first = call.need("starts")
    return _sliced(x, first, call.need("ends"), call.get("axes") or list(range(len(first))), [1] * len(first))


def _sliced(x: Tensor, starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> Tensor:
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step > 0:
            low, high, _ = slice(start, end, step).indices(size)
            x = x[(slice(None),) * (axis % x.ndim) + (slice(low, max(high, low), step),)]
            continue
        # The standard clamps a negative-step end at -1 only after adding the size, as numpy does with None.
        stop = None if end < -size else end
        index = range(size)[slice(start, stop, step)]
        x = x.index_select(axis, torch.tensor(list(index), dtype=torch.long))
    return x


@operator("Tile", since=6)
def tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    """Copies along every axis."""
    counts = ints(repeats)
    sized([size * count for size, count in zip(x.shape, counts, strict=True)])
    return x.repeat(counts)


@operator("Trilu")
def trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    """The upper or lower triangle, the rest zero."""
    diagonal = int(k) if k is not None else 0
    return torch.triu(x, diagonal) if call.get("upper", 1) else torch.tril(x, diagonal)


@operator("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    """Channels moved into blocks of space."""
    b, c, h, w = x.shape
    size = call.need("blocksize")
    if call.get("mode", "DCR") == "DCR":
        blocks = x.reshape(b, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(b, c // size**2, size, size, h, w).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(b, c // size**2, h * size, w * size)


@operator("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    """Blocks of space moved into channels."""
    b, c, h, w = x.shape
    size = call.need("blocksize")
    blocks = x.reshape(b, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(b, c * size**2, h // size, w // size)


@operator("ReverseSequence")
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    """The first `lengths[b]` steps of every sequence in reverse."""
    batch_axis, time_axis = call.get("batch_axis", 1), call.get("time_axis", 0)
    steps = torch.arange(x.shape[time_axis])
    index = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)  # (batch, time)
    index = index if batch_axis < time_axis else index.T
    index = index.reshape([*index.shape, *[1] * (x.ndim - 2)]).expand(x.shape)
    return torch.gather(x, time_axis, index)


@operator("Pad", since=11)
def pad(call: Call, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    """Widths as an input, optionally for some axes."""
    widths = ints(pads)
    picked = ints(axes) if axes is not None else list(range(len(widths) // 2))
    return padded(x, widths, picked, call.get("mode", "constant"), value.item() if value is not None else 0)


@operator("Pad")
def pad_by_attributes(call: Call, x: Tensor) -> Tensor:
    """Widths as an attribute, before opset 11."""
    widths = call.get("pads") or call.need("paddings")
    return padded(x, widths, list(range(x.ndim)), call.get("mode", "constant"), call.get("value", 0.0))


def padded(x: Tensor, widths: list[int], axes: list[int], mode: str, value: float) -> Tensor:
    """`x` with begin and end widths (begins first, negative ones cut) for the given axes."""
    begins, ends = [0] * x.ndim, [0] * x.ndim
    for index, axis in enumerate(axes):
        begins[axis], ends[axis] = widths[index], widths[len(axes) + index]
    sized([size + begin + end for size, begin, end in zip(x.shape, begins, ends, strict=True)])
    if mode == "constant":
        flat = [width for axis in reversed(range(x.ndim)) for width in (begins[axis], ends[axis])]
        return functional.pad(x, flat, value=bool(value) if x.dtype == torch.bool else value)
    for axis in range(x.ndim):
        if begins[axis] or ends[axis]:
            x = x.index_select(axis, _mirror_index(x.shape[axis], begins[axis], ends[axis], mode))
    return x


def _mirror_index(size: int, begin: int, end: int, mode: str) -> Tensor:
    index = torch.arange(-begin, size + end)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    period = max(2 * size - 2, 1)
    return (size - 1) - (index % period - (size - 1)).abs()

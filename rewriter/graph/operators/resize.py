"""Resize and Upsample by one interpolation matrix per axis: any rank, any mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.operators.registry import Call, ints, operator, sized


@dataclass(frozen=True)
class _Axis:
    """One resized axis: old and new size, scale, and the part of it that is cropped (tf_crop_and_resize)."""

    size: int
    target: int
    scale: float
    start: float = 0.0
    end: float = 1.0


@operator("Resize", since=11)
def resize(
    call: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Interpolation with the coordinate rules of opset 11 and later."""
    axes = [axis % x.ndim for axis in call.get("axes") or range(x.ndim)]
    if sizes is not None and sizes.numel():
        plans = _by_sizes(call, x, axes, ints(sizes))
    elif scales is not None and scales.numel():
        plans = [_scaled(x.shape[axis], float(s)) for axis, s in zip(axes, scales.tolist(), strict=True)]
    else:
        raise call.unsupported("neither scales nor sizes")
    if call.get("coordinate_transformation_mode") == "tf_crop_and_resize" and roi is not None:
        corners = [float(corner) for corner in roi.tolist()]
        plans = [_Axis(p.size, p.target, p.scale, corners[i], corners[len(axes) + i]) for i, p in enumerate(plans)]
    return _resized(call, x, axes, plans, call.get("coordinate_transformation_mode", "half_pixel"))


@operator("Resize", "Upsample", since=9)
def upsample(call: Call, x: Tensor, scales: Tensor) -> Tensor:
    """Before opset 11: coordinates divided by the scale, the nearest one below."""
    return _upsampled(call, x, scales.tolist())


@operator("Upsample", since=7)
def upsample_by_attribute(call: Call, x: Tensor) -> Tensor:
    """Scales as an attribute."""
    return _upsampled(call, x, call.need("scales"))


def _upsampled(call: Call, x: Tensor, scales: list[float]) -> Tensor:
    plans = [_scaled(size, scale) for size, scale in zip(x.shape, scales, strict=True)]
    return _resized(call, x, list(range(x.ndim)), plans, "asymmetric", "floor")


def _scaled(size: int, scale: float) -> _Axis:
    return _Axis(size, int(size * scale), scale)


def _by_sizes(call: Call, x: Tensor, axes: list[int], sizes: list[int]) -> list[_Axis]:
    ratios = [target / x.shape[axis] for axis, target in zip(axes, sizes, strict=True)]
    policy = call.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return [_Axis(x.shape[a], t, r) for a, t, r in zip(axes, sizes, ratios, strict=True)]
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    return [_Axis(x.shape[axis], int(x.shape[axis] * ratio + 0.5), ratio) for axis in axes]


def _resized(call: Call, x: Tensor, axes: list[int], plans: list[_Axis], mode: str, nearest: str = "") -> Tensor:
    sized([plan.target for plan in plans])
    outside: list[tuple[int, Tensor]] = []
    for axis, plan in zip(axes, plans, strict=True):
        if plan.size == plan.target and plan.scale == 1.0 and mode != "tf_crop_and_resize":
            continue
        places = _places(plan, mode)
        if call.get("mode", "nearest") == "nearest":
            x = x.index_select(axis, _nearest(places, nearest or call.get("nearest_mode", "round_prefer_floor"), plan))
        else:
            weights = _weights(call, places, plan)
            x = torch.movedim(torch.movedim(x, axis, -1) @ weights.to(x.dtype).T, -1, axis)
        if mode == "tf_crop_and_resize":
            outside.append((axis, (places < 0) | (places > plan.size - 1)))
    for axis, beyond in outside:
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        x = x.masked_fill(beyond.reshape(shape), call.get("extrapolation_value", 0.0))
    return x


def _places(plan: _Axis, mode: str) -> Tensor:
    """Where each new element lies on the old axis."""
    at, size, target = torch.arange(plan.target, dtype=torch.float64), plan.size, plan.target
    if mode == "asymmetric":
        return at / plan.scale
    if mode == "align_corners":
        return at * (size - 1) / (target - 1) if target > 1 else at * 0
    if mode == "tf_crop_and_resize":
        if target == 1:
            return at + 0.5 * (plan.start + plan.end) * (size - 1)
        return plan.start * (size - 1) + at * (plan.end - plan.start) * (size - 1) / (target - 1)
    if mode == "tf_half_pixel_for_nn":
        return (at + 0.5) / plan.scale
    if mode == "pytorch_half_pixel" and target == 1:
        return at * 0
    half = (at + 0.5) / plan.scale - 0.5
    if mode == "half_pixel_symmetric":
        return half + size / 2 * (1 - target / (plan.scale * size))
    return half


def _nearest(places: Tensor, mode: str, plan: _Axis) -> Tensor:
    rounding: dict[str, Callable[[Tensor], Tensor]] = {
        "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
        "floor": torch.floor,
        "ceil": torch.ceil,
    }
    return rounding[mode](places).long().clamp(0, plan.size - 1)


def _weights(call: Call, places: Tensor, plan: _Axis) -> Tensor:
    """(new, old) interpolation weights; neighbours beyond the border count for the border, or not at all."""
    cubic = call.get("mode") == "cubic"
    stretch = min(plan.scale, 1.0) if call.get("antialias") else 1.0
    radius = (2.0 if cubic else 1.0) / stretch
    base = torch.ceil(places - radius)
    neighbours = base[:, None] + torch.arange(int(2 * radius) + 2)
    distance = (neighbours - places[:, None]).abs() * stretch
    kernel = _cubic(distance, call.get("cubic_coeff_a", -0.75)) if cubic else (1 - distance).clamp(min=0)
    inside = (neighbours >= 0) & (neighbours < plan.size)
    if call.get("exclude_outside"):
        kernel = torch.where(inside, kernel, torch.zeros_like(kernel))
    if call.get("exclude_outside") or call.get("antialias"):
        kernel = kernel / kernel.sum(1, keepdim=True)
    index = neighbours.long().clamp(0, plan.size - 1)
    return torch.zeros(plan.target, plan.size, dtype=torch.float64).scatter_add(1, index, kernel)


def _cubic(d: Tensor, a: float) -> Tensor:
    """The kernel of Keys (1981)."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


@operator("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    """Values of (B, C, space...) at places (B, ..., axes) between -1 and 1."""
    mode, padding = str(call.get("mode", "bilinear")).removeprefix("bi"), call.get("padding_mode", "zeros")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    if mode not in ("bilinear", "nearest", "bicubic") or (mode == "bicubic" and x.ndim != 4):
        raise call.unsupported(f"mode {call.get('mode')}")
    return functional.grid_sample(x, grid.to(x.dtype), mode, padding, align_corners=bool(call.get("align_corners", 0)))

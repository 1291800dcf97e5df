"""Convolution, pooling and resizing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rewriter.graph.operators.registry import Call, operator


def explicit_pads(
    call: Call, sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """Begin widths then end widths of the space axes, from `pads` or `auto_pad`."""
    mode = call.get("auto_pad", "NOTSET")
    space = len(sizes)
    if mode == "NOTSET":
        return call.get("pads") or [0] * 2 * space
    begins, ends = [0] * space, [0] * space
    if mode == "VALID":
        return begins + ends
    for i in range(space):
        reach = (kernel[i] - 1) * dilations[i] + 1
        total = max((-(-sizes[i] // strides[i]) - 1) * strides[i] + reach - sizes[i], 0)
        small, large = total // 2, total - total // 2
        begins[i], ends[i] = (small, large) if mode == "SAME_UPPER" else (large, small)
    return begins + ends


def pad_space(x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
    """`x` with its space axes padded."""
    space = len(pads) // 2
    if not any(pads):
        return x
    return functional.pad(
        x, [width for i in reversed(range(space)) for width in (pads[i], pads[space + i])], value=value
    )


@operator("Conv")
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution over one to three space axes."""
    return convolved(call, x, weight, bias)


def convolved(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` convolved as the attributes of `call` say."""
    space = x.ndim - 2
    if not 1 <= space <= 3:
        raise call.unsupported(f"{space} space axes")
    strides, dilations = call.get("strides") or [1] * space, call.get("dilations") or [1] * space
    pads = explicit_pads(call, list(x.shape[2:]), list(weight.shape[2:]), strides, dilations)
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[space - 1]
    if pads[:space] == pads[space:]:
        return function(x, weight, bias, strides, pads[:space], dilations, call.get("group", 1))
    return function(pad_space(x, pads), weight, bias, strides, 0, dilations, call.get("group", 1))


@operator("ConvTranspose")
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The gradient of a convolution."""
    space = x.ndim - 2
    if not 1 <= space <= 3:
        raise call.unsupported(f"{space} space axes")
    strides, dilations = call.get("strides") or [1] * space, call.get("dilations") or [1] * space
    extra = call.get("output_padding") or [0] * space
    function = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[space - 1]
    reach = [(weight.shape[2 + i] - 1) * dilations[i] + 1 for i in range(space)]
    full = [(x.shape[2 + i] - 1) * strides[i] + extra[i] + reach[i] for i in range(space)]
    pads = _transposed_pads(call, list(x.shape[2:]), full, strides)
    result = function(x, weight, None, strides, 0, 0, call.get("group", 1), dilations)
    # Cutting (and filling) by hand allows asymmetric pads and output padding of any size.
    missing = [full[i] - result.shape[2 + i] for i in range(space)]
    result = pad_space(result, [-p for p in pads[:space]] + [missing[i] - pads[space + i] for i in range(space)])
    return result if bias is None else result + bias.reshape([1, -1, *[1] * space])


def _transposed_pads(call: Call, sizes: list[int], full: list[int], strides: list[int]) -> list[int]:
    space, mode, target = len(sizes), call.get("auto_pad", "NOTSET"), call.get("output_shape")
    if target is None and mode in ("NOTSET", "VALID"):
        return (call.get("pads") or [0] * 2 * space) if mode == "NOTSET" else [0] * 2 * space
    wanted = target[-space:] if target is not None else [size * s for size, s in zip(sizes, strides, strict=True)]
    begins, ends = [], []
    for i in range(space):
        total = max(full[i] - wanted[i], 0)
        begin = total // 2 if mode == "SAME_UPPER" else total - total // 2
        begins.append(begin)
        ends.append(full[i] - wanted[i] - begin)  # negative where the output is longer than what is computed
    return begins + ends


@operator("MaxPool")
def max_pool(call: Call, x: Tensor) -> tuple[Tensor, ...] | Tensor:
    """The largest of each window, and its flat place on request."""
    space = x.ndim - 2
    kernel, dilations = call.need("kernel_shape"), call.get("dilations") or [1] * space
    strides = call.get("strides") or [1] * space
    pads = explicit_pads(call, list(x.shape[2:]), kernel, strides, dilations)
    if call.get("ceil_mode"):
        pads = _ceil_pads(list(x.shape[2:]), kernel, strides, dilations, pads)
    if call.get("storage_order") and call.wants(1):
        raise call.unsupported("places in column-major order")
    low = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    wide = pad_space(x, pads, low)
    if not x.is_floating_point():
        return _pool_integers(wide, kernel, strides, dilations)
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[space - 1]
    if not call.wants(1):
        return function(wide, kernel, strides, 0, dilations)
    values, places = function(wide, kernel, strides, 0, dilations, return_indices=True)
    return values, _original_places(places, x, wide, pads)


def _pool_integers(x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> Tensor:
    for i, size in enumerate(kernel):
        reach = (size - 1) * dilations[i] + 1
        x = x.unfold(2 + i, reach, strides[i])[..., :: dilations[i]].amax(-1)
    return x


def _original_places(places: Tensor, x: Tensor, wide: Tensor, pads: list[int]) -> Tensor:
    """Flat places in the whole unpadded tensor from places in each padded plane."""
    space, flat, stride = x.ndim - 2, torch.zeros_like(places), 1
    for i in reversed(range(space)):
        flat = flat + (places % wide.shape[2 + i] - pads[i]) * stride
        places = places // wide.shape[2 + i]
        stride *= x.shape[2 + i]
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape([*x.shape[:2], *[1] * space])
    return flat + planes * stride


def _ceil_pads(
    sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int], pads: list[int]
) -> list[int]:
    """End widths raised so that a last window that starts inside is kept whole."""
    space, ends = len(sizes), []
    for i in range(space):
        reach, total = (kernel[i] - 1) * dilations[i] + 1, sizes[i] + pads[i] + pads[space + i]
        windows = -(-(total - reach) // strides[i]) + 1
        if (windows - 1) * strides[i] >= sizes[i] + pads[i]:
            windows -= 1
        ends.append(max((windows - 1) * strides[i] + reach - sizes[i] - pads[i], pads[space + i]))
    return pads[:space] + ends


@operator("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    """The mean of each window, with or without counting the padding."""
    space = x.ndim - 2
    kernel, dilations = call.need("kernel_shape"), call.get("dilations") or [1] * space
    strides = call.get("strides") or [1] * space
    pads = explicit_pads(call, list(x.shape[2:]), kernel, strides, dilations)
    inner = torch.ones_like(x[:1, :1])
    counted = pad_space(inner, pads, 1.0 if call.get("count_include_pad") else 0.0)
    wide = _ceil_pads(list(x.shape[2:]), kernel, strides, dilations, pads) if call.get("ceil_mode") else pads
    rest = [0] * space + [w - p for w, p in zip(wide[space:], pads[space:], strict=True)]
    total = _window_sum(pad_space(x, wide), kernel, strides, dilations)
    return total / _window_sum(pad_space(counted, rest), kernel, strides, dilations)


def _window_sum(x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> Tensor:
    for i, size in enumerate(kernel):
        reach = (size - 1) * dilations[i] + 1
        x = x.unfold(2 + i, reach, strides[i])[..., :: dilations[i]].sum(-1)
    return x


@operator("GlobalAveragePool")
def global_average_pool(call: Call, x: Tensor) -> Tensor:
    """The mean over space."""
    return x.mean(tuple(range(2, x.ndim)), True)


@operator("GlobalMaxPool")
def global_max_pool(call: Call, x: Tensor) -> Tensor:
    """The maximum over space."""
    return x.amax(tuple(range(2, x.ndim)), True)

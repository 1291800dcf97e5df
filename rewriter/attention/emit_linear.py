"""How a source is read as (B, S, C), how a result is laid out, and the nodes of what replaced an attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rewriter.attention.build import Builder
from rewriter.attention.element_types import other_dtype
from rewriter.core.site import LinearSite, OutputProjection, Precision, Projection


def linear(b: Builder, inputs: Sequence[str], precision: Precision, output: str = "", **attributes: str) -> str:
    """A `Linear` composite with operands rounded to `precision`."""
    rounding = {} if precision == "fp32" else {"precision": precision}
    return b.composite("Linear", *inputs, output=output, **attributes, **rounding)


def read_source(b: Builder, projection: Projection, width: int) -> str:
    """The source of a projection as (B, S, C), whatever its layout in the graph."""
    source = projection.source
    if projection.time_first:
        source = b.op("Transpose", source, perm=[1, 0, 2])
    if projection.channels_first:
        return b.op("Transpose", b.op("Reshape", source, b.ints(0, width, -1)), perm=[0, 2, 1])
    return b.op("Reshape", source, b.ints(0, -1, width)) if projection.flatten else source


def write_output(b: Builder, output: OutputProjection, features: str, precision: Precision) -> None:
    """``features @ weight + bias`` under the graph's name of the result, in its layout."""
    heads, dim, width = output.weight_HDC.shape
    as_is = _as_is(output)
    if output.bare:
        if as_is:
            b.op("Identity", features, output=output.value)
        else:
            _lay_out(b, output, features, width)
        return
    weight = output.weight_HDC.reshape(heads * dim, width)
    other = other_dtype(b, output.value)
    if other is not None:  # the graph widened what it weighs
        features = b.op("Cast", features, to=int(ir.DataType.from_numpy(other)))
        weight = weight.astype(other)
    inputs = [features, b.constant(weight, "output.weight")]
    if output.bias_C is not None:
        inputs.append(b.constant(output.bias_C.astype(other or output.bias_C.dtype), "output.bias"))
    result = b.declare(linear(b, inputs, precision, output.value if as_is else ""), None, None, width, dtype=other)
    if not as_is:
        _lay_out(b, output, result, width)


def emit_linear_site(b: Builder, site: LinearSite) -> None:
    """The nodes of a site that is no attention any more."""
    output, inner = site.output, site.inner
    width = output.weight_HDC.shape[2]
    source = read_source(b, inner, _source_width(site))
    if not site.features:
        bias = np.zeros(width) if output.bias_C is None else output.bias_C
        lead = b.op("Slice", b.op("Shape", source), b.ints(0), b.ints(2))
        as_is = _as_is(output)
        shape, last = b.joined([lead, b.ints(width)]), output.value if as_is else ""
        result = b.op("Expand", b.constant(bias, "output.bias"), shape, output=last)
        if not as_is:
            _lay_out(b, output, result, width)
        return
    name = f"{site.id}/features"
    if inner.weight_CGD is None:
        b.op("Identity", source, output=name)
    else:
        weight = inner.weight_CGD
        inputs = [source, b.constant(weight.reshape(weight.shape[0], -1), "inner.weight")]
        if inner.bias_GD is not None:
            inputs.append(b.constant(inner.bias_GD.reshape(-1), "inner.bias"))
        linear(b, inputs, site.precision, name)
    b.declare(name, None, None, site.features)
    write_output(b, output, name, site.precision)


def _source_width(site: LinearSite) -> int:
    weight = site.replaces.value.weight_CGD
    assert weight is not None
    return int(weight.shape[0])


def _as_is(output: OutputProjection) -> bool:
    return output.rank == 3 and not output.time_first and not output.channels_first and not output.apart


def _lay_out(b: Builder, output: OutputProjection, result: str, width: int) -> None:
    if output.apart:
        cut = b.op("Reshape", result, b.ints(0, 0, output.apart, width // output.apart))
        laid = b.op("Transpose", cut, output=output.value if output.rank == 4 else "", perm=list(output.perm))
        if output.rank == 3:
            shape = b.joined([b.ints(-1), b.size_of(result, 1), b.ints(width // output.apart)])
            b.op("Reshape", laid, shape, output=output.value)
        return
    if output.channels_first:
        _channels_first(b, output, result, width)
        return
    if output.time_first:
        last = output.value if output.rank == 3 else ""
        result = b.op("Transpose", result, output=last, perm=[1, 0, 2])
    if output.rank == 2:
        b.op("Reshape", result, b.ints(-1, width), output=output.value)
    elif output.rank > 3:
        lead = b.op("Slice", b.op("Shape", output.flatten_like), b.ints(0), b.ints(-1))
        b.op("Reshape", result, b.joined([lead, b.ints(width)]), output=output.value)


def _channels_first(b: Builder, output: OutputProjection, result: str, width: int) -> None:
    if output.rank == 3:
        b.op("Transpose", result, output=output.value, perm=[0, 2, 1])
        return
    shape = b.op("Shape", output.flatten_like)
    lead, axes = b.op("Slice", shape, b.ints(0), b.ints(1)), b.op("Slice", shape, b.ints(2), b.ints(output.rank))
    target = b.joined([lead, b.ints(width), axes])
    b.op("Reshape", b.op("Transpose", result, perm=[0, 2, 1]), target, output=output.value)

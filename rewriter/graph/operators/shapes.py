"""Constants, shapes and sequences of numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rewriter.graph.operators.registry import Call, ints, operator, sized


@operator("Constant")
def constant(call: Call) -> Tensor:
    """The value a node carries."""
    if call.get("value") is not None:
        tensor = call.tensor("value")
        assert tensor is not None
        return tensor
    for name in ("value_float", "value_floats"):
        if name in call.attributes:
            return torch.tensor(call.get(name), dtype=call.upcast or torch.float32)
    for name in ("value_int", "value_ints"):
        if name in call.attributes:
            return torch.tensor(call.get(name), dtype=torch.int64)
    raise call.unsupported(f"a constant given as {', '.join(call.attributes) or 'nothing'}")


@operator("ConstantOfShape")
def constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    """One number, repeated."""
    value = call.tensor("value")
    if value is None:
        value = torch.zeros(1, dtype=call.upcast or torch.float32)
    return value.reshape(()).expand(sized(ints(shape))).clone()


@operator("EyeLike")
def eye_like(call: Call, x: Tensor) -> Tensor:
    """Ones on one diagonal."""
    dtype = call.dtype(call.get("dtype")) if call.get("dtype") else x.dtype
    rows = torch.arange(x.shape[0])[:, None] + call.get("k", 0)
    return (rows == torch.arange(x.shape[1])).to(dtype)


@operator("Range")
def number_range(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Numbers from `start` up to but without `limit`."""
    first, step = start.item(), delta.item()
    count = max(math.ceil((limit.item() - first) / step), 0)
    sized([count])
    return (torch.arange(count, dtype=start.dtype) * step + first).to(start.dtype)


@operator("Shape")
def shape(call: Call, x: Tensor) -> Tensor:
    """Sizes of the axes, or of some of them."""
    return torch.tensor(list(x.shape)[call.get("start", 0) : call.get("end")], dtype=torch.int64)


@operator("Size")
def size(call: Call, x: Tensor) -> Tensor:
    """How many elements there are."""
    return torch.tensor(x.numel())


@operator("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
def random(call: Call, *inputs: Tensor) -> Tensor:
    """Refused: a result that differs from run to run cannot be compared."""
    raise call.unsupported("its result is random")


@operator("Dropout", since=12)
def dropout(call: Call, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> tuple[Tensor, ...]:
    """Nothing in inference; refused while training."""
    if training is not None and bool(training) and (ratio is None or float(ratio) > 0):
        raise call.unsupported("it is in training mode: export the model after model.eval()")
    return x, torch.ones_like(x, dtype=torch.bool)


@operator("Dropout")
def dropout_by_attributes(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    """Nothing in inference, before opset 12."""
    if call.opset < 7 and not call.get("is_test", 0) and call.get("ratio", 0.5) > 0:
        raise call.unsupported("it is in training mode: export the model after model.eval()")
    return x, torch.ones_like(x, dtype=torch.bool if call.opset >= 10 else x.dtype)

"""Norms over groups of channels, batches and lengths, by Relax."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from tvm import relax

from rewriter.runtimes.tvm.lowering import Lowering
from rewriter.runtimes.tvm.operators.registry import integers, lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op


@lowers("InstanceNormalization", "GroupNormalization")
def _group_norm(lowering: Lowering, node: Node) -> Any:
    """Each group of channels of each sample by its own mean and variance: a layer norm over what a group holds."""
    shape = lowering.shape(node.inputs[0])
    channels = shape[1]
    groups = int(node.attributes.get("num_groups", channels))
    count = channels // groups * prod(shape[2:])
    x = op.reshape(lowering.value(node.inputs[0]), (shape[0], groups, count))
    ones, zeros = (lowering.array(np.full(count, value, lowering.dtype(node.inputs[0]))) for value in (1.0, 0.0))
    centred = op.nn.layer_norm(x, ones, zeros, [-1], float(node.attributes.get("epsilon", 1e-5)))
    gain, bias = (_per_channel(lowering, name, channels, len(shape)) for name in node.inputs[1:3])
    return op.add(op.multiply(op.reshape(centred, shape), gain), bias)


def _per_channel(lowering: Lowering, name: str, channels: int, rank: int) -> Any:
    """A row per channel; one per group, as before opset 21, is repeated."""
    value, rows = lowering.value(name), lowering.shape(name)[0]
    if rows != channels:
        value = lowering.builder.emit(op.repeat(value, channels // rows, 0))
    return lowering.builder.emit(op.reshape(value, (1, channels, *[1] * (rank - 2))))


@lowers("BatchNormalization")
def _batch_norm(lowering: Lowering, node: Node) -> Any:
    """With recorded statistics."""
    if int(node.attributes.get("training_mode", 0)) or lowering.wants(node, *range(1, 5)):
        raise lowering.unsupported(node, "training mode")
    shape = lowering.shape(node.inputs[0])
    gain, bias, mean, variance = (_per_channel(lowering, name, shape[1], len(shape)) for name in node.inputs[1:5])
    epsilon = relax.const(float(node.attributes.get("epsilon", 1e-5)), lowering.dtype(node.inputs[0]))
    slope = lowering.builder.emit(op.divide(gain, op.sqrt(op.add(variance, epsilon))))
    return op.add(op.multiply(op.subtract(lowering.value(node.inputs[0]), mean), slope), bias)


@lowers("LpNormalization")
def _lp_norm(lowering: Lowering, node: Node) -> Any:
    """By the sum of magnitudes or the Euclidean length along one axis; zero stays zero."""
    x, axis = lowering.value(node.inputs[0]), int(node.attributes.get("axis", -1))
    if int(node.attributes.get("p", 2)) == 1:
        length = op.sum(op.abs(x), [axis], True)
    else:
        length = op.sqrt(op.sum(op.multiply(x, x), [axis], True))
    length, zero = lowering.builder.emit(length), relax.const(0.0, lowering.dtype(node.inputs[0]))
    return op.where(op.equal(length, zero), zero, op.divide(x, length))


@lowers("MeanVarianceNormalization")
def _mean_variance(lowering: Lowering, node: Node) -> Any:
    axes = integers(node.attributes.get("axes", (0, 2, 3)))
    x, dtype = lowering.value(node.inputs[0]), lowering.dtype(node.inputs[0])
    centred = lowering.builder.emit(op.subtract(x, op.mean(x, axes, True)))
    deviation = op.sqrt(op.mean(op.multiply(centred, centred), axes, True))
    return op.divide(centred, op.add(deviation, relax.const(1e-9, dtype)))

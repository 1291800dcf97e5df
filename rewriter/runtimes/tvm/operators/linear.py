"""Linear layers: the packed GEMM in the number format that the layer asks for.

Where the processor lacks the instructions of a format, operands are rounded as it says and multiplied in fp32: the
same meaning at the speed of fp32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
from tvm import relax

from rewriter.runtimes.tvm.kernels import formats
from rewriter.runtimes.tvm.kernels.gemm import MATRIX_WORDS, Gemm, Precision
from rewriter.runtimes.tvm.kernels.quantise import Quantise, make_quantise
from rewriter.runtimes.tvm.lowering import Lowering, is_float32
from rewriter.runtimes.tvm.operators.elementwise import mapped_call
from rewriter.runtimes.tvm.operators.registry import lowers
from rewriter.runtimes.tvm.program import Node

op = relax.op


@lowers("rewriter:Linear")
def _linear(lowering: Lowering, node: Node) -> Any:
    """Inputs x, weight, bias?, residual? (the last one only after fusion)."""
    x, weight, bias, residual = (node.input(index) for index in range(4))
    activation = str(node.attributes.get("activation", "")).replace("identity", "")
    precision: Precision = node.attributes.get("precision", "fp32")
    array = lowering.program.constant(weight)
    if array is None or not is_float32(lowering, x) or array.ndim != 2:
        if precision != "fp32":
            raise lowering.unsupported(node, f"{precision} with a computed weight or another dtype than float32")
        return _plain_linear(lowering, node, activation)
    K, N = array.shape
    spec = Gemm(lowering.shape(x)[:-1], N, K, bool(bias), activation, bool(residual), lowering.lanes, lowering.threads)
    if lowering.target.multiplies(precision) and K <= formats.MOST_TERMS:
        spec = replace(spec, precision=precision, matrix_unit=lowering.target.has_matrix_unit(precision))
    a = _operands(lowering, x, precision, spec)
    rest = [lowering.value(name) for name in (bias, residual) if name]
    return _product(lowering, spec, a, array, precision, rest)


def _product(
    lowering: Lowering, spec: Gemm, a: list[Any], weight_KN: NDArray[Any], precision: Precision, rest: list[Any]
) -> Any:
    """One GEMM of `spec` on operands rounded to `precision`."""
    tile = lowering.tiles.gemm(spec)
    name = f"gemm_amx_{spec.precision}" if spec.matrix_unit else f"gemm_{spec.precision}"
    kernel = lowering.kernels.get(name, (spec, tile), lambda unique: formats.make(spec, tile, unique))
    width, content = tile.vectors * spec.lanes, lowering.parameters.key(weight_KN)

    def part(index: int) -> Any:
        return lowering.parameter(
            (content, width, precision, spec.precision, spec.matrix_unit, index),
            lambda: formats.weight_operands(weight_KN, precision, spec.precision, width, spec.matrix_unit)[index],
        )

    b = [part(index) for index in range(formats.WEIGHT_OPERANDS[spec.precision])]
    return lowering.call(kernel, [*a, *b, *rest], ((*spec.leading, spec.N), "float32"))


def _operands(lowering: Lowering, x: str, precision: Precision, gemm: Gemm) -> list[Any]:
    """x rounded to `precision`, as words of it or, if `gemm` is in fp32, as numbers; made once per value."""
    if precision == "fp32":
        return [lowering.value(x)]
    key = (x, precision)
    if key not in lowering.rounded:
        unpacked, multiple = gemm.precision == "fp32", MATRIX_WORDS if gemm.matrix_unit else 1
        spec = Quantise(lowering.shape(x), precision, lowering.lanes, lowering.threads, unpacked, multiple)
        kernel = lowering.kernels.get("quantise", spec, lambda unique: make_quantise(spec, unique))
        result = lowering.builder.emit(lowering.call(kernel, [lowering.value(x)], *spec.outputs))
        parts = len(spec.outputs)
        lowering.rounded[key] = (
            [result] if parts == 1 else [lowering.builder.emit(relax.TupleGetItem(result, i)) for i in range(parts)]
        )
    return lowering.rounded[key]


def _plain_linear(lowering: Lowering, node: Node, activation: str) -> Any:
    x, weight, bias, residual = (node.input(index) for index in range(4))
    result = lowering.builder.emit(op.matmul(lowering.value(x), lowering.value(weight)))
    if bias:
        result = lowering.builder.emit(op.add(result, lowering.value(bias)))
    if activation:
        lowering.env[node.outputs[0]] = result
        result = lowering.builder.emit(mapped_call(lowering, node.outputs[0], activation))
    return op.add(result, lowering.value(residual)) if residual else result

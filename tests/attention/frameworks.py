"""Attention as converters of TensorFlow, Keras, JAX and Paddle models write it: one function per framework's way.

Width 24, 4 heads of 6 dims. Each takes a builder and hidden states (B, S, 24) and returns hidden states.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from tests.attention.builder import Builder

WIDTH, HEADS, DIM, INNER = 24, 4, 6, 40


def keras_attention(b: Builder, x: str, mask: str) -> str:
    """keras.layers.MultiHeadAttention, every projection and product an einsum over named head axes."""
    q, k, v = (
        b.op("Add", b.op("Einsum", x, b.weight(WIDTH, HEADS, DIM), equation="abc,cde->abde"), b.weight(HEADS, DIM))
        for _ in range(3)
    )
    q = b.op("Mul", q, b.constant(DIM**-0.5))
    scores = b.op("Einsum", k, q, equation="aecd,abcd->acbe")
    keep = b.unsqueezed(b.op("Cast", mask, to=TensorProto.FLOAT), 1, 2)
    scores = b.op("Add", scores, b.op("Mul", b.op("Sub", b.constant(1.0), keep), b.constant(-1e9)))
    context = b.op("Einsum", b.op("Softmax", scores, axis=-1), v, equation="acbe,aecd->abcd")
    return b.op("Add", b.op("Einsum", context, b.weight(HEADS, DIM, WIDTH), equation="abcd,cde->abe"), b.weight(WIDTH))


def keras_attention_without_einsum(b: Builder, x: str, mask: str) -> str:
    """The same where einsums became products: 3-D kernels flattened, heads moved to the front and back."""
    q, k, v = (
        b.op("Add", b.shaped(b.op("MatMul", b.shaped(x, -1, WIDTH), b.weight(WIDTH, WIDTH)), 0, HEADS, DIM), bias)
        for bias in (b.weight(HEADS, DIM) for _ in range(3))
    )
    q, k, v = (b.like(y, x, 2, HEADS, DIM) for y in (b.op("Mul", q, b.constant(DIM**-0.5)), k, v))
    keys = b.op("Transpose", k, perm=[0, 2, 3, 1])
    scores = b.op("MatMul", b.op("Transpose", q, perm=[0, 2, 1, 3]), keys)
    keep = b.unsqueezed(b.op("Cast", mask, to=TensorProto.FLOAT), 1, 2)
    scores = b.op("Add", b.op("Mul", b.op("Sub", b.constant(1.0), keep), b.constant(-1e9)), scores)
    context = b.op("MatMul", b.op("Softmax", scores, axis=3), b.op("Transpose", v, perm=[0, 2, 1, 3]))
    rows = b.shaped(b.op("Transpose", context, perm=[0, 2, 1, 3]), -1, WIDTH)
    return b.like(b.op("Add", b.weight(WIDTH), b.op("MatMul", rows, b.weight(WIDTH, WIDTH))), x, 2, WIDTH)


def hub_attention(b: Builder, x: str, mask: str) -> str:
    """BERT of the TensorFlow 1 days: rows of all sentences in one matrix, and a softmax over a flattened matrix."""
    rows = b.shaped(x, -1, WIDTH)
    q, k, v = (b.like(_dense(b, rows), x, 2, HEADS, DIM) for _ in range(3))
    q, k, v = (b.op("Transpose", y, perm=[0, 2, 1, 3]) for y in (q, k, v))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    columns = b.unsqueezed(b.op("Cast", mask, to=TensorProto.FLOAT), 1)
    rows = b.unsqueezed(b.op("Cast", b.op("Equal", mask, mask), to=TensorProto.FLOAT), 2)
    keep = b.unsqueezed(b.op("Mul", rows, columns), 1)
    adder = b.op("Mul", b.op("Sub", b.constant(1.0), keep), b.constant(-10000.0))
    scores = b.op("Add", b.op("Mul", scores, b.constant(DIM**-0.5)), adder)
    shape = b.op("Shape", scores)
    size = b.sliced(shape, 3, 4, 0)
    flat = b.op("Reshape", scores, b.op("Concat", b.constant([-1], np.int64), size, axis=0))
    weights = b.op("Reshape", b.op("Softmax", flat, axis=1), shape)
    context = b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    return b.like(_dense(b, b.shaped(context, -1, WIDTH)), x, 2, WIDTH)


def one(b: Builder) -> str:
    """The scalar one."""
    return b.constant(1.0)


def folded_attention(b: Builder, x: str, mask: str) -> str:
    """Sequence first, batch and heads in one axis, three-dimensional products."""
    turned = b.op("Transpose", x, perm=[1, 0, 2])
    length = b.sliced(b.op("Shape", turned), 0, 1, 0)

    def heads(y: str) -> str:
        target = b.op("Concat", length, b.constant([-1, DIM], np.int64), axis=0)
        return b.op("Transpose", b.op("Reshape", y, target), perm=[1, 0, 2])

    q, k, v = (_dense(b, turned) for _ in range(3))
    q, k, v = (heads(y) for y in (b.op("Div", q, b.constant(DIM**0.5)), k, v))
    weights = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), axis=2)
    context = b.op("Transpose", b.op("MatMul", weights, v), perm=[1, 0, 2])
    result = _dense(b, b.like(context, turned, 2, WIDTH))
    return b.op("Transpose", result, perm=[1, 0, 2])


def wrapped_attention(b: Builder, x: str, mask: str) -> str:
    """Kernels stored turned, as half floats, flattened, and behind identities."""
    turned = b.op("Transpose", b.op("Identity", b.weight(WIDTH, WIDTH)), perm=[1, 0])
    half = b.op("Cast", b.op("Identity", b.weight(WIDTH, WIDTH, dtype=np.float16)), to=TensorProto.FLOAT)
    flat = b.op("Transpose", b.shaped(b.weight(WIDTH, HEADS, DIM), WIDTH, WIDTH), perm=[1, 0])
    out = b.op("Identity", b.op("Transpose", b.op("Cast", b.weight(WIDTH, WIDTH), to=TensorProto.FLOAT), perm=[1, 0]))
    q, k, v = (b.op("Add", b.op("Identity", b.weight(WIDTH)), b.op("MatMul", x, w)) for w in (turned, half, flat))
    q, k, v = (b.op("Transpose", b.shaped(y, 0, 0, HEADS, DIM), perm=[0, 2, 1, 3]) for y in (q, k, v))
    scores = b.op("Div", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), b.constant(DIM**0.5))
    keep = b.op("Cast", b.unsqueezed(mask, 1, 2), to=TensorProto.BOOL)
    weights = b.op("Softmax", b.op("Where", keep, scores, b.constant(-1e9)), axis=-1)
    context = b.shaped(b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3]), 0, 0, WIDTH)
    return b.op("Add", b.op("MatMul", context, out), b.op("Identity", b.weight(WIDTH)))


def flax_attention(b: Builder, x: str, mask: str) -> str:
    """Flax: general dot products, the softmax written out, masked entries replaced by the lowest number."""
    rows = b.shaped(x, -1, WIDTH)
    kernels = [b.shaped(b.weight(WIDTH, HEADS, DIM), WIDTH, WIDTH) for _ in range(3)]
    q, k, v = (b.like(b.op("MatMul", rows, kernel), x, 2, HEADS, DIM) for kernel in kernels)
    q, k, v = (b.op("Add", y, b.shaped(b.weight(HEADS, DIM), 1, 1, HEADS, DIM)) for y in (q, k, v))
    q = b.op("Div", q, b.op("Sqrt", b.constant(float(DIM))))
    scores = b.op("Einsum", q, k, equation="bqhd,bkhd->bhqk")
    keep = b.op("Greater", b.unsqueezed(mask, 1, 2), b.constant(0, np.int64))
    bias = b.op("Where", keep, b.constant(0.0), b.constant(np.finfo(np.float32).min))
    scores = b.op("Add", scores, bias)
    raised = b.op("Exp", b.op("Sub", scores, b.op("Identity", b.reduced("ReduceMax", scores, -1))))
    weights = b.op("Div", raised, b.reduced("ReduceSum", raised, -1))
    context = b.op("Einsum", weights, v, equation="bhqk,bkhd->bqhd")
    out = b.op("MatMul", b.shaped(context, -1, WIDTH), b.shaped(b.weight(HEADS, DIM, WIDTH), WIDTH, WIDTH))
    return b.op("Add", b.like(out, x, 2, WIDTH), b.shaped(b.weight(WIDTH), 1, 1, WIDTH))


def paddle_attention(b: Builder, x: str, mask: str) -> str:
    """PP-OCR's recogniser: one packed product, cut by slices of a five-dimensional tensor."""
    packed = b.op("Add", b.op("MatMul", x, b.weight(WIDTH, 3 * WIDTH)), b.weight(3 * WIDTH))
    five = b.op("Transpose", b.shaped(packed, 0, -1, 3, HEADS, DIM), perm=[2, 0, 3, 1, 4])
    q, k, v = (b.squeezed(b.sliced(five, i, i + 1, 0), 0) for i in range(3))
    q = b.op("Mul", q, b.constant(DIM**-0.5))
    weights = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    context = b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    return b.op("Add", b.op("MatMul", b.shaped(context, 0, -1, WIDTH), b.weight(WIDTH, WIDTH)), b.weight(WIDTH))


def multiplied_attention(b: Builder, x: str, mask: str) -> str:
    """The first GPT-2: scores times a triangle, minus ten thousand where it is zero; packed and split."""
    packed = b.like(
        b.op("Add", b.op("MatMul", b.shaped(x, -1, WIDTH), b.weight(WIDTH, 3 * WIDTH)), b.weight(3 * WIDTH)),
        x,
        2,
        3 * WIDTH,
    )
    q, k, v = b.ops("Split", 3, packed, axis=2)
    q, k, v = (b.op("Transpose", b.like(y, x, 2, HEADS, DIM), perm=[0, 2, 1, 3]) for y in (q, k, v))
    scores = b.op("Mul", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), b.constant(DIM**-0.5))
    length = b.squeezed(b.sliced(b.op("Shape", x), 1, 2, 0), 0)
    places = b.op("Range", b.constant(0, np.int64), length, b.constant(1, np.int64))
    seen = b.op("Not", b.op("Less", b.unsqueezed(places, 1), places))
    seen = b.unsqueezed(b.op("Cast", seen, to=TensorProto.FLOAT), 0, 1)
    hidden = b.op("Mul", b.constant(1e4), b.op("Sub", b.constant(1.0), seen))
    weights = b.op("Softmax", b.op("Sub", b.op("Mul", scores, seen), hidden), axis=3)
    context = b.op("Transpose", b.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    return b.like(_dense(b, b.shaped(context, -1, WIDTH)), x, 2, WIDTH)


def image_attention(b: Builder, x: str, mask: str) -> str:
    """Channels last turned to channels first around 1 x 1 convolutions, as converters of NHWC models write them."""

    def conv(y: str, inner: int, outer: int) -> str:
        first = b.op("Transpose", y, perm=[0, 3, 1, 2])
        kernel = b.weight(outer, inner, 1, 1)
        made = b.op("Conv", first, kernel, b.weight(outer), kernel_shape=[1, 1], strides=[1, 1])
        return b.op("Transpose", made, perm=[0, 2, 3, 1])

    image = b.unsqueezed(x, 2)
    q, k, v = (b.shaped(conv(image, WIDTH, WIDTH), 0, -1, HEADS, DIM) for _ in range(3))
    q, v = (b.op("Transpose", y, perm=[0, 2, 1, 3]) for y in (q, v))
    scores = b.op("Mul", b.constant(DIM**-0.5), b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 3, 1])))
    context = b.op("Transpose", b.op("MatMul", b.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    return b.squeezed(conv(b.unsqueezed(b.shaped(context, 0, -1, WIDTH), 2), WIDTH, WIDTH), 2)


def feed_forward(b: Builder, x: str, tanh: bool) -> str:
    """Two dense layers with a gelu spelled in Erf, or in Tanh and Pow."""
    hidden = b.op("Add", b.op("MatMul", x, b.weight(WIDTH, INNER)), b.weight(INNER))
    if tanh:
        cubic = b.op("Mul", b.constant(0.044715), b.op("Pow", hidden, b.constant(3.0)))
        inner = b.op("Tanh", b.op("Mul", b.constant((2 / np.pi) ** 0.5), b.op("Add", hidden, cubic)))
    else:
        inner = b.op("Erf", b.op("Div", hidden, b.constant(2**0.5)))
    gate = b.op("Mul", b.constant(0.5), b.op("Add", one(b), inner))
    return b.op("Add", b.op("MatMul", b.op("Mul", hidden, gate), b.weight(INNER, WIDTH)), b.weight(WIDTH))


def layer_norm(b: Builder, x: str) -> str:
    """The form of tf.nn.batch_normalization: x * gain / deviation + (shift - mean * gain / deviation)."""
    mean = b.reduced("ReduceMean", x, -1)
    difference = b.op("Sub", x, b.op("Identity", mean))
    variance = b.reduced("ReduceMean", b.op("Mul", difference, difference), -1)
    deviation = b.op("Sqrt", b.op("Add", variance, b.constant(1e-12)))
    factor = b.op("Mul", b.op("Reciprocal", deviation), b.gain(WIDTH))
    return b.op("Add", b.op("Mul", x, factor), b.op("Sub", b.weight(WIDTH), b.op("Mul", mean, factor)))


def _dense(b: Builder, x: str) -> str:
    return b.op("Add", b.op("MatMul", x, b.weight(WIDTH, WIDTH)), b.weight(WIDTH))


ATTENTIONS: dict[str, tuple[Callable[[Builder, str, str], str], int]] = {
    "keras": (keras_attention, 13),
    "keras_without_einsum": (keras_attention_without_einsum, 11),
    "hub": (hub_attention, 11),
    "folded": (folded_attention, 10),
    "wrapped": (wrapped_attention, 12),
    "flax": (flax_attention, 15),
    "paddle": (paddle_attention, 11),
    "multiplied": (multiplied_attention, 11),
    "image": (image_attention, 12),
}

"""The score function from content product to softmax input: scale, soft cap and what is added, from random probes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rewriter.attention.asides import Aside
from rewriter.attention.operands import Operand
from rewriter.attention.trace import SHAPES, Trace, close, inputs_of, outputs_of
from rewriter.core.errors import ModelError
from rewriter.core.refusal import Refused
from rewriter.core.site import Array, ScoreBias, Step

MASKED = 1e3  # an additive term beyond this hides the content in the probe
FAR = 1e6
OVERFLOW = 1e4  # scores cut off beyond this are kept from overflowing; no logits of a model come near


@dataclass(frozen=True)
class ScoreFunction:
    """``scores = cap(slope * product) + offset``; `offset` has the shape of the scores (slots..., S, T).

    Where slopes differ between slots, `slopes` has one for each of them (slots...) and `slope` is 1. With `swapped` the
    last two axes of the product come the other way round in the scores.
    """

    slope: float
    softcap: float
    offset: Array
    slopes: Array | None = None
    swapped: bool = False


def read_scores(trace: Trace, product: str, scores: str, partly: bool = False) -> ScoreFunction:
    """Scale, cap and additive part of one candidate product; raises `Refused` if scores are no such function of it.

    With `partly` only scores that move with the product count: others are hidden later.
    """
    before, after = trace.shape(product), trace.shape(scores)
    if int(np.prod(before)) != int(np.prod(after)):
        raise Refused("not-the-content", "the product and the scores differ in size")
    try:
        return _read(trace, (product, scores), partly, False)
    except Refused:
        if len(before) < 2 or before[-2:] != after[:-3:-1]:
            raise
        return _read(trace, (product, scores), partly, True)


def _read(trace: Trace, ends: tuple[str, str], partly: bool, swapped: bool) -> ScoreFunction:
    (product, scores), shape = ends, trace.shape(ends[1])
    random = np.random.default_rng(0).standard_normal(trace.shape(product))
    probes = trace.probe(product, scores, [0 * random, random, 2 * random, FAR * np.sign(random), 1e-3 * random])
    if probes is None:
        raise Refused("not-the-content", "the product does not reach the scores")
    zero, one, two, far, small = probes
    free = np.isfinite(zero) & (np.abs(zero) < MASKED) & np.isfinite(one)
    free = free & (one != zero) if partly else free
    if not free.any():
        raise Refused("all-masked", "every score is masked in the probe")
    raw = (random.swapaxes(-1, -2) if swapped else random).reshape(shape)
    slope = _slope(small[free] - zero[free], 1e-3 * raw[free])
    bound = float(np.abs(far[free] - zero[free]).max())
    softcap = bound if bound < 0.5 * FAR * abs(slope) else 0.0
    if not softcap:
        slope = _slope(far[free] - zero[free], FAR * np.sign(raw[free]))
    elif softcap >= OVERFLOW and _straight(trace, ends, 0.5 * softcap / slope * np.sign(random), free):
        softcap = 0.0
    else:
        slope = _capped_slope(one[free] - zero[free], raw[free], softcap, slope)
    if not softcap and not close(one[free] - zero[free], slope * raw[free], 1e-8):
        slopes = _slopes(np.where(free, two, 0.0) - np.where(free, zero, 0.0), 2 * raw, free)
        if close(one[free] - zero[free], np.broadcast_to(slopes, raw.shape)[free] * raw[free], 1e-8):
            return ScoreFunction(1.0, 0.0, zero, slopes[..., 0, 0], swapped)
    for factor, got in ((1.0, one), (2.0, two)):
        content = factor * slope * raw
        expected = softcap * np.tanh(content / softcap) if softcap else content
        if slope == 0.0 or not close(got[free] - zero[free], expected[free], 1e-8):
            raise Refused("unknown-score-function", "scores are no affine or capped function of the content product")
    return ScoreFunction(tidy(slope), tidy(softcap), zero, swapped=swapped)


def _straight(trace: Trace, ends: tuple[str, str], content: Array, free: Array) -> bool:
    """Whether scores are still proportional to a product as large as this."""
    probed = trace.probe(*ends, [0 * content, 0.01 * content, content])
    if probed is None:
        return False
    zero, hundredth, whole = probed
    return close((whole - zero)[free], 100 * (hundredth - zero)[free], 1e-8)


def _slope(effect: Array, raw: Array) -> float:
    return float((effect * raw).sum() / (raw * raw).sum())


def _slopes(effect: Array, raw: Array, free: Array) -> Array:
    """One slope for every slot, over what is not masked."""
    seen, effect = np.where(free, raw, 0.0), np.where(free, effect, 0.0)
    energy = (seen * seen).sum((-1, -2), keepdims=True)
    return np.asarray((effect * seen).sum((-1, -2), keepdims=True) / np.maximum(energy, 1e-300))


def _capped_slope(effect: Array, raw: Array, softcap: float, guess: float) -> float:
    ratio = np.clip(effect / softcap, -0.999999, 0.999999)
    usable = np.abs(ratio) < 0.9
    if not usable.any():
        return guess
    return _slope(softcap * np.arctanh(ratio[usable]), raw[usable])


def tidy(value: float) -> float:
    """The number a model meant, where the measured one equals it up to rounding: a float32, or one over a float32."""
    for candidate in (float(np.float32(value)), 1.0 / float(np.float32(1.0 / value)) if value else 0.0):
        if abs(candidate - value) <= 1e-12 * abs(value):
            return candidate
    return value


def read_bias(trace: Trace, product: str, scores: str, heads: int, zero: Array) -> ScoreBias:
    """The additive part `zero` as a reference: a value that is added, or the graph's own path from zeros."""
    if not zero.any():
        return ScoreBias()
    if zero.ndim > 4:
        lead = zero.shape[1:-2]
        if int(np.prod(lead)) != heads or trace.shape(product) != zero.shape:
            raise Refused("score-rank", f"something is added to scores with {zero.ndim} axes")
        rank = zero.ndim
        return ScoreBias("path", product, scores, full_shape=True, heads_axis=heads, product_rank=rank, lead=lead)
    folded = zero.ndim == 3
    filled = _filled(trace, product, scores) if zero.ndim == 4 or heads == 1 else None
    if filled:
        # a condition of three axes is (batch, queries, keys)
        return replace(filled, folded=True) if folded and len(trace.shape(filled.value)) == 3 else filled
    added = _added_value(trace, product, scores)
    if added:
        shape = trace.shape(added)
        if not folded:
            return ScoreBias("value", added, heads_axis=shape[-3] if len(shape) > 2 else 1)
        if len(shape) < 3 or shape[0] == 1:
            return ScoreBias("value", added)
        if shape == zero.shape or heads == 1:
            return ScoreBias("value", added, heads_axis=heads, folded=True)
    tiny = np.zeros([1] * len(trace.shape(product)))
    measured = any(node.op_type in SHAPES for node in trace.paths.between(product, scores) or [])
    small = _try_probe(trace, product, scores, tiny) if not folded and not measured else None
    if small is not None and small.ndim == 4 and np.array_equal(np.broadcast_to(small, zero.shape), zero):
        return ScoreBias("path", product, scores, heads_axis=small.shape[1])
    return ScoreBias(
        "path",
        product,
        scores,
        full_shape=True,
        heads_axis=heads,
        folded=folded,
        product_rank=len(trace.shape(product)),
    )


def read_shares(trace: Trace, product: str, weights: Operand, heads: int) -> tuple[ScoreBias, Array]:
    """The logarithm of the shares that keys get with a content of zero: what is added where keys are hidden late."""
    shape, rank = trace.shape(weights.name), len(trace.shape(weights.name))
    if weights.axes != tuple(range(rank)) or rank not in (3, 4) or trace.shape(product) != shape:
        raise Refused("hidden-late", "keys are taken out after the exponential of scores with another layout")
    probed = trace.probe(product, weights.name, [np.zeros(shape)])
    assert probed is not None
    with np.errstate(divide="ignore"):
        offset = np.log(probed[0])
    bias = ScoreBias(
        "path",
        product,
        weights.name,
        full_shape=True,
        heads_axis=heads,
        folded=rank == 3,
        product_rank=rank,
        logarithm=True,
    )
    return bias, offset


def bias_in_order(trace: Trace, bias: ScoreBias) -> tuple[ScoreBias, tuple[Step, ...]]:
    """A bias whose keys come before its queries with queries first, and the steps that turn it; paths stay."""
    if bias.kind not in ("value", "fill"):
        return bias, ()
    rank, aside = len(trace.shape(bias.value)), Aside(trace)
    value = bias.value if rank > 1 else aside.unsqueeze(bias.value, 1)
    if rank > 1:
        value = aside.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
    return replace(bias, value=value), tuple(aside.steps)


def _filled(trace: Trace, product: str, scores: str) -> ScoreBias | None:
    """Where the scores are the content alone, or one low number by a condition that does not depend on the content."""
    node = trace.producer[scores]
    names = inputs_of(node)
    inside = {product}.union(*(outputs_of(step) for step in trace.between(product, scores) or []))
    if node.op_type != "Where" or names[0] in inside:
        return None
    for kept, fill, filled_by in ((names[1], names[2], False), (names[2], names[1], True)):
        if kept not in inside or fill not in trace.fixed or len(np.unique(trace.value(fill))) != 1:
            continue
        content = trace.probe(product, kept, [np.zeros(trace.shape(product))])
        if content is None or content[0].any() or trace.shape(kept) != trace.shape(scores):
            continue
        if trace.value(fill).flat[0] <= -MASKED:
            shape = trace.shape(names[0])
            axis = shape[-3] if len(shape) > 2 else 1
            return ScoreBias("fill", names[0], heads_axis=axis, filled_by=filled_by, infinite=_infinite(trace, fill))
    return None


def _infinite(trace: Trace, name: str) -> bool:
    return bool(np.isinf(trace.value(name)).all())


def _try_probe(trace: Trace, source: str, target: str, replacement: Array) -> Array | None:
    try:
        found = trace.probe(source, target, [replacement])
    except ModelError:  # a reshape on the way needs the full shape
        return None
    return found[0] if found else None


def _added_value(trace: Trace, product: str, scores: str) -> str:
    """B where ``scores = A(product) + B`` and A(0) = 0, so that B is there already; "" otherwise."""
    inside = {product}.union(*(outputs_of(node) for node in trace.between(product, scores) or []))
    node = trace.producer[scores]
    while node.op_type in ("Identity", "Cast") and inputs_of(node)[0] in inside:
        node = trace.producer[inputs_of(node)[0]]
    if node.op_type != "Add":
        return ""
    flags = [name in inside for name in inputs_of(node)]
    if sum(flags) != 1:
        return ""
    on, off = inputs_of(node)[flags.index(True)], inputs_of(node)[flags.index(False)]
    probed = trace.probe(product, on, [np.zeros(trace.shape(product))])
    return "" if probed is None or probed[0].any() or not trace.floating(off) else off

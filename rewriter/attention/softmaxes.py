"""Softmaxes however they are written, by what they do: random scores go in, what the values meet comes out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewriter.attention.operands import Operand, matrix_product
from rewriter.attention.readers import Reader, products_before
from rewriter.attention.trace import Trace, close, inputs_of, label
from rewriter.core.refusal import Refused
from rewriter.core.site import Array

STEPS_BACK = 6
ROWS = frozenset(("Reshape", "Flatten", "Squeeze"))


@dataclass(frozen=True)
class Softmax:
    """``P = exp(scores) A / (sum of exp(scores) A + exp(sink))`` over keys, A being 1 or 0.

    `scores` has a score for every entry of P; with `turned` keys come before queries in it. `sink` is (slots..., S, 1),
    None without one. `hides` says that some entries of A are 0: keys are taken out after the exponential.
    """

    scores: str
    turned: bool = False
    sink: Array | None = None
    hides: bool = False


def mixing_weights(trace: Trace, reader: Reader) -> Operand:
    """The probabilities as the product with the values reads them: (slots..., queries, keys)."""
    product = matrix_product(trace, reader.node)
    return product.left if reader.position == 0 else product.right


def read_softmax(trace: Trace, node: ir.Node, reader: Reader) -> Softmax:
    """What kind of softmax lies between scores and the product with the values; raises `Refused` if it is none."""
    weights = mixing_weights(trace, reader)
    why = "what the values meet is no softmax of the scores over the keys"
    for start in _starts(trace, inputs_of(node)[0]):
        found = _compared(trace, start, weights)
        if found is None:
            continue
        if found.hides and not _sums_to_one(weights.arrange(trace.value(weights.name))):
            why = "keys are taken out after the softmax, and the others do not sum to one"
            continue
        return found
    raise Refused("probabilities-changed", why, (label(node), label(reader.node)))


def _starts(trace: Trace, name: str) -> list[str]:
    """Values that may be the scores, earliest first: before a maximum is subtracted, a column added, rows merged."""
    chain = [name]
    for _ in range(STEPS_BACK):
        node = trace.producer.get(chain[-1])
        before = "" if node is None else _one_back(trace, node, len(trace.shape(chain[-1])))
        if not before:
            break
        chain.append(before)
    return chain[::-1]


def _one_back(trace: Trace, node: ir.Node, rank: int) -> str:
    names = inputs_of(node)
    if node.op_type == "Sub" and trace.between(names[0], names[1]) is not None:
        return names[0]
    if node.op_type in ("Concat", "Pad"):
        data = names if node.op_type == "Concat" else names[:1]
        reached = [name for name in data if name not in trace.shaped and products_before(trace, name)[0]]
        return reached[0] if len(reached) == 1 else ""
    if node.op_type in ("Mul", "Div") and names[1] in trace.fixed and trace.size(names[1]) == 1:
        return names[0]  # shrunk before a maximum is subtracted, and grown again after it
    return names[0] if node.op_type in ROWS and rank == 2 else ""


def _compared(trace: Trace, start: str, weights: Operand) -> Softmax | None:
    shape, random = trace.shape(start), np.random.default_rng(5)
    arranged = weights.arrange(trace.value(weights.name)).shape
    if int(np.prod(shape)) != int(np.prod(arranged)) or len(shape) < 2:
        return None
    scores = [random.standard_normal(shape) for _ in range(2)]
    probed = trace.probe(start, weights.name, scores)
    if probed is None or not all(np.isfinite(found).all() for found in probed):
        return None
    got = [weights.arrange(found) for found in probed]
    for turned in (False, True):
        laid = [np.exp(s.swapaxes(-1, -2) if turned else s).reshape(arranged) for s in scores]
        form = _form(laid, got)
        if form is not None:
            return Softmax(start, turned, *form)
    return None


def _form(raised: list[Array], got: list[Array]) -> tuple[Array | None, bool] | None:
    """(sink, whether keys are hidden) for two sets of exponentials and what became of them; None for no softmax."""
    whole = [e / e.sum(-1, keepdims=True) for e in raised]
    if all(close(p, w) for p, w in zip(got, whole, strict=True)):
        return None, False
    seen = (got[0] > 0) & (got[1] > 0)
    if not seen.all():
        shares = [np.where(seen, e, 0.0) for e in raised]
        shares = [s / np.maximum(s.sum(-1, keepdims=True), 1e-300) for s in shares]
        kept = [np.where(seen, w, 0.0) for w in whole]
        for expected in (shares, kept):
            if seen.any() and all(close(p, e, 1e-8) for p, e in zip(got, expected, strict=True)):
                return None, True
        return None
    totals = [p.sum(-1, keepdims=True) for p in got]
    if not all(close(p, t * w) for p, t, w in zip(got, totals, whole, strict=True)):
        return None
    rests = [e.sum(-1, keepdims=True) * (1.0 / t - 1.0) for e, t in zip(raised, totals, strict=True)]
    if not (rests[0] > 0).all() or not close(rests[0], rests[1], 1e-8):
        return None
    return np.log(rests[0]), False


def _sums_to_one(weights: Array) -> bool:
    totals = np.nan_to_num(weights).sum(-1)
    return close(np.where(totals == 0.0, 1.0, totals), np.ones_like(totals), 1e-8)

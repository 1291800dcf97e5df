"""Sites of attention that is not understood in full: operands, heads and dims are known, and why no more is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from rewriter.attention.anchors import Surroundings, exponent
from rewriter.attention.cores import Core, assemble, raise_operands, values_product
from rewriter.attention.operands import Operand, Product, matrix_product
from rewriter.attention.readers import Reader
from rewriter.attention.scores import tidy
from rewriter.attention.trace import Trace, outputs_of
from rewriter.core.refusal import Refusal, Refused
from rewriter.core.site import AttentionSite, ScoreBias, State

UNMAPPED = frozenset(("head-mixing",))  # heads of weights are no heads of probabilities


def rough_site(trace: Trace, around: Surroundings, why: Refusal) -> AttentionSite | None:
    """The site with `why` as its problem, if exactly one product before the softmax can be that of queries and keys."""
    fitting = []
    for term in around.terms:
        for reader in around.readers:
            try:
                fitting.append(_site(trace, around, term, reader, why))
            except Refused:
                continue
    known = [sum(p.mapped for p in (site.query, site.key, site.value)) for site in fitting]
    best = [site for site, count in zip(fitting, known, strict=True) if count == max(known)]
    return best[0] if len(best) == 1 else None


def _site(trace: Trace, around: Surroundings, term: ir.Node, reader: Reader, why: Refusal) -> AttentionSite:
    product = matrix_product(trace, term)
    query, key = _queries_and_keys(trace, product)
    value, context = values_product(trace, reader)
    _check_lengths(trace, query, key, value, context)
    raised = raise_operands(trace, query, key, value)
    core = Core(
        query,
        key,
        value,
        context,
        _slope(trace, product, around),
        0.0,
        ScoreBias(),
        None,
        "nan",
        outputs_of(around.node)[0],
        (term, around.node, reader.node),
        (),
        problems=(why,),
    )
    site = assemble(trace, core, raised)
    return replace(site, state=State.FOUND) if why.code in UNMAPPED else site


def _queries_and_keys(trace: Trace, product: Product) -> tuple[Operand, Operand]:
    rank = len(product.result.axes)
    if product.result.axes == (*range(rank - 2), rank - 1, rank - 2):
        return product.right, product.left
    if product.result.axes != tuple(range(rank)):
        raise Refused("product-form", "the product of queries and keys is permuted")
    return product.left, product.right


def _check_lengths(trace: Trace, query: Operand, key: Operand, value: Operand, context: Operand) -> None:
    tokens = [operand.arrange(trace.value(operand.name)).shape[-2] for operand in (query, key, value, context)]
    if (tokens[0], tokens[1]) != (tokens[3], tokens[2]):
        raise Refused("lengths", "queries, keys and values do not fit together")


def _slope(trace: Trace, product: Product, around: Surroundings) -> float:
    """What one entry of the product does to its own score, where that is the same for all; 1 otherwise."""
    name, scores = product.result.name, around.node.inputs[exponent(around.node)]
    assert scores is not None
    shape = trace.shape(name)
    if around.mixers or trace.size(str(scores.name)) != trace.size(name):
        return 1.0
    random = np.random.default_rng(0).standard_normal(shape)
    probed = trace.probe(name, str(scores.name), [0 * random, 1e-3 * random])
    if probed is None or probed[0].shape != shape:
        return 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        slopes = (probed[1] - probed[0]) / (1e-3 * random)
    usual = slopes[np.isfinite(slopes) & (slopes != 0)]
    slope = float(np.median(usual)) if usual.size else 1.0
    return tidy(slope) if usual.size and np.abs(usual - slope).max() < 1e-6 * abs(slope) else 1.0

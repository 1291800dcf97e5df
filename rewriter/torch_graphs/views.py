"""Views, slices and sizes of ONNX, written on fx proxies: what lies around composites and changes no number."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from rewriter.core.refusal import Refused
from rewriter.torch_graphs.glue import Scope, attribute, given, operand, rank_of, writes
from rewriter.torch_graphs.terms import Constant, Size, Sizes, Term, integers

LAST = 2**62  # ends beyond are "to the end"


@writes("Shape")
def shape(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """The sizes of a tensor."""
    rank, tensor = rank_of(scope, node), scope.tensor(given(terms[0]))
    start, end = attribute(node, "start", 0), attribute(node, "end", rank)
    return Sizes(tuple(tensor.size(axis) for axis in range(rank)[start:end]))


@writes("Concat")
def concat(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Tensors along an axis; vectors of sizes one after the other."""
    parts = [given(term) for term in terms]
    vectors = [part for part in parts if isinstance(part, Sizes)]
    if len(vectors) == len(parts):
        return Sizes(tuple(item for part in vectors for item in part.items))
    return scope.call(torch.cat, [scope.tensor(part) for part in parts], attribute(node, "axis"))


@writes("Split")
def split(scope: Scope, node: ir.Node, terms: list[Term | None]) -> list[Term]:
    """Parts of given lengths along an axis."""
    parts = scope.call(torch.split, scope.tensor(given(terms[0])), integers(terms[1]), attribute(node, "axis", 0))
    return [parts[index] for index in range(len(node.outputs))]


@writes("Squeeze", "Unsqueeze")
def axes(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Axes of length one, taken or given."""
    axes_given = integers(terms[1]) if len(terms) > 1 else [int(axis) for axis in attribute(node, "axes", ())]
    first = given(terms[0])
    if isinstance(first, Sizes):
        if len(first.items) != 1:
            raise Refused("fx-form", "a vector of sizes becomes a matrix")
        return Sizes(first.items, node.op_type == "Squeeze")
    tensor, rank = scope.tensor(first), scope.rank(str(node.outputs[0].name))
    if node.op_type == "Squeeze":
        return tensor.squeeze(tuple(axes_given)) if axes_given else tensor.squeeze()
    for axis in sorted(axis % rank for axis in axes_given):
        tensor = tensor.unsqueeze(axis)
    return tensor


@writes("Reshape")
def reshape(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """To sizes, of which 0 copies an axis and -1 is what is left."""
    first = given(terms[0])
    sizes = _sizes(terms[1])
    if isinstance(first, Sizes):
        return Sizes(first.items, not sizes)
    tensor, zero = scope.tensor(first), not attribute(node, "allowzero", 0)
    copied = [tensor.size(i) if zero and isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)]
    return tensor.reshape(copied)


@writes("Transpose")
def transpose(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Axes in another order."""
    order = attribute(node, "perm") or range(rank_of(scope, node))[::-1]
    return scope.tensor(given(terms[0])).permute([int(axis) for axis in order])


@writes("Expand")
def expand(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Broadcast in both directions."""
    sizes, first = _sizes(terms[1]), given(terms[0])
    if isinstance(first, Constant) and first.number is not None and len(sizes) >= first.array.ndim:
        dtype = scope.dtype(str(node.outputs[0].name))
        return scope.call(torch.full, sizes, first.number, dtype=dtype, device=scope.device())
    tensor, rank = scope.tensor(first), rank_of(scope, node)
    if len(sizes) < rank:
        raise Refused("fx-form", "a tensor is expanded to fewer axes than it has")
    extra = len(sizes) - rank
    kept = [-1 if isinstance(s, int) and s == 1 and place >= extra else s for place, s in enumerate(sizes)]
    return tensor.expand(kept)


@writes("Slice")
def cut(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """A part of every named axis."""
    first = given(terms[0])
    starts, ends = (_sizes(term) for term in terms[1:3])
    chosen = terms[3] if len(terms) > 3 else None
    named = integers(chosen) if chosen is not None else list(range(len(starts)))
    steps = integers(terms[4]) if len(terms) > 4 and terms[4] is not None else [1] * len(named)
    if any(step < 1 for step in steps):
        raise Refused("fx-form", "a slice runs backwards")
    bounds = zip(starts, [None if isinstance(e, int) and e > LAST else e for e in ends], steps, strict=True)
    pieces: list[Any] = [slice(*bound) for bound in bounds]
    if isinstance(first, Sizes):
        return Sizes(first.items[pieces[0]])
    tensor, rank = scope.tensor(first), rank_of(scope, node)
    index: list[Any] = [slice(None)] * rank
    for axis, piece in zip(named, pieces, strict=True):
        index[axis % rank] = piece
    return tensor[tuple(index)]


@writes("Trilu")
def triangle(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """The upper or lower triangle."""
    offset = integers(terms[1])[0] if len(terms) > 1 and terms[1] is not None else 0
    function = torch.triu if attribute(node, "upper", 1) else torch.tril
    return scope.call(function, scope.tensor(given(terms[0])), offset)


@writes("Gather")
def gather(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Places along an axis."""
    first, axis = given(terms[0]), int(attribute(node, "axis", 0))
    if isinstance(first, Sizes):
        picked = tuple(first.items[place] for place in integers(terms[1]))
        return Sizes(picked, isinstance(terms[1], Sizes) and terms[1].scalar)
    tensor = scope.tensor(first)
    axis %= rank_of(scope, node)
    if isinstance(terms[1], Sizes) and terms[1].scalar:
        return tensor.select(axis, terms[1].items[0])
    lead = (slice(None),) * axis
    if isinstance(terms[1], Sizes):
        return tensor[(*lead, list(terms[1].items))]
    return tensor[(*lead, scope.tensor(given(terms[1])))]


@writes("Range")
def arange(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """Numbers in even steps."""
    bounds = [operand(scope, term) for term in terms]
    return scope.call(torch.arange, *bounds, device=scope.device())


@writes("ConstantOfShape")
def filled(scope: Scope, node: ir.Node, terms: list[Term | None]) -> Term:
    """One number everywhere."""
    value = attribute(node, "value")
    number = 0.0 if value is None else value.numpy().reshape(-1)[0].item()
    dtype = scope.dtype(str(node.outputs[0].name))
    return scope.call(torch.full, _sizes(terms[0]), number, dtype=dtype, device=scope.device())


def _sizes(term: Term | None) -> list[Size]:
    if not isinstance(term, Sizes):
        raise Refused("fx-form", "sizes are computed from data")
    return list(term.items)

"""Feed-forward blocks: linear, one element-wise function (maybe times a second linear), linear."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from rewriter.attention.activations import elementwise, name_of
from rewriter.attention.linears import Linear, read_linear
from rewriter.attention.recipes import stored
from rewriter.attention.trace import SHAPES, VIEWS, Trace, inputs_of, label, outputs_of
from rewriter.attention.views import view_between
from rewriter.core.refusal import Refused
from rewriter.core.site import Array, FeedForwardSite

POINTWISE = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Sqrt",
        "Erf",
        "Tanh",
        "Sigmoid",
        "Relu",
        "Gelu",
        "Elu",
        "Selu",
        "Celu",
        "LeakyRelu",
        "Softplus",
        "Softsign",
        "HardSigmoid",
        "HardSwish",
        "Swish",
        "Mish",
        "Abs",
        "Neg",
        "Exp",
        "Min",
        "Max",
        "Clip",
        "Where",
        "Cast",
        "Identity",
        "Dropout",
        "FastGelu",
        "QuickGelu",
        "BiasGelu",
        "Reciprocal",
        "Sign",
        "ThresholdedRelu",
        "Sin",
        "Cos",
        "Log",
    ]
)
LIMIT = 60
BIASED = {"BiasGelu": "gelu", "FastGelu": "gelu_tanh"}


@dataclass(frozen=True)
class Branch:
    """One linear into the hidden width: the channels used, in hidden order, and the value where they are a view."""

    linear: Linear
    start: str
    weight_CF: Array
    bias_F: Array | None


def raise_feed_forward(trace: Trace, node: ir.Node) -> FeedForwardSite | None:
    """The block whose last linear is `node`; None if it ends no feed-forward block."""
    if node.op_type not in ("MatMul", "Gemm") or trace.linear(node) is None:
        return None
    ups = _linears_before(trace, inputs_of(node)[0])
    if not 1 <= len(ups) <= 2:
        return None
    try:
        down = read_linear(trace, node, batched=False)
        if down.channels_first:
            return None
        return _plain(trace, ups, down) or _gated(trace, ups, down)
    except Refused:
        return None


def _rows_linear(trace: Trace, node: ir.Node) -> Linear:
    linear = read_linear(trace, node, batched=None)
    if linear.channels_first:
        raise Refused("linear-form", "channels do not come last", (label(node),))
    return linear


def _linears_before(trace: Trace, hidden: str) -> list[ir.Node]:
    """Linear nodes that reach the hidden value by element-wise operators and views alone."""
    found: list[ir.Node] = []
    stack, seen = [hidden], set()
    while stack:
        name = stack.pop()
        node = trace.producer.get(name)
        if name in seen or name in trace.shaped or not trace.floating(name):
            continue
        seen.add(name)
        if node is not None and trace.linear(node):
            found.append(node)
        elif node is None or node.op_type not in POINTWISE | VIEWS or len(seen) > LIMIT:
            return []
        else:
            stack += trace.data_inputs(node)
    return list({id(node): node for node in found}.values())


def _plain(trace: Trace, ups: list[ir.Node], down: Linear) -> FeedForwardSite | None:
    if len(ups) != 1:
        return None
    hidden = inputs_of(down.node)[0]
    up = _rows_linear(trace, ups[0])
    fused = _with_bias_inside(trace, up, hidden, down)
    if fused is not None:
        return fused
    for start in reversed(_views(trace, up.result, hidden)):
        for end in _same_shape(trace, start, hidden):
            values = elementwise(trace, start, end)
            if values is None or not _only_reshaped(trace, end, hidden):
                continue
            branch = _branch(trace, up, start, down)
            activation = name_of(values)
            if activation == "identity" or not _private(trace, branch, (end,), hidden, down):
                return None
            return _site(trace, branch, None, down, activation, end)
    return None


def _with_bias_inside(trace: Trace, up: Linear, hidden: str, down: Linear) -> FeedForwardSite | None:
    """A block whose activation adds the bias itself (BiasGelu, FastGelu of com.microsoft)."""
    for start in reversed(_views(trace, up.result, hidden)):
        for node in trace.consumers[start]:
            name = BIASED.get(node.op_type, "") if node.domain == "com.microsoft" else ""
            names = inputs_of(node)
            if not name or len(names) < 2 or names[0] != start or names[1] not in trace.fixed:
                continue
            end, branch = outputs_of(node)[0], _branch(trace, up, start, down)
            if not _only_reshaped(trace, end, hidden) or not _private(trace, branch, (end,), hidden, down):
                return None
            bias_F = trace.value(names[1]) + (0.0 if branch.bias_F is None else branch.bias_F.astype(np.float64))
            whole = replace(branch, bias_F=stored(bias_F, up.dtype))
            site = _site(trace, whole, None, down, name, end)
            # the graph's own node would add the bias once more
            return None if site is None else replace(site, path_start="", path_end="")
    return None


def _gated(trace: Trace, ups: list[ir.Node], down: Linear) -> FeedForwardSite | None:
    hidden = inputs_of(down.node)[0]
    product = _product(trace, hidden)
    if product is None:
        return None
    first, second = (_gate_branch(trace, ups, name, down) for name in inputs_of(product))
    if first is None or second is None:
        return None
    if first[1] == "identity":
        first, second = second, first
    (branch, activation, end), (gate, other, _) = first, second
    if other != "identity" or branch.linear.source != gate.linear.source:
        return None
    ends = (*inputs_of(product), outputs_of(product)[0])
    if not _private(trace, branch, ends, hidden, down) or not _private(trace, gate, ends, hidden, down):
        return None
    return _site(trace, branch, gate, down, activation, end)


def _product(trace: Trace, hidden: str) -> ir.Node | None:
    node = trace.producer.get(hidden)
    while node is not None and node.op_type in ("Reshape", "Identity", "Cast", "Dropout", "Flatten"):
        node = trace.producer.get(inputs_of(node)[0])
    if node is None or node.op_type != "Mul" or any(name in trace.shaped for name in inputs_of(node)):
        return None
    return node


def _gate_branch(trace: Trace, ups: list[ir.Node], end: str, down: Linear) -> tuple[Branch, str, str] | None:
    """(branch, activation, end) of one factor of the gate product."""
    reached = _linears_before(trace, end)
    if len(reached) != 1 or all(reached[0] is not up for up in ups):
        return None
    linear = _rows_linear(trace, reached[0])
    for start in reversed(_views(trace, linear.result, end)):
        if start == end:
            return _branch(trace, linear, start, down), "identity", end
        values = elementwise(trace, start, end)
        if values is not None:
            return _branch(trace, linear, start, down), name_of(values), end
    return None


def _views(trace: Trace, source: str, target: str) -> list[str]:
    """Values on the way from source to target that are still views of source."""
    found = []
    for name in trace.dominators(source, target):
        if view_between(trace, source, name) is None:
            break
        found.append(name)
    return found


def _same_shape(trace: Trace, start: str, hidden: str) -> list[str]:
    chain = trace.dominators(start, hidden)[1:]
    return [name for name in reversed(chain) if trace.shape(name) == trace.shape(start)]


def _only_reshaped(trace: Trace, end: str, hidden: str) -> bool:
    """Whether the hidden value holds the same rows and channels as `end`."""
    view = view_between(trace, end, hidden)
    if view is None or view.factor != 1.0 or view.offset.any() or trace.shape(end)[-1] != trace.shape(hidden)[-1]:
        return False
    return bool(np.array_equal(view.element.reshape(-1), np.arange(view.element.size)))


def _branch(trace: Trace, linear: Linear, start: str, down: Linear) -> Branch:
    view = view_between(trace, linear.result, start)
    width = down.weight_CN.shape[0]
    if view is None or trace.shape(start)[-1] != width:
        raise Refused("hidden-width", "the hidden value is no view of the linear")
    channels = view.element.reshape(-1, width) % linear.weight_CN.shape[1]
    rows = view.element.reshape(-1, width) // linear.weight_CN.shape[1]
    offset = view.offset.reshape(-1, width)
    if not (channels == channels[:1]).all() or not (rows == np.arange(len(rows))[:, None]).all():
        raise Refused("hidden-layout", "channels or rows are reordered differently per token")
    if np.abs(offset - offset[:1]).max() > 1e-9 * max(1.0, float(np.abs(offset).max())):
        raise Refused("hidden-layout", "what is added differs between tokens")
    bias_F = offset[0]
    if linear.bias_N is not None:
        bias_F = bias_F + linear.bias_N[channels[0]] * view.factor
    weight_CF = linear.columns(channels[0], view.factor)
    return Branch(linear, start, weight_CF, stored(bias_F, linear.dtype) if bias_F.any() else None)


def _private(trace: Trace, branch: Branch, ends: tuple[str, ...], hidden: str, down: Linear) -> bool:
    """Whether nothing outside the block reads the hidden width after the branch's linear."""
    region = {id(down.node)}
    for end in (*ends, hidden):
        region |= {id(node) for node in trace.between(branch.start, end) or []}
        region |= {id(node) for node in trace.between(end, hidden) or []}
    stack, seen = [branch.start], set()
    while stack:
        name = stack.pop()
        if name in seen or name in (inputs_of(down.node)[1], down.result):
            continue
        seen.add(name)
        if name in trace.outputs:
            return False
        for node in trace.consumers[name]:
            if id(node) in region:
                stack += [] if node is down.node else outputs_of(node)
            elif node.op_type not in SHAPES:
                return False
    return True


def _site(
    trace: Trace, branch: Branch, gate: Branch | None, down: Linear, activation: str, end: str
) -> FeedForwardSite | None:
    shape = trace.shape(branch.linear.source)
    rank = len(trace.shape(down.result))
    if rank not in (2, len(shape)):
        return None
    linears = [branch.linear, *([gate.linear] if gate else []), down]
    names = {"up": branch.linear.weight_name, "down": down.weight_name}
    bias = None if down.bias_N is None or not down.bias_N.any() else stored(down.bias_N, down.dtype)
    return FeedForwardSite(
        id="",
        source=branch.linear.source,
        up_CF=branch.weight_CF,
        up_bias_F=branch.bias_F,
        down_FC=down.columns(np.arange(down.weight_CN.shape[1])),
        down_bias_C=bias,
        output=down.result,
        activation=activation,
        gate_CF=gate.weight_CF if gate else None,
        gate_bias_F=gate.bias_F if gate else None,
        path_start=branch.start,
        path_end=end,
        rank=rank,
        weight_names=names | ({"gate": gate.linear.weight_name} if gate else {}),
        nodes=tuple(dict.fromkeys(label(linear.node) for linear in linears)),
        example_shape=(shape[0], int(np.prod(shape[1:-1]))),
        order=trace.position(down.result),
    )

"""Writes a raised site anew: composites in place of a region, from the description alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from rewriter.attention.asides import write
from rewriter.attention.build import Builder
from rewriter.attention.element_types import as_computed
from rewriter.attention.emit_cache import read_past
from rewriter.attention.emit_linear import emit_linear_site, linear, read_source, write_output
from rewriter.attention.emit_packed import has_steps, packed_operands
from rewriter.attention.emit_window import near
from rewriter.attention.paths import Paths
from rewriter.core.errors import ModelError
from rewriter.core.refusal import Refused
from rewriter.core.site import (
    AttentionSite,
    FeedForwardSite,
    HeadNorm,
    LinearSite,
    Precision,
    Projection,
    Rotary,
    ScoreBias,
    Site,
)

PROBE = 1024.0  # moves scores that a mask of -1e9 was added to in single, and one of -1e4 in half precision


def emit(builder: Builder, paths: Callable[[], Paths], site: Site) -> None:
    """The nodes of one site; its result takes the graph's name of the old result. `paths` is asked for only if needed.

    Raises `Refused` if too little is known of the site, and `ModelError` if it belongs to another graph.
    """
    try:
        if isinstance(site, AttentionSite):
            _emit_attention(builder, paths, site)
        elif isinstance(site, LinearSite):
            emit_linear_site(builder, site)
        else:
            _emit_feed_forward(builder, paths, site)
    except ModelError as problem:
        raise ModelError(f"site {site.id!r} does not belong to this graph: {problem.what}", problem.hint) from problem


def _emit_attention(b: Builder, paths: Callable[[], Paths], site: AttentionSite) -> None:
    if site.output is None:
        raise Refused("no-output", "the output projection is not known", site.nodes)
    write(b, site.before)
    packed = packed_operands(b, site)
    query, key, value = (
        _operand(b, projection, role, site.precision, packed.get(role, ""))
        for projection, role in ((site.query, "query"), (site.key, "key"), (site.value, "value"))
    )
    bias = _bias(b, paths, site, query, key)
    kept = _kept(b, paths, site, query, key) if site.bias.kept[1] else ""
    sink = "" if site.sink_H is None else b.constant(site.sink_H, "sink")
    inputs = [query, key, value, bias, kept, sink]
    while not inputs[-1]:
        inputs.pop()
    attributes: dict[str, int | list[int]] = {}
    for role, projection in (("query", site.query), ("key", site.key), ("value", site.value)):
        attributes[f"{role}_heads"] = projection.heads
        attributes[f"{role}_head_of"] = list(projection.head_of)
    b.composite(
        "Attention",
        *inputs,
        output=f"{site.id}/features",
        heads=site.heads,
        scale=float(site.scale),
        softcap=float(site.softcap),
        bias_kind=_bias_kind(site.bias),
        empty_rows=site.empty_rows,
        **attributes,
        **({"window": site.bias.window, "sinks": site.bias.sinks} if site.bias.window else {}),
        **({} if site.precision == "fp32" else {"precision": "bf16"}),
        **({"causal": causal} if (causal := _causality(site)) else {}),
        **({"forms": list(site.forms)} if site.forms else {}),
    )
    b.declare(f"{site.id}/features", None, None, site.heads * site.v_dim)
    write_output(b, site.output, f"{site.id}/features", site.precision)
    write(b, site.after)


def _causality(site: AttentionSite) -> str:
    """What kernels that hide later keys by themselves may rely on: that, and as many queries as keys."""
    bias = site.bias
    if site.cross or site.cached:
        return ""
    if bias.kind == "causal" and not bias.also_causal and not bias.padding and not bias.window:
        return "only"
    return "also" if site.causal and not bias.nothing else ""


def _bias_kind(bias: ScoreBias) -> str:
    if bias.nothing:
        return "none"
    alone = not bias.also_causal and not bias.padding and not bias.window
    return "bool" if alone and bias.kind in ("bool", "causal") else "add"


def _operand(b: Builder, projection: Projection, role: str, precision: Precision, packed: str = "") -> str:
    """One operand as attention reads it; `packed` is its projection where one product made several."""
    if projection.opaque:
        kind, order = ("Transpose", {"perm": [0, 1, 3, 2]}) if projection.opaque_transposed else ("Identity", {})
        name = b.op(kind, projection.opaque, output=f"{b.prefix}/{role}", **order)
        return b.declare(name, None, projection.opaque_heads, None, projection.opaque_dim)
    weight = projection.weight_CGD
    assert weight is not None
    width, heads, dim = weight.shape
    if packed:
        b.declare(packed, None, None, heads * dim)
        if not has_steps(projection):
            return packed
        return b.declare(_beyond_linear(b, projection, packed, heads, role), None, heads, None, dim)
    source = read_source(b, projection, width)
    inputs = [source, b.constant(weight.reshape(width, heads * dim), f"{role}.weight")]
    if projection.bias_GD is not None:
        inputs.append(b.constant(projection.bias_GD.reshape(-1), f"{role}.bias"))
    if not has_steps(projection):
        return b.declare(linear(b, inputs, precision, f"{b.prefix}/{role}"), None, None, heads * dim)
    flat = b.declare(linear(b, inputs, precision), None, None, heads * dim)
    return b.declare(_beyond_linear(b, projection, flat, heads, role), None, heads, None, dim)


def _beyond_linear(b: Builder, projection: Projection, flat: str, heads: int, role: str) -> str:
    """Norm, rotation and cache, on (B, G, S, D); the last of them carries the role's name or the cache's."""
    cached = bool(projection.past or projection.present)
    moved = bool(projection.past or projection.places)
    final = projection.present if cached and not moved else "" if cached else f"{b.prefix}/{role}"
    if projection.norm is not None and projection.norm.across_heads:
        flat = _head_norm(b, projection.norm, flat, role, "")
        b.declare(flat, None, None, heads * projection.dim)
        projection = replace(projection, norm=None)
    norm, turn = projection.norm, projection.rotary
    value = b.composite("SplitHeads", flat, output="" if norm or turn else final, heads=heads)
    b.declare(value, None, heads, None, projection.dim)
    late = norm is not None and turn is not None and norm.after_rotation
    if norm is not None and not late:
        value = _head_norm(b, norm, value, role, "" if turn else final)
    if turn is not None:
        attributes = {"size": turn.size, "interleaved": int(turn.interleaved), "sign": turn.sign}
        tables = [_table(b, name, turn) for name in (turn.cos, turn.sin)]
        value = b.composite("Rotary", value, *tables, output="" if late else final, **attributes)
        b.declare(value, None, heads, None, projection.dim)
    if norm is not None and late:
        value = _head_norm(b, norm, value, role, final)
    if projection.past:
        past, joined = read_past(b, projection), "" if projection.places else projection.present
        value = b.op("Concat", past, value, output=joined, axis=2)
    return _placed(b, projection, value) if projection.places else value


def _placed(b: Builder, projection: Projection, joined: str) -> str:
    """Each place of the cache takes the token it numbers, or zeros."""
    places = b.unsqueeze(projection.places, 1, 3)
    none = b.op("Less", places, b.constant(np.array(0, np.int64)))
    batch, tokens = b.size_of(joined, 0), b.size_of(projection.places, 1)
    shape = b.joined([batch, b.ints(projection.heads), tokens, b.ints(projection.dim)])
    index = b.op("Expand", b.op("Where", none, b.constant(np.array(0, np.int64)), places), shape)
    picked = b.op("GatherElements", joined, index, axis=2)
    return b.op("Where", none, b.constant(np.zeros(())), picked, output=projection.present)


def _head_norm(b: Builder, norm: HeadNorm, value: str, role: str, output: str) -> str:
    if norm.per_head:
        one = replace(norm, gain_D=np.ones(norm.gain_D.shape[-1], norm.gain_D.dtype), bias_D=None)
        value = b.declare(_head_norm(b, one, value, role, ""), None, norm.gain_D.shape[0], None, norm.gain_D.shape[1])
        gain = b.constant(norm.gain_D[:, None], f"{role}.gains")
        if norm.bias_D is None:
            return b.op("Mul", value, gain, output=output)
        return b.op("Add", b.op("Mul", value, gain), b.constant(norm.bias_D[:, None], f"{role}.biases"), output=output)
    inputs = [value, b.constant(norm.gain_D.reshape(-1), f"{role}.gain")]
    if norm.bias_D is not None:
        inputs.append(b.constant(norm.bias_D.reshape(-1), f"{role}.norm_bias"))
    return b.composite("HeadNorm", *inputs, output=output, kind=norm.kind, epsilon=float(norm.epsilon))


def _table(b: Builder, name: str, turn: Rotary) -> str:
    """A rotary table as (B or 1, G or 1, S, size), by the steps of its form."""
    for step in turn.table_form:
        if step == "heads":
            name = b.unsqueeze(name, 1)
        elif step == "swap":
            name = b.op("Transpose", name, perm=[0, 2, 1, 3])
        elif turn.interleaved:
            twice = b.op("Concat", *[b.unsqueeze(name, -1)] * 2, axis=-1)
            lead = b.op("Slice", b.op("Shape", name), b.ints(0), b.ints(-1))
            name = b.op("Reshape", twice, b.joined([lead, b.ints(-1)]))
        else:
            name = b.op("Concat", name, name, axis=-1)
    return _kept_columns(b, name, turn) if turn.keep else name


def _kept_columns(b: Builder, table: str, turn: Rotary) -> str:
    """The columns of frequency pairs that stay: one set for all heads, or one per head as (B or 1, G, S, size)."""
    if len(set(turn.keep)) == 1:
        return b.op("Gather", table, b.ints(*turn.keep[0]), axis=-1)
    every = b.op("Gather", table, b.ints(*(column for kept in turn.keep for column in kept)), axis=-1)
    apart = b.op("Reshape", every, b.ints(0, 0, 0, len(turn.keep), turn.size))
    return b.op("Reshape", b.op("Transpose", apart, perm=[0, 3, 2, 1, 4]), b.ints(0, 0, 0, turn.size))


def _bias(
    b: Builder, paths: Callable[[], Paths], site: AttentionSite, query: str, key: str, inner: bool = False
) -> str:
    bias, output = site.bias, "" if inner else f"{site.id}/bias"
    if bias.nothing:
        return ""
    if bias.window:
        return _windowed(b, paths, site, query, key)
    if bias.kind == "causal":
        return _causal(b, site, query, key, "start", output)
    parts = [] if bias.kind == "none" else [_base_bias(b, paths, site, query, key)]
    if not bias.also_causal and not bias.padding:
        return as_computed(b, parts[0], output)
    parts = [_hidden(b, parts[0], -np.inf)] if bias.kind == "bool" else [as_computed(b, part) for part in parts]
    if bias.also_causal:
        parts.append(_hidden(b, _causal(b, site, query, key, bias.also_causal, ""), -np.inf))
    if bias.padding:
        valid = b.unsqueeze(b.op("Cast", bias.padding, to=9), 1, 2)
        parts.append(_hidden(b, valid, bias.padding_fill))
    return b.op("Sum", *parts, output=output)


def _windowed(b: Builder, paths: Callable[[], Paths], site: AttentionSite, query: str, key: str) -> str:
    """What else is added, and a number that hides keys far away: a finite one, so that no row loses its last key."""
    bare = replace(site, bias=replace(site.bias, window=0, sinks=0))
    added = _bias(b, paths, bare, query, key, inner=True)
    if _bias_kind(bare.bias) == "bool":
        added = _hidden(b, added, -np.inf)
    sizes = [b.op("Squeeze", b.size_of(n, _token_axis(p))) for n, p in ((query, site.query), (key, site.key))]
    far = _hidden(b, near(b, site.bias, *sizes), max(-1e9, b.lowest / 2))
    output = f"{site.id}/bias"
    return b.op("Add", added, far, output=output) if added else b.op("Identity", far, output=output)


def _hidden(b: Builder, allowed: str, fill: float) -> str:
    """Zero where attending is allowed, `fill` elsewhere."""
    return b.op("Where", allowed, b.constant(np.zeros(())), b.constant(np.array(fill)))


def _base_bias(b: Builder, paths: Callable[[], Paths], site: AttentionSite, query: str, key: str) -> str:
    bias = site.bias
    name = bias.value
    if bias.kind == "fill":
        # so low that adding it replaces the score, whatever the graph's own number is
        low = b.constant(np.array(-np.inf if bias.infinite else b.lowest))
        pair = (low, b.constant(np.zeros(()))) if bias.filled_by else (b.constant(np.zeros(())), low)
        name = b.op("Where", name, *pair)
    if bias.kind == "path":
        zero = _zeros(b, site, query, key)
        renamed = {bias.value: zero}
        b.copy(paths().between(bias.value, bias.path_end) or [], renamed)
        name = renamed[bias.path_end]
    name = b.op("Log", name) if bias.logarithm else name
    return _by_heads(b, bias, name)


def _kept(b: Builder, paths: Callable[[], Paths], site: AttentionSite, query: str, key: str) -> str:
    """True where the scores move with the product: what another number than zero in its place changes."""
    start, end = site.bias.kept
    ends = []
    zeros = _zeros(b, replace(site, bias=replace(site.bias, full_shape=True)), query, key)
    for product in (zeros, b.op("Add", zeros, b.constant(np.array(PROBE)))):
        renamed = {start: product}
        b.copy(paths().between(start, end) or [], renamed)
        ends.append(renamed[end])
    return b.op("Not", b.op("Equal", *(_by_heads(b, site.bias, name) for name in ends)), output=f"{site.id}/kept")


def _by_heads(b: Builder, bias: ScoreBias, name: str) -> str:
    """What is added to the scores, with an axis for heads."""
    if bias.lead:
        shape = b.op("Shape", name)
        rest = b.op("Slice", shape, b.ints(1 + len(bias.lead)), b.ints(3 + len(bias.lead)))
        first = b.op("Slice", shape, b.ints(0), b.ints(1))
        name = b.op("Reshape", name, b.joined([first, b.ints(bias.heads_axis), rest]))
    if bias.folded:
        lengths = b.op("Slice", b.op("Shape", name), b.ints(1), b.ints(3))
        name = b.op("Reshape", name, b.joined([b.ints(-1, bias.heads_axis), lengths]))
    if bias.keep is not None and bias.heads_axis > 1:
        name = b.op("Gather", name, b.ints(*bias.keep), axis=-3)
    return name


def _causal(b: Builder, site: AttentionSite, query: str, key: str, aligned: str, output: str) -> str:
    """(1, 1, S, T), True where the key comes no later than the query, counted from the start or from the end."""
    zero, one = b.constant(np.array(0, np.int64)), b.constant(np.array(1, np.int64))
    sizes = [b.op("Squeeze", b.size_of(n, _token_axis(p))) for n, p in ((query, site.query), (key, site.key))]
    steps = [b.op("Range", zero, length, one) for length in sizes]
    if aligned == "end":
        steps[0] = b.op("Add", steps[0], b.op("Sub", sizes[1], sizes[0]))
    later = b.op("Less", b.unsqueeze(steps[0], 1), b.unsqueeze(steps[1], 0))
    return b.op("Identity", b.unsqueeze(b.op("Not", later), 0, 1), output=output)


def _zeros(b: Builder, site: AttentionSite, query: str, key: str) -> str:
    """Zeros in place of the content product: one number, or its full shape where the path reshapes it."""
    bias = site.bias
    if not bias.full_shape:
        return b.constant(np.zeros((1,) * bias.product_rank))
    batch, rows = b.size_of(query, 0), b.size_of(query, _token_axis(site.query))
    columns = b.size_of(key, _token_axis(site.key))
    shape = b.joined([batch, b.ints(bias.heads_axis), rows, columns])
    full = b.op("Expand", b.constant(np.zeros(())), shape)
    if bias.lead:
        return b.op("Reshape", full, b.joined([batch, b.ints(*bias.lead), rows, columns]))
    if bias.product_rank == 3:
        full = b.op("Reshape", full, b.joined([b.ints(-1), rows, columns]))
    return full


def _token_axis(projection: Projection) -> int:
    if projection.opaque:
        return 2
    return 2 if has_steps(projection) else 1


def _emit_feed_forward(b: Builder, paths: Callable[[], Paths], site: FeedForwardSite) -> None:
    named = site.activation != "path"
    activation = site.activation if named and site.activation != "identity" else ""
    up = [site.source, b.constant(site.up_CF, "up.weight")]
    if site.up_bias_F is not None:
        up.append(b.constant(site.up_bias_F, "up.bias"))
    gated = site.gate_CF is not None
    hidden = f"{site.id}/hidden"
    acted = linear(b, up, site.precision, hidden if named and not gated else "", activation=activation)
    if site.rank == 3:
        b.declare(acted, None, None, site.width)
    if not named:
        renamed = {site.path_start: acted}
        b.copy(paths().between(site.path_start, site.path_end) or [], renamed)
        acted = renamed[site.path_end]
        if not gated:
            acted = b.op("Identity", acted, output=hidden)
    if site.gate_CF is not None:
        gate = [site.source, b.constant(site.gate_CF, "gate.weight")]
        if site.gate_bias_F is not None:
            gate.append(b.constant(site.gate_bias_F, "gate.bias"))
        b.op("Mul", acted, linear(b, gate, site.precision), output=hidden)
    down = [hidden, b.constant(site.down_FC, "down.weight")]
    if site.down_bias_C is not None:
        down.append(b.constant(site.down_bias_C, "down.bias"))
    if site.rank != 2:
        linear(b, down, site.precision, site.output)
        return
    b.op("Reshape", linear(b, down, site.precision), b.ints(-1, site.down_FC.shape[1]), output=site.output)

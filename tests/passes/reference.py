"""A site evaluated in float64 numpy straight from its definition, and seeded sites to evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewriter.core.rewrite import output_weights
from rewriter.core.site import (
    AttentionSite,
    FeedForwardSite,
    HeadNorm,
    LinearSite,
    OutputProjection,
    Projection,
    Rotary,
    ScoreBias,
    Site,
    State,
)
from rewriter.core.statistics import SINKS, AttentionStatistics, FeedForwardStatistics, Regression, Statistics
from rewriter.core.target import Target

Float = NDArray[np.float64]
Values = Mapping[str, NDArray[np.generic]]

TARGET = Target("llvm", "test", "generic", "x86_64", 2, 1, 8, 16, 32768, 1 << 20, 1 << 25)


@dataclass(frozen=True)
class Case:
    """A site with the graph values it refers to; `valid_BS` says which tokens are no padding."""

    site: Site
    values: Values
    valid_BS: NDArray[np.bool_]


def features(site: Site, values: Values) -> Float:
    """The input of the output projection, (B, S, F)."""
    if isinstance(site, FeedForwardSite):
        return _hidden(site, values)
    if isinstance(site, LinearSite):
        return _inner(site, values)
    value = operand(site.value, values, site.precision)[:, list(site.value.head_of)]
    mixed = np.einsum("bhst,bhtd->bshd", probabilities(site, values), value)
    return mixed.reshape(*mixed.shape[:2], -1)


def probabilities(site: AttentionSite, values: Values) -> Float:
    """What every query makes of every key, (B, H, S, T)."""
    query, key = (operand(part, values, site.precision) for part in (site.query, site.key))
    query, key = query[:, list(site.query.head_of)], key[:, list(site.key.head_of)]
    logits = np.einsum("bhsd,bhtd->bhst", query, key) * site.scale
    if site.softcap:
        logits = site.softcap * np.tanh(logits / site.softcap)
    return _softmax(logits + score_bias(site, values, logits.shape), site.empty_rows)


def _inner(site: LinearSite, values: Values) -> Float:
    source = np.asarray(values[site.inner.source], np.float64)
    if not site.features:
        return source[..., :0]
    if site.inner.weight_CGD is None:
        return source
    weight = site.inner.weight_CGD.reshape(source.shape[-1], -1).astype(np.float64)
    bias = 0.0 if site.inner.bias_GD is None else site.inner.bias_GD.reshape(-1)
    return product(source, weight, site.precision) + bias


def output(site: Site, values: Values) -> Float:
    """The block's output, (B, S, C)."""
    weights = output_weights(site)
    return product(features(site, values), weights[:-1], site.precision) + weights[-1]


def product(x: Float, weight: Float, precision: str = "fp32") -> Float:
    """``x @ weight`` with operands rounded to a number format, sums exact."""
    if precision == "fp32" or not len(weight):
        return x @ weight
    if precision == "bf16":
        return _eight_bits(x) @ _eight_bits(weight)
    column = np.maximum(np.abs(weight).max(0, keepdims=True), 1e-30) / 127
    low = np.minimum(x.min(-1, keepdims=True), 0.0)
    token = np.maximum(np.maximum(x.max(-1, keepdims=True), 0.0) - low, 1e-30) / 254
    zero = np.rint(-low / token)
    return (np.rint(x / token + zero) - zero) @ np.rint(weight / column) * token * column


def _eight_bits(x: Float) -> Float:
    """Rounded to 8 bits of mantissa, ties to even: bfloat16 without its limits of range."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def operand(part: Projection, values: Values, precision: str = "fp32") -> Float:
    """One operand of the attention, (B, G, S, D)."""
    assert part.weight_CGD is not None
    source = np.asarray(values[part.source], np.float64)
    width, heads, dim = part.weight_CGD.shape
    flat = product(source, part.weight_CGD.reshape(width, -1).astype(np.float64), precision)
    result = flat.reshape(*flat.shape[:2], heads, dim).transpose(0, 2, 1, 3)
    if part.bias_GD is not None:
        result = result + part.bias_GD.astype(np.float64)[:, None, :]
    if part.norm is not None:
        result = _norm(result, part.norm)
    return result if part.rotary is None else _rotate(result, part.rotary, values)


def score_bias(site: AttentionSite, values: Values, shape: tuple[int, ...]) -> Float:
    """What is added to the scores, broadcast to (B, H, S, T)."""
    far = _window(site.bias.window, site.bias.sinks, shape) if site.bias.window else np.zeros(shape)
    if site.bias.kind == "none":
        return far
    raw = np.asarray(values[site.bias.value])
    added = np.where(raw, 0.0, -np.inf) if site.bias.kind == "bool" else raw.astype(np.float64)
    if site.bias.keep is not None:
        added = added[:, list(site.bias.keep)]
    return np.broadcast_to(added, shape) + far


def _window(window: int, sinks: int, shape: tuple[int, ...]) -> Float:
    """Very low where a key is `window` or more tokens away and no sink."""
    queries, keys = np.arange(shape[2])[:, None], np.arange(shape[3])[None]
    hidden = (np.abs(queries - keys) >= window) & (keys >= sinks)
    return np.broadcast_to(np.where(hidden, -1e9, 0.0), shape)


def statistics(site: Site, case: Case, target_BSC: Float | None = None) -> Statistics:
    """Statistics of a site on a case; the target is the site's own output unless given."""
    rows = features(site, case.values)[case.valid_BS]
    target = (output(case.site, case.values) if target_BSC is None else target_BSC)[case.valid_BS]
    regression = regress(rows, target)
    if not isinstance(site, AttentionSite):
        return FeedForwardStatistics(regression)
    query = operand(site.query, case.values)[:, list(site.query.head_of)].transpose(1, 0, 2, 3)[:, case.valid_BS]
    assert isinstance(site, AttentionSite)
    key = centred_keys(site, case)
    flat = key.transpose(1, 0, 2).reshape(key.shape[1], -1)
    return AttentionStatistics(
        query.transpose(0, 2, 1) @ query,
        key.transpose(0, 2, 1) @ key,
        regression,
        source=regress(np.asarray(case.values[site.query.source], np.float64)[case.valid_BS], target),
        products_HDD=_products(site, case),
        joint_key=flat.T @ flat,
        mixed_HKK=_mixed(site, case),
        distance_HT=_distance(site, case),
    )


def _products(site: AttentionSite, case: Case) -> Float:
    """Sum over sequences of Gram of queries times Gram of centred keys, entry by entry."""
    query = operand(site.query, case.values)[:, list(site.query.head_of)]
    key, total = operand(site.key, case.values)[:, list(site.key.head_of)], np.zeros((site.heads, *2 * [site.qk_dim]))
    for row, valid in enumerate(case.valid_BS):
        q, k = query[row][:, valid], key[row][:, valid]
        k = k - k.mean(axis=1, keepdims=True)
        total += np.einsum("hsd,hse->hde", q, q) * np.einsum("hsd,hse->hde", k, k)
    return total


def _mixed(site: AttentionSite, case: Case) -> Float:
    value = operand(site.value, case.values).transpose(0, 2, 1, 3)
    flat = value.reshape(*value.shape[:2], -1)
    mixed = np.einsum("bhst,btk->hbsk", probabilities(site, case.values), flat)[:, case.valid_BS]
    return np.asarray(mixed.transpose(0, 2, 1) @ mixed)


def _distance(site: AttentionSite, case: Case) -> Float:
    weights = probabilities(site, case.values).transpose(1, 0, 2, 3)[:, case.valid_BS]
    tokens = weights.shape[-1]
    position = np.broadcast_to(np.arange(case.valid_BS.shape[1]), case.valid_BS.shape)[case.valid_BS]
    apart = np.abs(position[:, None] - np.arange(tokens)[None])
    found = np.zeros((site.heads, tokens))
    for distance in range(tokens):
        picked = (apart == distance) & (np.arange(tokens)[None] >= SINKS)
        found[:, distance] = (weights * picked).sum(axis=(1, 2))
    return found / len(position)


def centred_keys(site: AttentionSite, case: Case) -> Float:
    """Keys minus their mean over the valid keys of their sequence, (G, valid tokens, D)."""
    key = operand(site.key, case.values)
    weight = case.valid_BS[:, None, :, None].astype(np.float64)
    mean = (key * weight).sum(axis=2, keepdims=True) / weight.sum(axis=2, keepdims=True)
    return (key - mean).transpose(1, 0, 2, 3)[:, case.valid_BS]


def regress(rows: Float, target: Float) -> Regression:
    """One-shot float64 statistics of ``[rows | 1] -> target``."""
    wide = np.hstack([rows, np.ones((len(rows), 1))])
    return Regression(wide.T @ wide, wide.T @ target, float(np.sum(target**2)), len(rows))


def relative_error(site: Site, case: Case) -> float:
    """``||rewritten - original||^2 / ||original - mean||^2`` over valid tokens."""
    before = output(case.site, case.values)[case.valid_BS]
    after = output(site, case.values)[case.valid_BS]
    return float(np.sum((after - before) ** 2) / np.sum((before - before.mean(axis=0)) ** 2))


def _softmax(logits: Float, empty_rows: str) -> Float:
    top = np.max(logits, axis=-1, keepdims=True)
    if empty_rows == "zero":
        top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(invalid="ignore"):
        raised = np.exp(logits - top)
    total = raised.sum(axis=-1, keepdims=True)
    return raised / np.where(total == 0.0, 1.0, total) if empty_rows == "zero" else raised / total


def _norm(x: Float, norm: HeadNorm) -> Float:
    centre = x.mean(axis=-1, keepdims=True) if norm.kind == "layer" else 0.0
    scale = np.sqrt(np.mean((x - centre) ** 2, axis=-1, keepdims=True) + norm.epsilon)
    return (x - centre) / scale * norm.gain_D + (0.0 if norm.bias_D is None else norm.bias_D)


def _rotate(x: Float, rotary: Rotary, values: Values) -> Float:
    turned, rest = x[..., : rotary.size], x[..., rotary.size :]
    if rotary.interleaved:
        other = np.stack([-turned[..., 1::2], turned[..., ::2]], axis=-1).reshape(turned.shape)
    else:
        half = rotary.size // 2
        other = np.concatenate([-turned[..., half:], turned[..., :half]], axis=-1)
    cos, sin = values[rotary.cos], values[rotary.sin]
    if rotary.keep:
        cos, sin = (np.stack([np.asarray(table)[..., list(kept)] for kept in rotary.keep]) for table in (cos, sin))
    return np.concatenate([turned * cos + rotary.sign * other * sin, rest], axis=-1)


def _hidden(site: FeedForwardSite, values: Values) -> Float:
    source = np.asarray(values[site.source], np.float64)
    up = product(source, site.up_CF.astype(np.float64), site.precision) + (
        0.0 if site.up_bias_F is None else site.up_bias_F
    )
    acts = {
        "relu": lambda x: np.maximum(x, 0.0),
        "silu": lambda x: x / (1.0 + np.exp(-x)),
        "tanh": np.tanh,
        "identity": lambda x: x,
    }
    hidden = acts[site.activation](up)
    if site.gate_CF is None:
        return hidden
    gate = product(source, site.gate_CF.astype(np.float64), site.precision)
    return hidden * (gate + (0.0 if site.gate_bias_F is None else site.gate_bias_F))


def correlated(rng: np.random.Generator, shape: tuple[int, ...]) -> Float:
    """Tokens whose channels share a few strong directions and have a mean, as activations do."""
    width = shape[-1]
    mixing = rng.normal(size=(width, width)) * (0.75 ** np.arange(width))[:, None]
    return rng.normal(size=shape) @ mixing + rng.normal(size=width)


def attention_case(
    seed: int,
    heads: int = 4,
    kv_heads: int = 4,
    dim: int = 8,
    width: int = 24,
    batch: int = 12,
    tokens: int = 14,
    mask: str = "padding",
    rotary: bool = False,
    norm: bool = False,
    softcap: float = 0.0,
    empty_rows: str = "nan",
    biases: bool = True,
    dtype: type = np.float64,
) -> Case:
    """A seeded attention over correlated tokens; heads partly repeat each other, as in trained models."""
    rng = np.random.default_rng(seed)
    values: dict[str, NDArray[np.generic]] = {"x": correlated(rng, (batch, tokens, width))}
    lengths = rng.integers(tokens // 2, tokens + 1, batch)
    valid = (
        np.arange(tokens)[None] < lengths[:, None] if mask in ("padding", "bool") else np.ones((batch, tokens), bool)
    )
    bias = _mask(mask, valid, heads, rng, values)
    turn = _tables(tokens, dim, values) if rotary else None

    def projection(count: int) -> Projection:
        shared = rng.normal(size=(width, 1, dim))
        weight = (0.6 * shared + 0.8 * rng.normal(size=(width, count, dim))) * 0.5 / np.sqrt(width)
        gain = rng.uniform(0.5, 1.5, dim).astype(dtype)
        return (
            Projection(
                source="x",
                weight_CGD=weight.astype(dtype),
                bias_GD=rng.normal(size=(count, dim)).astype(dtype) if biases else None,
                head_of=tuple(h * count // heads for h in range(heads)),
            )
            if not norm
            else Projection(
                source="x",
                weight_CGD=weight.astype(dtype),
                head_of=tuple(h * count // heads for h in range(heads)),
                norm=HeadNorm("rms", gain, None, 1e-6),
            )
        )

    query, key, value = projection(heads), projection(kv_heads), projection(kv_heads)
    if turn is not None:
        query, key = _with_rotary(query, turn), _with_rotary(key, turn)
    if norm:
        value = Projection(source="x", weight_CGD=value.weight_CGD, head_of=value.head_of)
    out = OutputProjection(
        "y",
        (rng.normal(size=(heads, dim, width)) / np.sqrt(heads * dim)).astype(dtype),
        rng.normal(size=width).astype(dtype) if biases else None,
    )
    site = AttentionSite(
        id="layers.0.attention",
        query=query,
        key=key,
        value=value,
        output=out,
        heads=heads,
        scale=1.0 / np.sqrt(dim),
        softcap=softcap,
        bias=bias,
        empty_rows="zero" if empty_rows == "zero" else "nan",
        state=State.LOWERABLE,
    )
    return Case(site, values, valid)


def _with_rotary(part: Projection, turn: Rotary) -> Projection:
    return Projection(
        source=part.source,
        weight_CGD=part.weight_CGD,
        bias_GD=part.bias_GD,
        head_of=part.head_of,
        norm=part.norm,
        rotary=turn,
    )


def _tables(tokens: int, dim: int, values: dict[str, NDArray[np.generic]]) -> Rotary:
    angles = np.arange(tokens)[:, None] * 10.0 ** (-np.arange(dim // 2) / 2.0)
    values["cos"], values["sin"] = (np.tile(f(angles), (1, 2)) for f in (np.cos, np.sin))
    return Rotary("cos", "sin", dim, interleaved=False)


def _mask(
    kind: str, valid: NDArray[np.bool_], heads: int, rng: np.random.Generator, values: dict[str, NDArray[np.generic]]
) -> ScoreBias:
    batch, tokens = valid.shape
    allowed = np.broadcast_to(valid[:, None, None, :], (batch, 1, tokens, tokens))
    if kind == "none":
        return ScoreBias()
    if kind == "bool":
        values["mask"] = allowed
        return ScoreBias("bool", "mask")
    if kind == "empty":
        values["mask"] = np.where(rng.random((batch, 1, tokens, 1)) < 0.3, -np.inf, np.zeros((1, 1, 1, tokens)))
    elif kind == "heads":
        values["mask"] = rng.normal(size=(1, heads, tokens, tokens))
        return ScoreBias("value", "mask", heads_axis=heads)
    elif kind == "causal":
        values["mask"] = np.where(np.tril(np.ones((tokens, tokens), bool)), 0.0, -np.inf)[None, None]
    else:
        values["mask"] = np.where(allowed, 0.0, -3.4e38)
    return ScoreBias("value", "mask")


def hostile(case: Case, tokens: int, seed: int = 0) -> list[Values]:
    """The values of a case at another length, under masks that models meet: padding on either side, holes, lengths that
    differ in one batch, a row that sees nothing. Only the masks' values change, never their kind."""
    rng = np.random.default_rng(seed)
    batch, width = 3, case.values["x"].shape[-1]
    allowed = np.ones((4, batch, 1, tokens, tokens), bool)
    allowed[0, :, :, :, : tokens // 2] = False
    allowed[1, :, :, :, tokens - 2 :] = False
    allowed[2] = rng.random((batch, 1, 1, tokens)) < 0.5
    allowed[2, ..., 0] = True
    allowed[3] = np.arange(tokens) < rng.integers(1, tokens, batch)[:, None, None, None]
    allowed[3, 0, :, 1] = False
    found: list[Values] = []
    for one in allowed:
        values = {"x": correlated(rng, (batch, tokens, width))}
        if "cos" in case.values:
            _tables(tokens, case.values["cos"].shape[-1], values)
        mask = case.values.get("mask")
        if mask is not None:
            values["mask"] = one if mask.dtype == bool else np.where(one, 0.0, -np.inf)
        found.append(values)
    return found


def feed_forward_case(
    seed: int,
    hidden: int = 64,
    width: int = 16,
    gated: bool = False,
    activation: str = "relu",
    batch: int = 20,
    tokens: int = 16,
    dtype: type = np.float64,
) -> Case:
    """A seeded feed-forward over correlated tokens; some units are idle, as in trained models."""
    rng = np.random.default_rng(seed)
    spread = (0.97 ** np.arange(hidden))[rng.permutation(hidden)]
    site = FeedForwardSite(
        id="layers.0.feed_forward",
        source="x",
        up_CF=(rng.normal(size=(width, hidden)) / np.sqrt(width)).astype(dtype),
        up_bias_F=rng.normal(size=hidden).astype(dtype),
        down_FC=(rng.normal(size=(hidden, width)) * spread[:, None] / np.sqrt(hidden)).astype(dtype),
        down_bias_C=rng.normal(size=width).astype(dtype),
        output="y",
        activation=activation,
        gate_CF=(rng.normal(size=(width, hidden)) / np.sqrt(width)).astype(dtype) if gated else None,
        gate_bias_F=rng.normal(size=hidden).astype(dtype) if gated else None,
        state=State.LOWERABLE,
    )
    return Case(site, {"x": correlated(rng, (batch, tokens, width))}, np.ones((batch, tokens), bool))

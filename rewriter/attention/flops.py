"""What a site costs: floating-point operations (a multiply-add counts two) and parameters, by its shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rewriter.core.site import AttentionSite, FeedForwardSite, LinearSite, Projection, Site

TOKENS = 128  # the length at which costs and shares are stated


@dataclass(frozen=True)
class Cost:
    """Operations of one run and stored numbers. `core_flops` are those of Q K^T and P V alone."""

    flops: int
    core_flops: int
    parameters: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.core_flops + other.core_flops, self.parameters + other.parameters)


def core_flops(batch: int, queries: int, keys: int, heads: int, qk_dim: int, v_dim: int) -> int:
    """Operations of Q K^T and P V: ``2 B S T H (D_qk + D_v)``. H times D is the model width: heads are counted once."""
    return 2 * batch * queries * keys * heads * (qk_dim + v_dim)


def cost(site: Site, batch: int, queries: int, keys: int | None = None) -> Cost:
    """Cost of a site for a batch of `queries` tokens that attend to `keys` (default: as many). Biases are not counted
    as operations; softmax, norms and element-wise functions neither."""
    if isinstance(site, FeedForwardSite):
        return _feed_forward(site, batch * queries)
    if isinstance(site, LinearSite):
        return _linear(site, batch * queries)
    return _attention(site, batch, queries, queries if keys is None else keys)


def _attention(site: AttentionSite, batch: int, queries: int, keys: int) -> Cost:
    core = core_flops(batch, queries, keys, site.heads, site.qk_dim, site.v_dim)
    flops = core
    parameters = 0
    for projection, tokens in ((site.query, queries), (site.key, keys), (site.value, keys)):
        flops += 2 * batch * tokens * _weights(projection)
        parameters += _weights(projection) + (0 if projection.bias_GD is None else projection.bias_GD.size)
    if site.output is not None and not site.output.bare:
        flops += 2 * batch * queries * site.output.weight_HDC.size
        parameters += site.output.weight_HDC.size + (0 if site.output.bias_C is None else site.output.bias_C.size)
    return Cost(flops, core, parameters)


def _linear(site: LinearSite, tokens: int) -> Cost:
    weights = _weights(site.inner) + site.output.weight_HDC.size
    biases = [bias for bias in (site.inner.bias_GD, site.output.bias_C) if bias is not None]
    return Cost(2 * tokens * weights, 0, weights + sum(int(bias.size) for bias in biases))


def _weights(projection: Projection) -> int:
    return 0 if projection.weight_CGD is None else int(projection.weight_CGD.size)


def _feed_forward(site: FeedForwardSite, tokens: int) -> Cost:
    matrices = [site.up_CF, site.down_FC] + ([] if site.gate_CF is None else [site.gate_CF])
    vectors = [v for v in (site.up_bias_F, site.gate_bias_F, site.down_bias_C) if v is not None]
    weights = sum(int(matrix.size) for matrix in matrices)
    return Cost(2 * tokens * weights, 0, weights + sum(int(vector.size) for vector in vectors))


def total(sites: Iterable[Site], batch: int, queries: int, keys: int | None = None) -> Cost:
    """The cost of several sites together."""
    result = Cost(0, 0, 0)
    for site in sites:
        result += cost(site, batch, queries, keys)
    return result


def site_flops(site: Site, batch: int = 1, queries: int = TOKENS, keys: int | None = None) -> int:
    """Operations of one run of a site, by default for one sequence of 128 tokens."""
    return cost(site, batch, queries, keys).flops

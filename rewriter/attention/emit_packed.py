"""Projections of one source as a single product that is split afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rewriter.attention.build import Builder
from rewriter.attention.emit_linear import linear, read_source
from rewriter.core.site import AttentionSite, Projection


def has_steps(projection: Projection) -> bool:
    """Whether something stands between the projection and attention, which then reads heads apart."""
    return bool(projection.norm or projection.rotary or projection.past or projection.present)


def packed_operands(b: Builder, site: AttentionSite) -> dict[str, str]:
    """Values (B, S, G*D) by role, for the roles that `site.packing` puts into one product."""
    parts = dict(_parts(site))
    if not parts:
        return {}
    first = next(iter(parts.values()))
    assert first.weight_CGD is not None
    width = first.weight_CGD.shape[0]
    weights = [part.weight_CGD.reshape(width, -1) for part in parts.values() if part.weight_CGD is not None]
    inputs = [read_source(b, first, width), b.constant(np.concatenate(weights, axis=1), f"{site.packing}.weight")]
    if any(part.bias_GD is not None for part in parts.values()):
        rows = [
            np.zeros(weight.shape[1], weight.dtype) if part.bias_GD is None else part.bias_GD.reshape(-1)
            for part, weight in zip(parts.values(), weights, strict=True)
        ]
        inputs.append(b.constant(np.concatenate(rows), f"{site.packing}.bias"))
    made = linear(b, inputs, site.precision)
    b.declare(made, None, None, sum(weight.shape[1] for weight in weights))
    names = [b.name(role) if has_steps(part) else f"{b.prefix}/{role}" for role, part in parts.items()]
    b.split(made, [weight.shape[1] for weight in weights], names)
    return dict(zip(parts, names, strict=True))


def _parts(site: AttentionSite) -> Iterator[tuple[str, Projection]]:
    if "q" in site.packing:
        yield "query", site.query
    if "kv" in site.packing:
        yield "key", site.key
        yield "value", site.value

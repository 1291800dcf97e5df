"""The part of report.json about requests of all lengths."""

from __future__ import annotations

from typing import Any

from rewriter.core.lengths import Size
from rewriter.core.measurement import decide, speedup
from rewriter.measurement.mix import per_request_s
from rewriter.search.buckets import WORTH, Curve, expected_s
from rewriter.search.lengths import Served, shares_served
from rewriter.search.lengths_race import ARTIFACT

_SHORT = (0.1, 0.5, 0.9)


def lengths_entry(served: Served) -> dict[str, Any]:
    """What requests were counted, which sizes serve which share of them and why, and how fast that was."""
    requests, shares = served.traffic.requests, shares_served(served)
    return {
        "source": requests.source,
        "axis": served.traffic.axes.tokens,
        "requests": requests.total,
        "tokens": {
            "mean": requests.mean_tokens,
            "quantiles": {f"{share:g}": requests.quantile(share) for share in _SHORT},
            "longest": max(tokens for _, tokens in requests.counts),
        },
        "sizes": [_size(served, size, shares[size]) for size in served.sizes],
        "why": _why(served),
        "beyond": {"share": max(0.0, 1.0 - sum(shares.values())), "what": "an error that names the largest size"},
        "choice_s": round(served.choice_s, 2),
        "measured_s": _measured(served.curve),
        "expected_s": _expected(served),
        "race": _race(served),
    }


def _size(served: Served, size: Size, share: float) -> dict[str, Any]:
    seconds = served.curve(size) if served.curve is not None else None
    return {"batch": size[0], "tokens": size[1], "share": share, "latency_s": seconds}


def _why(served: Served) -> str:
    if not served.sizes:
        return "TVM could not build it"
    if served.exact:
        return f"the most frequent ones as they are, because padding is not harmless: {served.traffic.harm}"
    return (
        "the least expected time by what was measured at several sizes; another size is added while it saves "
        f"{100 * WORTH:.0f} % of that, and compiling costs its time"
    )


def _measured(curve: Curve | None) -> list[dict[str, Any]]:
    if curve is None:
        return []
    return [
        {"batch": batch, "tokens": tokens, "latency_s": seconds}
        for (batch, tokens), seconds in sorted(curve.measured_s.items())
    ]


def _expected(served: Served) -> dict[str, float] | None:
    """Mean seconds of a request: in these sizes, padded to the largest alone, and if every length had a size."""
    if served.curve is None or served.exact:
        return None
    requests, curve = served.traffic.requests, served.curve
    return {
        "sizes": expected_s(requests, served.sizes, curve),
        "largest_alone": expected_s(requests, [max(served.sizes)], curve),
        "every_length": sum(share * curve(request) for request, share in requests.shares().items()),
    }


def _race(served: Served) -> dict[str, Any] | None:
    """Passes over the sample: mean seconds per request by subject, and how much faster the artifact is than each."""
    if served.race is None:
        return None
    found = served.race
    ours = found.get(ARTIFACT)
    ratios = {name: speedup(other, ours) for name, other in found.items() if ours is not None and name != ARTIFACT}
    return {
        "requests": served.sampled,
        "stopped": found.stopped,
        "latency_s": {name: per_request_s(one, served.sampled).as_dict() for name, one in found.items()},
        "speedup": {name: ratio.as_dict() for name, ratio in ratios.items()},
        "decided": {name: str(decide(ratio)) for name, ratio in ratios.items()},
        "failures": {name: str(failure) for name, failure in found.failures.items()},
    }

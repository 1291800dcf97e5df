"""How numbers and names are written in reports."""

from __future__ import annotations

from collections.abc import Mapping


def ratio(value: Mapping[str, float]) -> str:
    """``1.52x [1.49, 1.56]``; an interval with 1 inside says that it decides nothing."""
    text = f"{value['median']:.2f}x [{value['low']:.2f}, {value['high']:.2f}]"
    undecided = value["low"] <= 1.0 <= value["high"] and value["low"] < value["high"]
    return f"{text} (inconclusive)" if undecided else text


def latency(value: Mapping[str, float] | None) -> str:
    """``14.2 ms [14.0, 14.5]``."""
    if value is None:
        return "not measured"
    return f"{1e3 * value['median']:.2f} ms [{1e3 * value['low']:.2f}, {1e3 * value['high']:.2f}]"


def cell(text: object) -> str:
    """Text that cannot break out of a Markdown table or become markup: names come from the user's model."""
    escaped = str(text).replace("\\", "\\\\").replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
    return " ".join(escaped.split())

"""The points of one model as a Markdown table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.quality.methods import BASELINES, MIX

_NEAR = 0.03  # how far a point's share may lie from the column it is shown in


def table(known: Mapping[str, Any]) -> str:
    """A row per method, a column per share: what is lost, and the share where it is not the column's."""
    points = known["points"]
    shares = sorted({float(key.rpartition("@")[2]) for key in points}, reverse=True)
    names = list(dict.fromkeys(key.rpartition("@")[0] for key in points))
    original = known["original"] * (100.0 if known["unit"] == "points" else 1.0)
    lines = [
        f"{known['model']}: {known['metric']}, {original:.2f} in the original; lost, in {known['unit']}, "
        "by the share of operations of the rewritten layers that is kept",
        "",
        "| | " + " | ".join(f"{share:.0%}" for share in shares) + " |",
        "| --- |" + " --- |" * len(shares),
    ]
    for name in names:
        cells = [_cell(points.get(f"{name}@{share:g}"), share) for share in shares]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(point: Mapping[str, float] | None, share: float) -> str:
    if point is None:
        return "–"
    far = "" if abs(point["share"] - share) <= _NEAR else f" at {point['share']:.0%}"
    return f"{point['drop']:.2f}{far}"


def plot(known: Mapping[str, Any], path: Path) -> None:
    """Loss against share, ours in colour and solid, baselines grey and dashed; the vertical axis grows in decades."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    for index, name in enumerate(dict.fromkeys(key.rpartition("@")[0] for key in known["points"])):
        found = [point for key, point in known["points"].items() if key.rpartition("@")[0] == name and point]
        xy = sorted({(round(100 * point["share"], 2), point["drop"]) for point in found}, reverse=True)
        if xy:
            axes.plot(*zip((100.0, 0.0), *xy, strict=True), label=name, **_style(name, index))
    axes.set_yscale("symlog", linthresh=1.0)
    axes.invert_xaxis()
    axes.set_xlabel("operations kept in the rewritten layers, %")
    axes.set_ylabel(f"{known['metric'].partition(',')[0]} lost, {known['unit']}")
    axes.set_title(known["model"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _style(name: str, index: int) -> dict[str, Any]:
    if name == MIX:
        return {"color": "black", "linewidth": 2.5, "marker": "o"}
    if name in BASELINES:
        return {"color": f"{0.35 + 0.12 * BASELINES.index(name):.2f}", "linestyle": "--", "marker": "x"}
    return {"marker": ".", "color": f"C{index}"}

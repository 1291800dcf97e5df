"""``python -m models.quality``: metric against the share of operations kept, ours beside re-implemented baselines.

Points are kept in a JSON file as they are made, so that a run goes on where it was stopped. Writes a Markdown table and
a plot per model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.quality.checkpoint import Checkpoint, outputs
from models.quality.methods import methods
from models.quality.page import plot, table
from rewriter.attention.lower import lower
from rewriter.core.errors import ExitCode, UserError

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)


def main() -> int:
    """Parse, measure what is missing, print."""
    parser = argparse.ArgumentParser(prog="python -m models.quality", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", default=[], help="minilm, smollm2, digits (default: all)")
    parser.add_argument("--methods", help="only those whose name holds this text")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="shares of the operations kept")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/quality"))
    parsed = parser.parse_args()
    shares = [float(text) for text in parsed.shares.split(",")]
    pages = []
    try:
        for name, make in _checkpoints(parsed.output).items():
            if not parsed.models or name in parsed.models:
                pages.append(_measured(make(), shares, parsed.methods, parsed.output / f"{name}.json"))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return int(problem.exit_code)
    print("\n\n".join(pages))
    return int(ExitCode.DONE)


def _checkpoints(folder: Path) -> dict[str, Callable[[], Checkpoint]]:
    from models.quality.digits import digits
    from models.quality.sentences import sentences
    from models.quality.text_model import text_model

    return {
        "minilm": lambda: sentences(folder / "minilm"),
        "smollm2": lambda: text_model(folder / "smollm2"),
        "digits": lambda: digits(folder / "digits"),
    }


def _measured(checkpoint: Checkpoint, shares: list[float], only: str | None, file: Path) -> str:
    """All points of one model, those of earlier runs from its file."""
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"points": {}}
    known |= {"model": checkpoint.name, "metric": checkpoint.metric, "unit": checkpoint.unit}
    if "original" not in known:
        known["original"] = checkpoint.quality(outputs(checkpoint.graph, checkpoint.test))
    for name, method in methods(checkpoint).items():
        for share in shares:
            key = f"{name}@{share:g}"
            if key in known["points"] or (only and only not in name):
                continue
            begun = time.perf_counter()
            known["points"][key] = _point(checkpoint, method(share), known["original"])
            file.write_text(json.dumps(known, indent=1) + "\n")
            print(f"{checkpoint.name}: {key}: {known['points'][key]} ({time.perf_counter() - begun:.0f} s)", flush=True)
    plot(known, file.with_suffix(".png"))
    page = table(known)
    file.with_suffix(".md").write_text(page + "\n")
    return page


def _point(checkpoint: Checkpoint, reduced: Any, original: float) -> dict[str, Any] | None:
    """What is left of the metric; None where a method cannot get that far."""
    if reduced is None:
        return None
    quality = checkpoint.quality(outputs(lower(checkpoint.graph, reduced.sites.values()), checkpoint.test))
    return {"share": reduced.share, "quality": quality, "drop": checkpoint.drop(original, quality)}


if __name__ == "__main__":
    sys.exit(main())

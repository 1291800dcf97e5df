"""``python -m rewriter.benchmark.inspect_scale``: time and memory of `optimize inspect` against the number of layers.

Both must be straight lines. Each model is written to a scratch folder, inspected in a process of its own and deleted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rewriter.benchmark.decoder import Sizes, write_decoder


def main(arguments: list[str] | None = None) -> int:
    """Print one line per layer count, and the line through them."""
    parser = argparse.ArgumentParser(prog="python -m rewriter.benchmark.inspect_scale", description=__doc__)
    parser.add_argument("--layers", default="3,6,12,24", help="layer counts, by commas (48 needs 6 GB of disk)")
    parser.add_argument("--width", type=int, default=1536, help="model width; heads have 128 dims")
    parser.add_argument("--inspect", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.inspect is not None:
        sys.stdout.write(json.dumps(_inspected(parsed.inspect)))
        return 0
    counts = [int(count) for count in parsed.layers.split(",")]
    sys.stdout.write("layers  parameters  inspect_s  s_per_layer  peak_MB  lowerable\n")
    times = []
    for count in counts:
        sizes = Sizes(count, parsed.width, parsed.width // 128, max(1, parsed.width // 384), 3 * parsed.width)
        found = measure(sizes)
        times.append(found["inspect_s"])
        seconds, peak_mb = found["inspect_s"], found["peak_bytes"] / 2**20
        row = f"{count:6}  {sizes.parameters / 1e9:8.2f} G  {seconds:9.2f}  {seconds / count:11.3f}  {peak_mb:7.0f}"
        sys.stdout.write(f"{row}  {found['lowerable']} of {2 * count}\n")
        sys.stdout.flush()
    if len(counts) > 2:
        sys.stdout.write(_line(counts, times))
    return 0


def measure(sizes: Sizes) -> dict[str, float]:
    """Seconds, peak bytes and lowerable sites of one decoder, inspected in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_decoder(Path(folder) / "model.onnx", sizes)
        command = [sys.executable, "-m", "rewriter.benchmark.inspect_scale", "--inspect", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def _inspected(path: Path) -> dict[str, float]:
    start = time.perf_counter()
    from rewriter.inspection import inspect

    found = inspect(path)
    sites = [*found["attention"], *found["feed_forward"]]
    return {
        "inspect_s": time.perf_counter() - start,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "lowerable": sum(site["state"] == "lowerable" for site in sites),
    }


def _line(counts: list[int], times: list[float]) -> str:
    """Least squares through the points, and how far the worst point lies off it."""
    import numpy as np

    slope, start = np.polyfit(counts, times, 1)
    worst = max(abs(start + slope * c - t) / t for c, t in zip(counts, times, strict=True))
    return f"{start:.2f} s + {slope:.3f} s per layer; the worst point lies {100 * worst:.0f} % off the line\n"


if __name__ == "__main__":
    raise SystemExit(main())

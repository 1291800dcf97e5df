"""``python -m models.quality.calibration``: time and memory of calibrating MiniLM with 512 samples.

Calibrating is one walk of the original over the samples in which every Gram matrix that any pass asks for is collected
and every cut of every site is given its local error (number formats aside, which are judged on a probe of the tokens).
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch

from models.quality.sentences import sentences
from rewriter.assembly.assemble import price_options
from rewriter.core.passes_registry import discover
from rewriter.core.site import Recognition
from rewriter.runtimes.tvm.target import detect
from rewriter.search.candidates import all_candidates
from rewriter.search.selection import PRECISION, Selection


def main() -> int:
    """Calibrate once and print what it took."""
    parser = argparse.ArgumentParser(
        prog="python -m models.quality.calibration", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/quality/minilm"))
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    checkpoint = sentences(parsed.output)
    batches = [*checkpoint.calibrate, *checkpoint.choose]
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    passes = {name: one for name, one in discover().items() if name != PRECISION}
    found = Recognition(*(tuple(s for s in checkpoint.sites if type(s).__name__ == n) for n in _KINDS))  # type: ignore[arg-type]
    options = all_candidates(found, Selection(passes, {}), detect("cpu", parsed.threads), "normal")
    before_bytes, begun_s = _peak_bytes(), time.perf_counter()
    price_options(checkpoint.graph, checkpoint.sites, options, passes, batches)
    taken_s, model_bytes = time.perf_counter() - begun_s, (parsed.output / "minilm.onnx").stat().st_size
    print(
        f"{samples} samples, {tokens} tokens, {sum(map(len, options.values()))} options at {len(options)} sites, "
        f"{parsed.threads} threads: {taken_s:.1f} s; peak {_peak_bytes() / 1e9:.2f} GB, of which "
        f"{before_bytes / 1e9:.2f} GB before calibrating (model {model_bytes / 1e9:.2f} GB)"
    )
    return 0


_KINDS = ("AttentionSite", "FeedForwardSite")


def _peak_bytes() -> int:
    """Most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())

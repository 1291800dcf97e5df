"""``python -m rewriter.benchmark FOLDER``: one interleaved race of a model under every runtime, as a Markdown table.

``python -m rewriter.benchmark works`` races the exact graph at many sizes against everybody else's runtime.
``python -m rewriter.benchmark caches`` times decoding one token from full caches of several sizes.

FOLDER holds ``*.onnx`` with ``data.npz`` (as ``python -m models`` writes) and, where `optimize` was run,
``optimized/``. Not a test: it prints what it measured, with intervals and the machine's state.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rewriter.benchmark import caches, works_command
from rewriter.benchmark.race_table import Entrant, race_table
from rewriter.core.errors import UserError
from rewriter.core.options import parse_shape


def main() -> int:
    """Parse, race, print."""
    if sys.argv[1:2] == ["works"]:
        return _guarded(lambda: works_command.main(sys.argv[2:]))
    if sys.argv[1:2] == ["caches"]:
        return _guarded(lambda: caches.main(sys.argv[2:]))
    return _guarded(_folder)


def _guarded(command: Callable[[], int]) -> int:
    try:
        return command()
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return int(error.exit_code)


def _folder() -> int:
    """One model and what `optimize` made of it."""
    parser = argparse.ArgumentParser(
        prog="python -m rewriter.benchmark", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--shape", action="append", default=[], metavar="NAME=SIZES", help="sizes other than the data's"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of racing")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shapes = dict(parse_shape(text) for text in parsed.shape)
        table, _ = race_table(parsed.folder, Path(scratch), shapes, parsed.threads, parsed.budget)
    print(table)
    return 0


__all__ = ["Entrant", "main"]

if __name__ == "__main__":
    sys.exit(main())

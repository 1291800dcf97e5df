"""The public Python API. Everything here takes paths or arrays and raises `UserError` for bad input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter import inspection, pipeline, verification
from rewriter.core.options import MaxDrop, Options
from rewriter.core.progress import Listener
from rewriter.pipeline import Result

__all__ = ["Model", "Result", "inspect", "load", "optimize", "verify"]


class Model:
    """An optimised model that `optimize` wrote; safe to call from several threads."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        from rewriter.runtimes.tvm.load import load as load_artifact

        self.folder = folder
        self._executable = load_artifact(folder, threads)

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Outputs by name for one batch of named inputs, for example ``model(input_ids=ids, attention_mask=mask)``.

        Arrays may be shorter or smaller in batch than the largest size the artifact was built for: they are padded.
        Raises `DataError` for missing names, wrong ranks, or sizes beyond the largest bucket.
        """
        return self._executable.run({name: np.asarray(array) for name, array in inputs.items()})


def optimize(
    model: str | Path,
    *,
    target: str = "cpu",
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    metric: str | None = None,
    max_drop: str = "1%",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    output: str | Path | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> Result:
    """Find the fastest accuracy-preserving variant of an ONNX model on `target`.

    `model` is a file or folder; `data` an .npz (one array per input, samples first; `labels`, `split`, `group`) or
    text with `tokenizer`; `shapes` maps input names to sizes; further keywords are the fields of
    `rewriter.core.options.Options` (effort, runtime, threads, seed, passes, cache_dir, max_time_s, plan, dry_run). With
    `output` the artifacts are written there. Raises `UserError` for bad input.
    """
    options |= {"data": data, "tokenizer": tokenizer, "output": output}
    for name in ("data", "tokenizer", "output", "cache_dir", "plan"):
        if options.get(name) is not None:
            options[name] = Path(options[name])
    drop = MaxDrop.parse(max_drop)
    asked = Options(target=target, metric=metric, max_drop=drop, shapes=dict(shapes or {}), **options)
    return pipeline.optimize(Path(model), asked, listener=listener)


def inspect(model: str | Path) -> dict[str, Any]:
    """The attentions and feed-forwards of a model and what can be rewritten: the JSON of `optimize inspect --json`."""
    return inspection.inspect(Path(model))


def load(folder: str | Path, threads: int | None = None) -> Model:
    """Load what `optimize` wrote. Raises `ModelError` when files are missing, changed, or for another processor."""
    return Model(Path(folder), threads)


def verify(folder: str | Path, against: str | Path, data: str | Path | None = None) -> dict[str, Any]:
    """Compare a folder that `optimize` wrote with the original model: ``{"ok": bool, "checks": [...]}``."""
    return verification.verify(Path(folder), Path(against), None if data is None else Path(data))

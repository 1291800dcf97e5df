"""The public Python API. Everything here takes paths or arrays and raises `UserError` for bad input."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rewriter import inspection, pipeline, verification
from rewriter.core.errors import ModelError, OptionError
from rewriter.core.options import MaxDrop, Options
from rewriter.core.progress import Listener
from rewriter.core.rewrite import Pass
from rewriter.pipeline import Result
from rewriter.report.output import TVM, kept_runtime

if TYPE_CHECKING:
    from rewriter.runtimes.base import Executable
    from rewriter.torch_graphs.apply import Choices, Rewritten
    from rewriter.torch_graphs.sites import TorchSites

__all__ = ["Model", "Result", "apply", "inspect", "load", "optimize", "sites", "verify"]


Beyond = Literal["error", "onnxruntime"]
_DYNAMIC = "model.onnx"


class Model:
    """An optimised model that `optimize` wrote, in the runtime that won; safe to call from several threads.

    `beyond` says what happens to inputs that fit no size of the build: ``error``, or ``onnxruntime`` for running
    ``model.onnx``, the same graph with dynamic shapes, in ONNX Runtime.
    """

    def __init__(self, folder: Path, threads: int | None = None, beyond: Beyond = "error") -> None:
        if beyond not in get_args(Beyond):
            raise OptionError(f"beyond={beyond!r} is unknown", f"Choose {' or '.join(get_args(Beyond))}")
        if beyond == "onnxruntime" and not (folder / _DYNAMIC).is_file():
            raise ModelError(f"{folder} has no {_DYNAMIC} to fall back to", "Load it without beyond='onnxruntime'")
        self.folder, self._beyond = folder, beyond
        self._executable, self._threads = _kept(folder, threads)
        self._lock = threading.Lock()
        self._dynamic: Executable | None = None

    def __call__(self, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Outputs by name for one batch of named inputs, for example ``model(input_ids=ids, attention_mask=mask)``.

        A TVM build takes arrays shorter or smaller in batch than the largest size it was made for: they are padded.
        Raises `DataError` for missing names, wrong ranks, or sizes beyond the largest (see `beyond`).
        """
        from rewriter.runtimes.tvm.buckets import TooLarge

        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        try:
            return self._executable.run(arrays)
        except TooLarge:
            if self._beyond == "error":
                raise
        return self._by_onnxruntime().run(arrays)

    def _by_onnxruntime(self) -> Executable:
        """The graph with dynamic shapes, loaded when it is first needed."""
        from rewriter.runtimes.onnxruntime import OnnxRuntime

        with self._lock:
            if self._dynamic is None:
                self._dynamic = OnnxRuntime().load(self.folder / _DYNAMIC, self._threads)
            return self._dynamic


def _kept(folder: Path, threads: int | None) -> tuple[Executable, int]:
    """What was kept, in the runtime it was kept for, and the threads it runs on."""
    runtime = kept_runtime(folder)
    if runtime != TVM:
        from rewriter.search.shipped import load_kept

        return load_kept(folder, runtime, threads or 1), threads or 1
    from rewriter.runtimes.tvm.load import load as load_artifact

    built = load_artifact(folder, threads)
    return built, int(built.manifest["threads"])


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
    for name in ("data", "tokenizer", "output", "cache_dir", "plan", "shape_histogram"):
        if options.get(name) is not None:
            options[name] = Path(options[name])
    drop = MaxDrop.parse(max_drop)
    asked = Options(target=target, metric=metric, max_drop=drop, shapes=dict(shapes or {}), **options)
    return pipeline.optimize(Path(model), asked, listener=listener)


def inspect(
    model: Any,
    inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> dict[str, Any]:
    """The attentions and feed-forwards of a model and what can be rewritten: the JSON of `optimize inspect --json`.

    `model` is an ONNX file or folder, or a torch model as `sites` takes it; a torch model's sites also have
    ``fx_nodes`` and ``parameters``.
    """
    if isinstance(model, (str, Path)):
        return inspection.inspect(Path(model))
    return inspection.inspect_torch(sites(model, inputs, kwargs, dynamic_shapes))


def sites(
    model: Any,
    inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> TorchSites:
    """The attentions and feed-forwards of a torch model, to look at and to `apply` plans to.

    `model` is an `nn.Module`, an `fx.GraphModule` or a `torch.export.ExportedProgram` on the CPU. `inputs` and `kwargs`
    are one example of its arguments, nested as they may be; `dynamic_shapes` is what `torch.export.export` takes. What
    `sites` returned before is returned as it is. Raises `UserError` without an example, `ModelError` if torch cannot
    export the model.
    """
    from rewriter.torch_graphs.sites import TorchSites, read

    return model if isinstance(model, TorchSites) else read(model, tuple(inputs), kwargs, dynamic_shapes)


def apply(
    model: Any,
    plan: Choices,
    data: Iterable[object] = (),
    *,
    inputs: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: Iterable[Pass] = (),
) -> Rewritten:
    """A torch model rewritten in its own fx graph: ``apply(model, "head_pruning{keep=8}@layers.0.attention", data)``.

    `model` and the example are as `sites` takes them. `plan` is a `Plan`, its text, options with sites, or options by
    site; `data` are batches to calibrate on, each a mapping of keyword arguments, a tuple of positional ones or a
    tensor; `passes` are passes of one's own. The model itself stays as it is. Raises `OptionError` for options that do
    not apply, `DataError` where data is missing or does not fit.
    """
    from rewriter.torch_graphs.apply import apply as apply_plan

    return apply_plan(sites(model, inputs, kwargs, dynamic_shapes), plan, data, passes)


def load(folder: str | Path, threads: int | None = None, beyond: Beyond = "error") -> Model:
    """Load what `optimize` wrote. Raises `ModelError` when files are missing, changed, or for another processor.

    With ``beyond="onnxruntime"`` inputs larger than every size of the build run ``model.onnx`` in ONNX Runtime.
    """
    return Model(Path(folder), threads, beyond)


def verify(folder: str | Path, against: str | Path, data: str | Path | None = None) -> dict[str, Any]:
    """Compare a folder that `optimize` wrote with the original model: ``{"ok": bool, "checks": [...]}``."""
    return verification.verify(Path(folder), Path(against), None if data is None else Path(data))

"""ONNX Runtime on the processor: in fp32, attentions in the forms chosen for them, and its one-line dynamic int8."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewriter.core.errors import DataError, ModelError, UnsupportedOperator
from rewriter.core.refusal import Refusal
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.base import Feeds
from rewriter.runtimes.standard import AS_CHOSEN, to_standard

if TYPE_CHECKING:
    import onnxruntime

_ENGINE = "ONNX Runtime"


class OnnxRuntime:
    """ONNX Runtime in the precision of the graph, with all of its graph optimisations."""

    name: str = "onnxruntime"

    def available(self) -> Refusal | None:
        """Whether the package is installed."""
        if util.find_spec("onnxruntime") is None:
            return Refusal("not-installed", "onnxruntime is not installed; pip install onnxruntime")
        return None

    def build(self, graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]], folder: Path, target: Target) -> Path:
        """Write ``folder/model.onnx``, attentions in their chosen forms, shapes dynamic whatever `shapes` says."""
        folder.mkdir(parents=True, exist_ok=True)
        return to_standard(graph, AS_CHOSEN).save(folder / "model.onnx")

    def load(self, artifact: Path, threads: int) -> OnnxRuntimeExecutable:
        """A session; raises `UnsupportedOperator` or `ModelError` where ONNX Runtime refuses the model."""
        return OnnxRuntimeExecutable(_session(artifact, threads))


class OnnxRuntimeInt8(OnnxRuntime):
    """What a user gets from one line: ``quantize_dynamic(per_channel=True)``, weights int8, activations per tensor."""

    name = "onnxruntime-int8"

    def __init__(self) -> None:
        self.warnings: tuple[str, ...] = ()

    def available(self) -> Refusal | None:
        """Whether the package and its quantisation tools are installed."""
        missing = super().available()
        if missing is None and util.find_spec("onnxruntime.quantization") is None:
            return Refusal("not-installed", "onnxruntime.quantization is not part of this onnxruntime")
        return missing

    def build(self, graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]], folder: Path, target: Target) -> Path:
        """Quantise `graph`, which the caller gives as the user has it; what the tool warned of is in `warnings`.

        The graph is written first rather than read from its path: what is quantised is what was handed over.
        """
        from onnxruntime.quantization import quantize_dynamic

        folder.mkdir(parents=True, exist_ok=True)
        plain, artifact = folder / "float.onnx", folder / "model.onnx"
        to_standard(graph).save(plain)
        with _collected() as lines:
            prepared = _prepared(plain, folder / "prepared.onnx", lines)
            quantize_dynamic(prepared, artifact, per_channel=True)
        self.warnings = tuple(dict.fromkeys(lines))
        for left in (plain, folder / "prepared.onnx"):
            for file in (left, left.with_name(left.name + ".data")):
                file.unlink(missing_ok=True)
        return artifact


class OnnxRuntimeExecutable:
    """One session. Runs from several threads at once are allowed by ONNX Runtime; a bound run is not."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._inputs = tuple(value.name for value in session.get_inputs())
        self._outputs = tuple(value.name for value in session.get_outputs())

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """All outputs by name. Raises `DataError` when inputs are missing or do not fit."""
        from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

        try:
            results = self._session.run(None, self._chosen(feeds))
        except InvalidArgument as error:
            raise DataError(
                f"the inputs do not fit the model: {_first_line(error)}", "Check dtypes and shapes"
            ) from error
        return dict(zip(self._outputs, results, strict=True))

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """A run on inputs that lie in the runtime's own tensors, into outputs allocated once."""
        from onnxruntime import OrtValue

        binding = self._session.io_binding()
        for name, array in self._chosen(feeds).items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        # The first run found the shapes; from now on the results go to the same memory.
        results = binding.get_outputs()
        binding.clear_binding_outputs()
        for name, value in zip(self._outputs, results, strict=True):
            binding.bind_ortvalue_output(name, value)
        session = self._session
        return lambda: session.run_with_iobinding(binding)

    def _chosen(self, feeds: Feeds) -> dict[str, Any]:
        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            raise DataError(f"no values for input {missing[0]!r}", f"Give arrays for {', '.join(self._inputs)}")
        return {name: np.ascontiguousarray(feeds[name]) for name in self._inputs}


def version() -> str:
    """The installed version, without importing the package."""
    return metadata.version("onnxruntime")


def _session(artifact: Path, threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import (
        Fail,
        InvalidGraph,
        InvalidProtobuf,
        NoSuchFile,
        NotImplemented,
        RuntimeException,
    )

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A pool that spins while another runtime is being timed takes its cores away.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(artifact), options, providers=["CPUExecutionProvider"])
    except NotImplemented as error:
        raise UnsupportedOperator(_ENGINE, _first_line(error), str(artifact.name)) from error
    except (Fail, InvalidGraph, InvalidProtobuf, NoSuchFile, RuntimeException) as error:
        raise ModelError(f"{_ENGINE} refuses {artifact.name}: {_first_line(error)}", "Use another runtime") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _prepared(plain: Path, prepared: Path, lines: list[str]) -> Path:
    """The tool's own pre-processing where it works; it does not on every model, and its advice is no condition."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    except Exception as error:  # noqa: BLE001 - recorded: the tool raises bare Exception, and can do without this step
        lines.append(f"pre-processing failed and was left out: {_first_line(error)}")
        return plain
    return prepared


class _Collector(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _collected() -> Iterator[list[str]]:
    """What the quantisation tools say on the root logger, as a list instead of on the screen."""
    lines: list[str] = []
    root = logging.getLogger()
    before, root.handlers = root.handlers, [_Collector(lines)]
    try:
        yield lines
    finally:
        root.handlers = before

"""OpenVINO on the processor: in fp32, in bf16 (its default where there is bf16), in int8 after training by NNCF."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rewriter.core.errors import DataError, ModelError, UnsupportedOperator
from rewriter.core.refusal import Refusal
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.base import Feeds
from rewriter.runtimes.standard import to_standard

if TYPE_CHECKING:
    import openvino

Shapes = Mapping[str, tuple[int, ...]]

_ENGINE = "OpenVINO"
_SOURCE = "graph.onnx"
_ABOUT = ["rewriter", "interface"]


class OpenVino:
    """OpenVINO computing in float32.

    The artifact is its IR (``model.xml`` and ``model.bin``) with the axes the graph has; shapes given to `build` are
    written into it, and `load` compiles for them. Feeds of other shapes run in a second compilation with dynamic axes.
    """

    name: str = "openvino"
    # What INFERENCE_PRECISION_HINT says; None leaves the choice to the library.
    precision: ClassVar[str | None] = "f32"

    def available(self) -> Refusal | None:
        """Whether the package is installed."""
        if util.find_spec("openvino") is None:
            return Refusal("not-installed", "openvino is not installed; pip install 'attention-rewriter[openvino]'")
        return None

    def build(self, graph: OnnxGraph, shapes: Shapes, folder: Path, target: Target) -> Path:
        """Write ``folder/model.xml``. Without `shapes` the model stays dynamic, which serves mixes of lengths."""
        import openvino

        model = read(graph, folder)
        inputs, outputs = ([spec.name for spec in specs] for specs in (graph.inputs, graph.outputs))
        about = {"in": inputs, "out": outputs, "shapes": {name: list(shape) for name, shape in shapes.items()}}
        model = self.prepared(model, inputs)
        model.set_rt_info(json.dumps(about), _ABOUT)
        artifact = folder / "model.xml"
        openvino.save_model(model, artifact, compress_to_fp16=False)
        for left in (folder / _SOURCE, folder / f"{_SOURCE}.data"):
            left.unlink(missing_ok=True)
        return artifact

    def prepared(self, model: openvino.Model, inputs: list[str]) -> openvino.Model:
        """The model as it is written; `inputs` are the names of its inputs in order."""
        return model

    def load(self, artifact: Path, threads: int) -> OpenVinoExecutable:
        """Compile for latency. Raises `ModelError` or `UnsupportedOperator` where OpenVINO refuses the model."""
        return OpenVinoExecutable(artifact, settings(threads, self.precision))


class OpenVinoBf16(OpenVino):
    """The same with products and activations in bfloat16, as OpenVINO does by default on processors that have it."""

    name = "openvino-bf16"
    precision = "bf16"

    def available(self) -> Refusal | None:
        """Whether the package is installed and the processor computes in bfloat16."""
        return super().available() or _without("BF16")


class OpenVinoInt8(OpenVino):
    """Weights and activations in int8 by NNCF's quantisation after training, told that the model is a Transformer.

    `samples` are what it calibrates on, an ``.npz`` of the inputs with samples first; without them `build` raises
    `DataError`, because ranges of made-up inputs would be made up too. What is not quantised is computed in the
    library's default precision.
    """

    name = "openvino-int8"
    precision = None

    def __init__(self) -> None:
        self.samples: Path | None = None

    def available(self) -> Refusal | None:
        """Whether OpenVINO and NNCF are installed."""
        missing = super().available()
        if missing is None and util.find_spec("nncf") is None:
            return Refusal("not-installed", "nncf is not installed; pip install 'attention-rewriter[openvino]'")
        return missing

    def prepared(self, model: openvino.Model, inputs: list[str]) -> openvino.Model:
        """Quantised on the samples."""
        from rewriter.runtimes.openvino_int8 import quantised

        if self.samples is None:
            raise DataError("quantising for OpenVINO needs samples to calibrate on", "Give --data")
        return quantised(model, inputs, self.samples)


class OpenVinoExecutable:
    """A model compiled for one set of shapes, and again with dynamic axes when others come. Not to be shared."""

    def __init__(self, artifact: Path, config: Mapping[str, Any]) -> None:
        self._core, self._config = _core(), dict(config)
        with _refusing(artifact.name):
            self._model = self._core.read_model(artifact)
        try:
            about = json.loads(str(self._model.get_rt_info(_ABOUT).value))
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{artifact} was not written by this program", "Build it again") from error
        self._name = artifact.name
        self._inputs, self._outputs = tuple(about["in"]), tuple(about["out"])
        self._static = {name: tuple(shape) for name, shape in about["shapes"].items()}
        self._requests: dict[bool, openvino.InferRequest] = {}
        self._request(bool(self._static))

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """All outputs by name. Raises `DataError` when inputs are missing or do not fit."""
        arrays = self._arrays(feeds)
        request = self._request(self._fits(arrays))
        with _misfit():
            _feed(request, arrays)
            request.infer(share_outputs=True)
        return {name: request.get_output_tensor(i).data.copy() for i, name in enumerate(self._outputs)}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """A run on inputs that lie where OpenVINO reads them, into its own outputs."""
        arrays = self._arrays(feeds)
        request = self._request(self._fits(arrays)).get_compiled_model().create_infer_request()
        with _misfit():
            _feed(request, arrays)
            request.infer(share_outputs=True)
        # The plain call wraps all outputs in a dictionary of arrays; these two do nothing but run.
        start, wait = request.start_async, request.wait

        def once(held: object = arrays) -> None:
            start(share_inputs=True)
            wait()

        return once

    def _fits(self, arrays: Sequence[np.ndarray]) -> bool:
        """Whether the shapes are those compiled for."""
        return [array.shape for array in arrays] == [self._static.get(name) for name in self._inputs]

    def _request(self, static: bool) -> openvino.InferRequest:
        if static not in self._requests:
            with _refusing(self._name):
                model = self._model.clone()
                if static:
                    model.reshape({i: list(self._static[name]) for i, name in enumerate(self._inputs)})
                compiled = self._core.compile_model(model, "CPU", self._config)
                self._requests[static] = compiled.create_infer_request()
        return self._requests[static]

    def _arrays(self, feeds: Feeds) -> list[np.ndarray]:
        """The inputs in order, as OpenVINO can read them in place. Raises `DataError` where they do not fit."""
        import openvino

        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            raise DataError(f"no values for input {missing[0]!r}", f"Give arrays for {', '.join(self._inputs)}")
        arrays = []
        for name, wanted in zip(self._inputs, self._model.inputs, strict=True):
            array, kind = np.ascontiguousarray(feeds[name]), wanted.get_element_type().to_dtype()
            shape = openvino.PartialShape(list(array.shape))
            if kind != array.dtype or not wanted.get_partial_shape().compatible(shape):
                found = f"{array.dtype} {list(array.shape)}, not {kind} {wanted.get_partial_shape()}"
                raise DataError(f"the inputs do not fit the model: {name!r} is {found}", "Check dtypes and shapes")
            arrays.append(array)
        return arrays


def _feed(request: openvino.InferRequest, arrays: Sequence[np.ndarray]) -> None:
    """Let a request read arrays where they lie; whoever calls keeps them alive."""
    import openvino

    for index, array in enumerate(arrays):
        request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))


def settings(threads: int, precision: str | None) -> dict[str, Any]:
    """For one stream of short runs; workers are pinned by whoever starts them."""
    chosen: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    return chosen if precision is None else chosen | {"INFERENCE_PRECISION_HINT": precision}


def read(graph: OnnxGraph, folder: Path) -> openvino.Model:
    """A graph as OpenVINO reads its standard form, written to `folder` for that."""
    folder.mkdir(parents=True, exist_ok=True)
    source = to_standard(graph).save(folder / _SOURCE)
    with _refusing(source.name):
        return _core().read_model(source)


def version() -> str:
    """The installed version, without importing the package."""
    return metadata.version("openvino")


def _core() -> openvino.Core:
    import openvino

    return openvino.Core()


def _without(capability: str) -> Refusal | None:
    found = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if capability in found:
        return None
    return Refusal("no-instructions", f"this processor has no {capability}; OpenVINO would compute in float32")


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """What OpenVINO raises while reading and compiling, as our errors."""
    try:
        yield
    except RuntimeError as error:
        unknown = re.search(r"No conversion rule found for operations: (.+)", str(error))
        if unknown:
            raise UnsupportedOperator(_ENGINE, unknown[1].strip(), name) from error
        raise ModelError(f"{_ENGINE} refuses {name}: {_reason(error)}", "Use another runtime") from error


@contextmanager
def _misfit() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DataError(f"the inputs do not fit the model: {_reason(error)}", "Check dtypes and shapes") from error


def _reason(error: Exception) -> str:
    """The telling line: the first ones say in which file of OpenVINO the error was noticed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check ", "FrontEnd API failed"))]
    return (telling or lines or [type(error).__name__])[0]

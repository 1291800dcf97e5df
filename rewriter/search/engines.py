"""The runtimes besides TVM that a result may run in: which were asked for, which are here, which keep the numbers.

An engine that computes in the graph's own dtypes gives every variant the accuracy it was scored with. One that rounds
makes another model of the same graph, which has to be scored and certified like any other rewrite before it may win.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from rewriter.core.errors import UserError
from rewriter.core.options import Runtime
from rewriter.runtimes import jobs
from rewriter.runtimes.workers import WorkerFailure
from rewriter.search.session import ONNXRUNTIME, ONNXRUNTIME_INT8, OPENVINO_INT8, Session

_LIMIT_S = 60.0


@dataclass(frozen=True)
class Engine:
    """A runtime in one precision. `key` names it in entries, reports and folders; `runtime` is ``module:Class``.

    `family` is the choice of ``--runtime`` that asks for it. `reads` says whether it takes composites or standard
    operators. `file` is what its artifact's folder holds, `swap` the line of Python that loads it; `one_shape`: every
    new shape costs it a build.
    """

    key: str
    runtime: str
    family: Runtime
    precision: Literal["as the graph", "bf16", "int8"]
    reads: Literal["composites", "standard"]
    file: str
    swap: str
    one_shape: bool = False

    @property
    def rounds(self) -> bool:
        """Whether it computes in fewer bits than the graph says."""
        return self.precision != "as the graph"

    @property
    def path(self) -> str:
        """Where its artifact lies in the output folder."""
        return self.file if self.key == "onnxruntime" else f"{self.key}/{self.file}"

    @property
    def loading(self) -> str:
        """The line that loads the artifact from within the output folder."""
        return self.swap.format(repr(self.path))


_OWN: Final = "as the graph"
_SESSION = "session = onnxruntime.InferenceSession({})"
_COMPILED = "model = openvino.Core().compile_model({}, 'CPU')"
_HINTED = "model = openvino.Core().compile_model({}, 'CPU', {{'INFERENCE_PRECISION_HINT': '%s'}})"
_MODULE = "module = torch.export.load({}).module()"
_PACKAGE = "module = torch._inductor.aoti_load_package({})"
_OPENVINO, _TORCH = "rewriter.runtimes.openvino", "rewriter.runtimes.torch_runtime"

PEERS: tuple[Engine, ...] = (
    Engine("onnxruntime", ONNXRUNTIME, "onnxruntime", _OWN, "standard", "model.onnx", _SESSION),
    Engine("onnxruntime-int8", ONNXRUNTIME_INT8, "auto", "int8", "standard", "model.onnx", _SESSION),
    Engine("openvino", f"{_OPENVINO}:OpenVino", "openvino", _OWN, "standard", "model.xml", _HINTED % "f32"),
    Engine("openvino-bf16", f"{_OPENVINO}:OpenVinoBf16", "openvino", "bf16", "standard", "model.xml", _HINTED % "bf16"),
    Engine("openvino-int8", OPENVINO_INT8, "openvino", "int8", "standard", "model.xml", _COMPILED),
    Engine("torch-eager", f"{_TORCH}:TorchEager", "torch", _OWN, "composites", "model.pt2", _MODULE, True),
    Engine("torch-compile", f"{_TORCH}:TorchCompile", "torch", _OWN, "composites", "model.pt2", _PACKAGE, True),
)
BY_KEY = {engine.key: engine for engine in PEERS}
ONE_SHAPE = frozenset(engine.runtime for engine in PEERS if engine.one_shape)


def asked_peers(asked: Runtime) -> tuple[Engine, ...]:
    """The engines besides TVM that may run the result."""
    return tuple(engine for engine in PEERS if asked in ("auto", engine.family))


def absent(session: Session, engine: Engine) -> str | None:
    """Why an engine cannot take part here, or None. Its package is loaded in a worker, which it may crash."""
    try:
        answer = session.builder.call(f"{jobs.__name__}:available", engine.runtime, timeout_s=_LIMIT_S)
    except UserError as problem:
        return str(problem)
    if isinstance(answer, WorkerFailure):
        return str(answer)
    if answer is None and engine.runtime == OPENVINO_INT8 and session.samples() is None:
        return "quantising needs samples to calibrate on; give --data"
    return None if answer is None else str(answer.why)

"""Who races: runtimes by ``module:Class``, and which graph each is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rewriter.core.site import Precision
from rewriter.search.session import ONNXRUNTIME, TVM
from rewriter.search.session import ONNXRUNTIME_INT8 as _ONNXRUNTIME_INT8

ONNXRUNTIME_FP32 = "ONNX Runtime fp32"
ONNXRUNTIME_INT8 = "ONNX Runtime dynamic int8"
OPENVINO_FP32, OPENVINO_BF16, OPENVINO_INT8 = "OpenVINO fp32", "OpenVINO bf16", "OpenVINO int8"
EAGER, INDUCTOR = "torch SDPA eager", "TorchInductor"


@dataclass(frozen=True)
class Entrant:
    """`graph`: the user's own file, or the exact graph (nothing pruned) with composites in a number format.

    `peer`: it counts where the fastest one of this number format is asked for. `threaded`: its artifact is made for a
    number of threads.
    """

    name: str
    runtime: str
    graph: Literal["original"] | Precision = "original"
    peer: bool = True
    threaded: bool = False


def ours(precision: Precision) -> str:
    """The name of this project's entrant."""
    return f"TVM {precision}"


def _tvm(precision: Precision) -> Entrant:
    return Entrant(ours(precision), TVM, precision, peer=False, threaded=True)


def entrants_for(precision: Precision) -> tuple[Entrant, ...]:
    """Ours first, then those of the same number format, then what else the ratio is worth knowing of."""
    return (_tvm(precision), *_RIVALS[precision])


_RIVALS: dict[Precision, tuple[Entrant, ...]] = {
    "fp32": (
        Entrant(ONNXRUNTIME_FP32, ONNXRUNTIME),
        Entrant(OPENVINO_FP32, "rewriter.runtimes.openvino:OpenVino"),
        # Exact graphs keep attention as one node, which these two call as `scaled_dot_product_attention`.
        Entrant(EAGER, "rewriter.runtimes.torch_runtime:TorchEager", "fp32"),
        Entrant(INDUCTOR, "rewriter.runtimes.torch_runtime:TorchCompile", "fp32", threaded=True),
    ),
    "bf16": (
        Entrant(OPENVINO_BF16, "rewriter.runtimes.openvino:OpenVinoBf16"),
        Entrant(ONNXRUNTIME_FP32, ONNXRUNTIME, peer=False),
    ),
    "int8": (
        Entrant(ONNXRUNTIME_INT8, _ONNXRUNTIME_INT8),
        Entrant(OPENVINO_INT8, "rewriter.runtimes.openvino:OpenVinoInt8"),
        _tvm("bf16"),
    ),
}

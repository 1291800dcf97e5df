"""Small model files, sound and broken."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3] x) => (float[N, 3] y) <float[3] w = {1, 2, 3}> {
  a = Identity(x)
  c = Constant<value_floats = [1.0, 2.0, 4.0]>()
  t = Mul(a, w)
  s = Add(t, c)
  y = Relu(s)
}"""
FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[3] x) => (float[3] y) { h = local.twice(x)  y = local.twice(h) }
<domain: "local", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }"""


def proto_of(text: str = TEXT) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def written(folder: Path, proto: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def external(folder: Path, **entries: object) -> Path:
    """A model whose one weight lies in weights.bin, with entries of its reference replaced."""
    proto = proto_of()
    tensor = proto.graph.initializer[0]
    (folder / "weights.bin").write_bytes(numpy_helper.to_array(tensor).tobytes())
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", "offset": 0, "length": 12, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return written(folder, proto)

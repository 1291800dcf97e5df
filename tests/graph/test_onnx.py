"""Loading, saving, lookups and fingerprints of models; every kind of bad file gets a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from rewriter.core.errors import ModelError, OutputError, UserError
from rewriter.graph.canonical import canonical
from rewriter.graph.checks import legality_problems
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, TensorSpec, load, reads
from tests.graph.harness import numbers

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


def test_what_a_loaded_graph_says(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    assert graph.inputs == (TensorSpec("x", np.dtype(np.float32), ("N", 3)),)
    assert graph.outputs == (TensorSpec("y", np.dtype(np.float32), ("N", 3)),)
    assert str(graph.inputs[0]) == "x: float32[Nx3]"
    assert graph.opset == 17
    assert [node.op_type for node in graph.topological()] == ["Identity", "Constant", "Mul", "Add", "Relu"]
    assert [value.name for value in graph.values()] == ["x", "w", "a", "c", "t", "s", "y"]


def test_lookups(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    np.testing.assert_array_equal(graph.constant("w"), [1, 2, 3])
    np.testing.assert_array_equal(graph.constant("c"), [1, 2, 4])
    assert graph.constant("t") is None and graph.constant("nope") is None
    assert graph.has("t") and not graph.has("nope")
    assert graph.value("t").producer() is graph.topological()[2]
    with pytest.raises(ModelError, match="no value named 'nope'"):
        graph.value("nope")
    flow = graph.dataflow()
    assert set(flow.predecessors("t")) == {"a", "w"}
    assert flow.edges["t", "s"]["node"].op_type == "Add"


def test_lookups_follow_edits(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    relu = graph.topological()[-1]
    assert graph.value("y") is relu.outputs[0]
    relu.outputs[0].name = "renamed"
    assert graph.has("renamed") and not graph.has("y")


def test_a_clone_can_be_edited_alone(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    before = graph.fingerprint()
    copy = graph.clone()
    assert copy.fingerprint() == before
    copy.topological()[-1].op_type = "Tanh"
    assert copy.fingerprint() != before and graph.fingerprint() == before


def test_weights_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    proto = proto_of()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3]))
    graph = load(written(tmp_path, proto))
    assert [spec.name for spec in graph.inputs] == ["x"]
    np.testing.assert_array_equal(graph.constant("w"), [1, 2, 3])
    found = Interpreter(graph).run({"x": numbers(2, 3)})
    assert found["y"].shape == (2, 3)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \.onnx file"):
        load(tmp_path)
    written(tmp_path, proto_of(), "only.onnx")
    assert load(tmp_path).path == tmp_path / "only.onnx"
    written(tmp_path, proto_of(), "other.onnx")
    with pytest.raises(ModelError, match=r"holds 2 models \(only.onnx, other.onnx\)"):
        load(tmp_path)
    written(tmp_path, proto_of())
    assert load(tmp_path).path == tmp_path / "model.onnx"


def test_functions_are_inlined(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of(FUNCTION)))
    assert [node.op_type for node in graph.topological()] == ["Add", "Add"]
    np.testing.assert_allclose(Interpreter(graph).run({"x": numbers(3)})["y"], 4 * numbers(3), rtol=1e-6)


def test_the_long_name_of_the_standard_domain(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["ai.onnx" : 17]>
    g (float[2, 3] x) => (float[2, 3] y) { y = ai.onnx.Softmax(x) }"""
    graph = load(written(tmp_path, proto_of(text)))
    assert graph.opset == 17
    np.testing.assert_allclose(Interpreter(graph).run({"x": numbers(2, 3)})["y"].sum(1), [1, 1], rtol=1e-6)


def test_unsorted_nodes_are_sorted(tmp_path: Path) -> None:
    proto = proto_of()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    order = [node.op_type for node in load(written(tmp_path, proto)).topological()]
    assert order.index("Mul") < order.index("Add") < order.index("Relu")


def broken(kind: str) -> onnx.ModelProto:
    proto = proto_of()
    graph = proto.graph
    if kind == "outputs":
        del graph.output[:]
    elif kind == "cycle":
        graph.node[0].input[0] = "s"
    elif kind == "dangling":
        graph.node[2].input[0] = "ghost"
    elif kind == "output":
        graph.output[0].name = "ghost"
    elif kind == "twice":
        graph.node[3].output[0] = "t"
    elif kind == "opset":
        proto.opset_import[0].version = 999
    elif kind == "no-opset":
        del proto.opset_import[:]
    elif kind == "ir":
        proto.ir_version = 999
    elif kind == "domain":
        graph.node[2].domain = "org.example"
    elif kind == "short":
        graph.initializer[0].dims[0] = 5
    elif kind == "huge":
        graph.initializer[0].dims[0] = 2**50
    elif kind == "negative":
        graph.initializer[0].dims[0] = -3
    elif kind == "sparse":
        graph.sparse_initializer.add()
    elif kind == "input":
        graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == "input-dtype":
        graph.input[0].type.tensor_type.elem_type = 0
    elif kind == "attribute":
        graph.node[0].op_type = "Cast"
    elif kind == "attribute-type":
        graph.node[0].op_type = "Cast"
        graph.node[0].attribute.append(helper.make_attribute("to", "float"))
    elif kind == "dtype":
        graph.initializer[0].data_type = 77
    return proto


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("outputs", "the graph has no outputs"),
        ("cycle", "has a cycle"),
        ("dangling", "reads 'ghost', which nothing defines"),
        ("output", "nothing computes the output 'ghost'"),
        ("twice", "defines 't' more than once"),
        ("opset", "uses opset 999, newest known is"),
        ("no-opset", "does not say which opset"),
        ("ir", "has IR version 999"),
        ("domain", "operator org.example::Mul .* unknown domain"),
        ("short", "has 3 of 5 items"),
        ("huge", "impossible shape"),
        ("negative", "impossible shape"),
        ("dtype", "unknown dtype 77"),
        ("sparse", "has sparse weights"),
        ("input", "the input 'x' is not a tensor"),
        ("input-dtype", "the input 'x' has no known dtype"),
        ("attribute", r"node 'a' \(Cast\) lacks its attribute 'to'"),
        ("attribute-type", "attribute 'to' of node 'a' has a wrong type"),
    ],
)
def test_malformed_models(tmp_path: Path, kind: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        load(written(tmp_path, broken(kind)))


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at"):
        load(tmp_path / "absent.onnx")
    empty = tmp_path / "empty.onnx"
    empty.touch()
    with pytest.raises(ModelError, match="is empty"):
        load(empty)
    whole = written(tmp_path, proto_of()).read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="truncated or not an ONNX file"):
        load(cut)
    text = tmp_path / "text.onnx"
    text.write_text("<html>Not Found</html>")
    with pytest.raises(ModelError, match=r"truncated or not|is not an ONNX model"):
        load(text)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    content = written(tmp_path, proto_of()).read_bytes().replace(b"Identity", b"Iden\xff\xfety")
    path = tmp_path / "bytes.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="op_type is not text"):
        load(path)


def test_external_data_stays_mapped(tmp_path: Path) -> None:
    graph = load(external(tmp_path))
    tensor = graph.value("w").const_value
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(graph.constant("w"), [1, 2, 3])
    found = Interpreter(graph).run({"x": np.ones((1, 3), np.float32)})
    assert found["y"].tolist() == [[2.0, 4.0, 7.0]]


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"location": "absent.bin"}, "is missing"),
        ({"location": "../weights.bin"}, "outside the model's folder"),
        ({"location": "/etc/hostname"}, "outside the model's folder"),
        ({"location": ""}, "outside the model's folder"),
        ({"location": "we\0ird"}, "unusable external path"),
        ({"offset": 8}, "too short"),
        ({"offset": -4}, "needs 12 bytes"),
        ({"length": 8}, "needs 12 bytes but declares 8"),
        ({"offset": "many"}, "unreadable offset"),
    ],
)
def test_bad_external_data(tmp_path: Path, entries: dict[str, object], sentence: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(12))
    with pytest.raises(ModelError, match=sentence):
        load(external(inner, **entries))


def test_links_may_not_lead_out_but_caches_may_link(tmp_path: Path) -> None:
    secret, inner, blobs = tmp_path / "secret", tmp_path / "inner", tmp_path / "blobs"
    inner.mkdir()
    blobs.mkdir()
    secret.write_bytes(bytes(12))
    path = external(inner)
    (inner / "weights.bin").unlink()
    (inner / "weights.bin").symlink_to(secret)
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)
    (inner / "weights.bin").unlink()
    (blobs / "b").write_bytes(np.array([1, 2, 3], np.float32).tobytes())
    path.replace(blobs / "a")
    (inner / "model.onnx").symlink_to(blobs / "a")
    (inner / "weights.bin").symlink_to(blobs / "b")
    np.testing.assert_array_equal(load(inner).constant("w"), [1, 2, 3])


def test_save_and_load_again(tmp_path: Path) -> None:
    proto = proto_of()
    proto.metadata_props.add(key="provenance", value="here")
    graph = load(written(tmp_path, proto))
    saved = graph.save(tmp_path / "out" / "copy.onnx")
    again = load(saved)
    assert again.fingerprint() == graph.fingerprint()
    assert again.model.metadata_props == {"provenance": "here"}
    assert [path.name for path in saved.parent.iterdir()] == ["copy.onnx"]
    onnx.checker.check_model(onnx.load(saved), full_check=True)


def test_save_carries_external_weights_along(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    graph = load(external(tmp_path / "in"))
    saved = graph.save(tmp_path / "out" / "model.onnx")
    (tmp_path / "in" / "weights.bin").unlink()
    np.testing.assert_array_equal(load(saved).constant("w"), [1, 2, 3])


def test_large_weights_go_beside_the_file(tmp_path: Path) -> None:
    weight = numbers(64, 64)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 64]) for name in "xy"]
    inner = helper.make_graph([node], "g", infos[:1], infos[1:], [numpy_helper.from_array(weight, "w")])
    graph = load(written(tmp_path, helper.make_model(inner, ir_version=8)))
    saved = graph.save(tmp_path / "out" / "model.onnx", external_above_bytes=1000)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert saved.stat().st_size < 1000
    again = load(saved)
    np.testing.assert_array_equal(again.constant("w"), weight)
    assert again.fingerprint() == graph.fingerprint()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    path = graph.save(tmp_path / "kept.onnx")
    before = path.read_bytes()
    graph.topological()[-1].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match="not valid ONNX"):
        graph.save(path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept.onnx", "model.onnx"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    graph = load(written(tmp_path, proto_of()))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        graph.save(tmp_path / "file" / "model.onnx")


def test_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = written(tmp_path, proto_of())
    code = "import sys; from rewriter.graph.onnx import load; sys.stdout.write(load(sys.argv[1]).fingerprint())"
    other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert other.stdout == load(path).fingerprint()


def test_fingerprint_sees_every_change(tmp_path: Path) -> None:
    base = load(written(tmp_path, proto_of())).fingerprint()
    seen = {base}
    for old, new in [("{1, 2, 3}", "{1, 2, 3.0000002}"), ("Relu", "Tanh"), ("4.0]", "5.0]"), ("float[N", "float[M")]:
        seen.add(load(written(tmp_path, proto_of(TEXT.replace(old, new)))).fingerprint())
    seen.add(load(written(tmp_path, proto_of(TEXT.replace("t = ", "t2 = ").replace("(t,", "(t2,")))).fingerprint())
    assert len(seen) == 6
    assert load(external(tmp_path)).fingerprint() == base


def test_subgraphs_read_what_is_around_them(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[3] x, bool c) => (float[3] y) {
      a = Neg(x)
      y = If(c) <then_branch = t () => (float[3] p) { p = Abs(a) }, else_branch = e () => (float[3] q) { q = Abs(x) }>
    }"""
    graph = load(written(tmp_path, proto_of(text)))
    assert reads(graph.topological()[1]) == ["c", "a", "x"]
    assert set(graph.dataflow().predecessors("y")) == {"c", "a", "x"}


def run_or_refuse(path: Path) -> OnnxGraph | None:
    try:
        graph = load(path)
        graph.fingerprint()
        canonical(graph)
        list(legality_problems(graph))
        Interpreter(graph).run({"x": numbers(2, 3)})
    except UserError as error:
        assert str(error)
        return None
    return graph


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from(["set", "cut", "insert", "delete"]),
)
def test_any_damage_is_a_sentence_never_a_traceback(tmp_path: Path, edits: list[tuple[int, int]], action: str) -> None:
    content = bytearray(proto_of().SerializeToString())
    for place, value in edits:
        at = place % len(content)
        if action == "set":
            content[at] = value
        elif action == "insert":
            content.insert(at, value)
        elif action == "delete":
            del content[at]
        else:
            content = content[: at + 1]
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(content))
    run_or_refuse(path)

"""Reading model files: every kind of bad file gets a sentence."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rewriter.core.errors import ModelError, UserError
from rewriter.graph.canonical import canonical
from rewriter.graph.checks import legality_problems
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, load
from tests.graph.files import FUNCTION, external, proto_of, written
from tests.graph.harness import numbers


def _node_type(proto: onnx.ModelProto, op: str, *attributes: onnx.AttributeProto) -> None:
    proto.graph.node[0].op_type = op
    proto.graph.node[0].attribute.extend(attributes)


def _set(holder: object, **fields: object) -> None:
    for name, value in fields.items():
        setattr(holder, name, value)


def _sparse_constant(proto: onnx.ModelProto) -> None:
    _node_type(proto, "Constant", onnx.AttributeProto(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR))
    proto.graph.node[0].attribute[0].sparse_tensor.SetInParent()
    proto.graph.node[0].ClearField("input")


def _sizes(proto: onnx.ModelProto, *sizes: int) -> None:
    proto.graph.input[0].type.tensor_type.shape.ClearField("dim")
    for size in sizes:
        proto.graph.input[0].type.tensor_type.shape.dim.add(dim_value=size)


Damage = Callable[[onnx.ModelProto], object]
DAMAGE: list[tuple[Damage, str]] = [
    (lambda m: m.graph.ClearField("output"), "the graph has no outputs"),
    (lambda m: m.graph.node[0].input.__setitem__(0, "s"), "has a cycle"),
    (lambda m: m.graph.node[2].input.__setitem__(0, "ghost"), "reads 'ghost', which nothing defines"),
    (lambda m: _set(m.graph.output[0], name="ghost"), "nothing computes the output 'ghost'"),
    (lambda m: m.graph.node[3].output.__setitem__(0, "t"), "defines 't' more than once"),
    (lambda m: _set(m.opset_import[0], version=999), "uses opset 999, newest known is"),
    (lambda m: m.ClearField("opset_import"), "does not say which opset"),
    (lambda m: _set(m, ir_version=999), "has IR version 999"),
    (lambda m: _set(m.graph.node[2], domain="org.example"), "operator org.example::Mul .* unknown domain"),
    (lambda m: m.graph.initializer[0].dims.__setitem__(0, 5), "has 3 of 5 items"),
    (lambda m: m.graph.initializer[0].dims.__setitem__(0, 2**50), "impossible shape"),
    (lambda m: m.graph.initializer[0].dims.__setitem__(0, -3), "impossible shape"),
    (lambda m: _set(m.graph.initializer[0], data_type=77), "unknown dtype 77"),
    (lambda m: _set(m.graph.initializer[0], name=""), "without a name"),
    (lambda m: m.graph.sparse_initializer.add(), "has sparse weights"),
    (lambda m: m.graph.input[0].type.sequence_type.SetInParent(), "the input 'x' is not a tensor"),
    (lambda m: _set(m.graph.input[0].type.tensor_type, elem_type=0), "the input 'x' has no known dtype"),
    (lambda m: m.graph.node[2].input.__setitem__(0, ""), r"\(Mul\) lacks its input 0"),
    (lambda m: m.graph.node[2].input.pop(), r"\(Mul\) lacks its input 1"),
    (lambda m: _node_type(m, "Cast"), r"node 'a' \(Cast\) lacks its attribute 'to'"),
    (lambda m: _node_type(m, "Cast", helper.make_attribute("to", "float")), "'to' of node 'a' has a wrong type"),
    (lambda m: _node_type(m, "Relu", helper.make_attribute("to", 1)), "has the attribute 'to', unknown in opset 17"),
    (lambda m: _sizes(m, -3), r"the input 'x' declares the impossible sizes \[-3\]"),
    (lambda m: _sizes(m, 2**40), "the input 'x' declares the impossible sizes"),
    (_sparse_constant, "has sparse weights"),
]


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


def test_functions_that_call_themselves_or_grow_without_measure(tmp_path: Path) -> None:
    cycle = proto_of(FUNCTION)
    cycle.functions[0].node[0].op_type = "twice"
    cycle.functions[0].node[0].domain = "local"
    cycle.functions[0].opset_import.add(domain="local", version=1)
    with pytest.raises(ModelError, match="the function local::twice calls itself"):
        load(written(tmp_path, cycle))
    bomb = proto_of(FUNCTION)
    for depth in range(30):
        wider = bomb.functions.add()
        wider.CopyFrom(bomb.functions[0])
        wider.name = f"twice{depth}"
        inner = f"twice{depth - 1}" if depth else "twice"
        wider.ClearField("node")
        wider.node.add(op_type=inner, domain="local", input=["a"], output=["m"])
        wider.node.add(op_type=inner, domain="local", input=["m"], output=["b"])
        wider.opset_import.add(domain="local", version=1)
    bomb.graph.node[0].op_type = "twice29"
    with pytest.raises(ModelError, match="its functions make 1073741825 nodes"):
        load(written(tmp_path, bomb))


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


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE, ids=[sentence for _, sentence in DAMAGE])
def test_malformed_models(tmp_path: Path, damage: Damage, sentence: str) -> None:
    proto = proto_of()
    damage(proto)
    with pytest.raises(ModelError, match=sentence):
        load(written(tmp_path, proto))


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
    weight = graph.constant("w")
    assert weight is not None
    owner: object = weight
    while not isinstance(owner, mmap.mmap):
        assert not (isinstance(owner, np.ndarray) and owner.flags.owndata)
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    (tmp_path / "weights.bin").unlink()
    np.testing.assert_array_equal(weight, [1, 2, 3])
    found = Interpreter(graph).run({"x": np.ones((1, 3), np.float32)})
    assert found["y"].tolist() == [[2.0, 4.0, 7.0]]


def test_external_data_at_odd_places_and_of_four_bits(tmp_path: Path) -> None:
    proto = proto_of()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    packed = proto.graph.initializer.add(name="few", data_type=TensorProto.INT4, dims=[3])
    packed.data_location = TensorProto.EXTERNAL
    for target, offset, length in ((tensor, 1, 12), (packed, 13, 2)):
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", length)):
            target.external_data.add(key=key, value=str(value))
    content = b"\0" + np.array([1, 2, 3], np.float32).tobytes() + bytes([0x21, 0x0F])
    (tmp_path / "weights.bin").write_bytes(content)
    graph = load(written(tmp_path, proto))
    np.testing.assert_array_equal(graph.constant("w"), [1, 2, 3])
    few = graph.constant("few")
    assert few is not None
    assert few.astype(int).tolist() == [1, 2, -1]


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

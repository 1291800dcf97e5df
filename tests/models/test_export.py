"""Exports by each exporter, compared with torch."""

from functools import partial

import onnx
import pytest

from models.export import deviation, export
from models.families import FAMILIES
from models.families.family import Family


@pytest.mark.parametrize(
    ("name", "form", "variant"),
    [
        ("bert", "sdpa", "l17"),
        ("llama_past", "eager", "l17"),
        ("packed_unbind", "sdpa", "d23"),
        ("torch_mha_weights", "eager", "s18"),
    ],
)
def test_exports_are_right(name, form, variant, tmp_path, capfd):
    path = tmp_path / "model.onnx"
    example = export(partial(FAMILIES[name].build, form), variant, path)
    assert deviation(example, path) < 1e-5
    model = onnx.load(path)
    assert [item.version for item in model.opset_import if item.domain == ""] == [int(variant[1:])]
    assert model.graph.output[0].name == "o0"
    axes = [axis.dim_param for value in model.graph.input for axis in value.type.tensor_type.shape.dim]
    assert any(axes) == (variant[0] != "s")
    assert capfd.readouterr().out == ""


def test_an_unknown_variant_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown variant 'x18': write one like l17"):
        export(FAMILIES["bert"].build, "x18", tmp_path / "model.onnx")


def test_an_output_that_does_not_vary_proves_nothing(tmp_path):
    path = tmp_path / "model.onnx"
    flat = Family("flat", FAMILIES["packed_chunk"].make, 1)
    example = export(flat.build, "l17", path)
    for parameter in example.module.parameters():
        parameter.data.zero_()
    silent = type(example)(example.module, tuple(tensor * 0 for tensor in example.inputs), example.names, example.axes)
    with pytest.raises(ValueError, match="does not vary"):
        deviation(silent, path)

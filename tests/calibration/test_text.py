"""Text files through a tokenizer."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from rewriter.calibration.data import load_data
from rewriter.core.errors import DataError
from rewriter.graph.onnx import TensorSpec


def spec(name, *shape, dtype=np.int64):
    return TensorSpec(name, np.dtype(dtype), shape or ("batch", "sequence"))


SPECS = [spec("input_ids"), spec("attention_mask")]


@pytest.fixture
def tokenizer(tmp_path):
    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *(f"w{i}" for i in range(60))])}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.enable_truncation(9)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


def write(tmp_path, name, lines):
    path = tmp_path / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_lines_become_padded_ids(tmp_path, tokenizer):
    path = write(tmp_path, "data.txt", ["w0 w1", "", *(["w2 w3 w4"] * 39), "w5 " * 20])
    data = load_data(path, SPECS, tokenizer)
    assert len(data) == 41 and data.inputs["input_ids"].shape == (41, 9)
    assert data.inputs["input_ids"][0].tolist() == [2, 3] + [1] * 7
    assert data.lengths().tolist() == [2] + [3] * 39 + [9]


def test_a_fixed_length_model_gets_its_length_and_dtype(tmp_path, tokenizer):
    path = write(tmp_path, "data.txt", ["w0 w1 w2 w3 w4 w5 w6"] * 32)
    specs = [
        spec("input_ids", "batch", 5, dtype=np.int32),
        spec("position_ids", "batch", 5),
        spec("token_type_ids", "batch", 5),
    ]
    data = load_data(path, specs, tokenizer)
    assert data.inputs["input_ids"].shape == (32, 5) and data.inputs["input_ids"].dtype == np.int32
    assert data.inputs["position_ids"][3].tolist() == [0, 1, 2, 3, 4] and not data.inputs["token_type_ids"].any()


def test_fields_of_json_lines(tmp_path, tokenizer):
    records = [
        {"text": f"w{i}", "label": "good" if i % 2 else "bad", "split": "certify", "group": i // 2} for i in range(40)
    ]
    records[0].pop("label")
    records[3].pop("group")
    data = load_data(write(tmp_path, "data.jsonl", map(json.dumps, records)), SPECS, tokenizer)
    assert data.labels[:4].tolist() == [-1, 1, 0, 1] and set(data.split) == {2}
    assert data.group[4] == data.group[5] and len(np.unique(data.group)) == 21


def test_pairs_are_encoded_together(tmp_path, tokenizer):
    lines = [json.dumps({"text": "w0 w1", "text_pair": f"w{i}", "label": i}) for i in range(40)]
    data = load_data(write(tmp_path, "data.jsonl", lines), [*SPECS, spec("token_type_ids")], tokenizer)
    assert data.inputs["token_type_ids"][0].tolist() == [0, 0, 1] and data.labels.tolist() == list(range(40))


def problem(tmp_path, name, content, tokenizer, specs=SPECS):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        load_data(path, specs, tokenizer)
    return str(raised.value)


def test_each_problem_has_its_sentence(tmp_path, tokenizer):
    assert "is text, which needs a tokenizer" in problem(tmp_path, "a.txt", b"w1", None)
    assert "has no tokenizer.json" in problem(tmp_path, "a.txt", b"w1", tmp_path)
    assert "is empty" in problem(tmp_path, "a.txt", b"\n \n", tokenizer)
    assert "is not UTF-8 text (byte 1)" in problem(tmp_path, "a.txt", b"a\xff", tokenizer)
    assert "1 samples are too few" in problem(tmp_path, "a.txt", b"w1", tokenizer)
    assert "line 2 is not JSON" in problem(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text', tokenizer)
    assert "line 1 has no field text; it has sentence" in problem(tmp_path, "a.jsonl", b'{"sentence": "a"}', tokenizer)
    assert "line 1 has no text" in problem(tmp_path, "a.jsonl", b'{"text": 3}', tokenizer)
    assert "unknown one. Use calibrate" in problem(tmp_path, "a.jsonl", b'{"text": "a", "split": "x"}', tokenizer)
    assert "input 'pixels' cannot be made from text" in problem(
        tmp_path, "a.txt", b"w1", tokenizer, [*SPECS, spec("pixels")]
    )


def test_a_malformed_tokenizer(tmp_path, tokenizer):
    (tokenizer / "tokenizer.json").write_text("{}")
    assert "is no tokenizer" in problem(tmp_path, "a.txt", b"w1", tokenizer)

"""Text as model inputs, by the model's own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.calibration.dataset import UNLABELLED, Array
from rewriter.core.errors import DataError
from rewriter.graph.onnx import TensorSpec

LONGEST = 512
SPLITS = {"calibrate": 0, "select": 1, "certify": 2}
SOURCES = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def tokenized(path: Path, graph_inputs: Sequence[TensorSpec], folder: Path | None) -> dict[str, Array]:
    """Arrays for the model's inputs, padded to one length, plus labels, split and group where the file has them.

    The length is the model's fixed sequence length, or else that of the longest text within the tokenizer's own limit
    (512 if it has none). Raises `DataError`.
    """
    if folder is None:
        raise DataError(
            f"{path} is text, which needs a tokenizer", "Give the folder of its tokenizer.json: --tokenizer DIR"
        )
    strange = [spec.name for spec in graph_inputs if spec.name not in SOURCES]
    if strange:
        raise DataError(f"input {strange[0]!r} cannot be made from text", "Give a .npz with one array per input")
    records = _records(path)
    texts = [(r["text"], r["text_pair"]) if "text_pair" in r else r["text"] for r in records]
    ids = next((spec for spec in graph_inputs if spec.name == "input_ids"), graph_inputs[0])
    arrays = _encode(texts, folder, ids.shape[1] if len(ids.shape) == 2 else None)
    return {spec.name: arrays[spec.name].astype(spec.dtype) for spec in graph_inputs} | _annotations(records, path)


def _encode(texts: Sequence[Any], folder: Path, fixed: int | str | None) -> dict[str, Array]:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{folder} has no tokenizer.json", "Give the folder that holds the model's tokenizer files")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as problem:  # the library raises bare Exception for any malformed file
        raise DataError(f"{file} is no tokenizer: {problem}", "Give the tokenizer files of this model") from problem
    limit = fixed if isinstance(fixed, int) else (tokenizer.truncation or {}).get("max_length", LONGEST)
    tokenizer.enable_truncation(limit)
    pad = tokenizer.padding or {"pad_id": tokenizer.token_to_id("[PAD]") or 0, "pad_token": "[PAD]"}
    tokenizer.enable_padding(
        pad_id=pad["pad_id"], pad_token=pad["pad_token"], length=fixed if isinstance(fixed, int) else None
    )
    encodings = tokenizer.encode_batch(list(texts))
    ids_NS = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
    return {
        "input_ids": ids_NS,
        "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
        "token_type_ids": np.array([encoding.type_ids for encoding in encodings], dtype=np.int64),
        "position_ids": np.broadcast_to(np.arange(ids_NS.shape[1]), ids_NS.shape).copy(),
    }


def _records(path: Path) -> list[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not UTF-8 text (byte {problem.start})", "Save it as UTF-8") from problem
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path} is empty", "Give one text per line")
    if path.suffix == ".txt":
        return [{"text": line} for _, line in numbered]
    return [_record(line, f"{path}, line {number}") for number, line in numbered]


def _record(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as problem:
        raise DataError(f"{where} is not JSON: {problem.msg}", 'Write {"text": "..."} on each line') from problem
    if not isinstance(record, dict) or not all(isinstance(record.get(key, ""), str) for key in ("text", "text_pair")):
        raise DataError(f"{where} has no text", 'Write {"text": "..."} on each line')
    if "text" not in record:
        raise DataError(f"{where} has no field text; it has {', '.join(record) or 'none'}", 'Write {"text": "..."}')
    return record


def _annotations(records: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Array]:
    found: dict[str, Array] = {}
    labels = [record.get("label") for record in records]
    if any(label is not None for label in labels):
        found["labels"] = _labels(labels)
    if any("split" in record for record in records):
        values = [SPLITS.get(str(record.get("split")), record.get("split")) for record in records]
        if not all(isinstance(value, int) for value in values):
            raise DataError(f"{path}: some lines have no split, or an unknown one", f"Use {', '.join(SPLITS)}")
        found["split"] = np.array(values, dtype=np.int64)
    if any("group" in record for record in records):
        # A text without a group is a document of its own.
        found["group"] = np.array([str(r["group"]) if "group" in r else f"\0{i}" for i, r in enumerate(records)])
    return found


def _labels(labels: Sequence[Any]) -> Array:
    """Class numbers as they are; names numbered in alphabetical order; -1 where there is none."""
    given = [label for label in labels if label is not None]
    if all(isinstance(label, int) for label in given):
        return np.array([UNLABELLED if label is None else label for label in labels], dtype=np.int64)
    numbers = {name: number for number, name in enumerate(sorted({str(label) for label in given}))}
    return np.array([UNLABELLED if label is None else numbers[str(label)] for label in labels], dtype=np.int64)

"""A tiny sentence encoder with data, shared by the tests of the whole product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.attention.exported import COMMON, export, randomise, tokens

SAMPLES, LENGTH, CLASSES = 240, 16, 3


class SentenceEncoder(nn.Module):
    """BERT with mean pooling and unit length, like the sentence encoders people use."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(**COMMON, attn_implementation="eager", pad_token_id=0)
        torch.manual_seed(0)
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=1e-12)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the exported encoder; in its folder lie a config and a tokenizer file, as Optimum writes them."""
    folder = tmp_path_factory.mktemp("encoder")
    ids = tokens(2, 9)
    graph = export(randomise(SentenceEncoder()), (ids, torch.ones_like(ids)), ("input_ids", "attention_mask"))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "vocab.txt").write_text("[PAD]\n")
    return graph.save(folder / "model.onnx")


@pytest.fixture(scope="session")
def encoder_arrays() -> dict[str, np.ndarray]:
    """Samples whose class decides which tokens are likely, with right padding."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, SAMPLES)
    span = (COMMON["vocab_size"] - 3) // CLASSES
    ids = rng.integers(0, span, (SAMPLES, LENGTH)) + 3 + span * labels[:, None]
    common = rng.random((SAMPLES, LENGTH)) < 0.5
    ids = np.where(common, rng.integers(3, COMMON["vocab_size"], (SAMPLES, LENGTH)), ids)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, SAMPLES)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="session")
def encoder_data(encoder_arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples as data.npz."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **encoder_arrays)
    return path

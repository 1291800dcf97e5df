"""Encoder-decoders: self- and cross-attention, relative bias, and one decoding step with both caches."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from models.families.family import (
    BATCH,
    HEAD_DIM,
    HEADS,
    INNER,
    LAYERS,
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
    token_ids,
)

DECODED: Axes = {0: "batch", 1: "dseq"}
FRAMES, DONE = 16, 5
BART_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
}


class DecodingStep(nn.Module):
    """Whisper's decoder for one token: per layer the caches self k, self v, cross k, cross v come in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, encoded: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """Cache tensors are (B, H, past, D); the hidden state and the grown self caches come out."""
        layers = range(len(cache) // 4)
        own = DynamicCache([(cache[4 * i], cache[4 * i + 1]) for i in layers])
        cross = DynamicCache([(cache[4 * i + 2], cache[4 * i + 3]) for i in layers])
        result = self.model.decoder(
            input_ids=ids,
            encoder_hidden_states=encoded,
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
        )
        grown = result.past_key_values.self_attention_cache.layers
        return result[0], *(tensor for layer in grown for tensor in (layer.keys, layer.values))


def _text_to_text(name: str, model: Any, **options: Any) -> Family:
    def make(form: Form) -> Example:
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        module = ByName(create(model, model.config_class(**options), form), names, use_cache=False)
        return Example(module, (token_ids(), padding(), token_ids(7)), names, (TEXT, TEXT, DECODED))

    return Family(name, make, 3 * LAYERS, name)


def _whisper(form: Form) -> nn.Module:
    config = tf.WhisperConfig(
        num_mel_bins=8,
        max_source_positions=FRAMES,
        max_target_positions=32,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **SPECIAL,
        **BART_SIZES,
    )
    return create(tf.WhisperModel, config, form)


def _whisper_whole(form: Form) -> Example:
    names = ("input_features", "decoder_input_ids")
    inputs = (torch.randn(BATCH, 8, 2 * FRAMES), token_ids(7))
    return Example(ByName(_whisper(form), names, use_cache=False), inputs, names, ({0: "batch"}, DECODED))


def _whisper_step(form: Form) -> Example:
    cache: list[Tensor] = []
    names: list[str] = ["ids", "encoded"]
    axes: list[Axes] = [{0: "batch"}, {0: "batch"}]
    for layer in range(LAYERS):
        for kind, length in (("self", DONE), ("cross", FRAMES)):
            for part in "kv":
                cache.append(torch.randn(BATCH, HEADS, length, HEAD_DIM))
                names.append(f"{kind}_{part}{layer}")
                axes.append({0: "batch", 2: "past"} if kind == "self" else {0: "batch"})
    inputs = (token_ids(1), torch.randn(BATCH, FRAMES, WIDTH), *cache)
    return Example(DecodingStep(_whisper(form)), inputs, tuple(names), tuple(axes))


ENCODER_DECODERS = (
    _text_to_text(
        "t5",
        tf.T5Model,
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=HEAD_DIM,
        d_ff=INNER,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        use_cache=False,
    ),
    _text_to_text("bart", tf.BartModel, max_position_embeddings=64, use_cache=False, **BART_SIZES),
    Family("whisper", _whisper_whole, 3 * LAYERS, "bart"),
    Family("whisper_dec_past", _whisper_step, 2 * LAYERS, "bart", past=True),
)

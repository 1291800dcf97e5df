"""Speech encoders: convolutional front ends, and relative positions with two biases (Transformer-XL style)."""

from __future__ import annotations

import torch
import transformers as tf

from models.families.family import (
    BATCH,
    HEADS,
    INNER,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Axes,
    ByName,
    Example,
    Family,
    Form,
    create,
)

SAMPLES = 800
WAVEFORM = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    "layerdrop": 0.0,
}


def _waveform_example(module: torch.nn.Module, axes: Axes) -> Example:
    names = ("input_values",)
    return Example(ByName(module, names), (torch.randn(BATCH, SAMPLES),), names, (axes,))


def _wav2vec2(form: Form) -> Example:
    model = create(tf.Wav2Vec2Model, tf.Wav2Vec2Config(**WAVEFORM), form)
    return _waveform_example(model, {0: "batch", 1: "samples"})


def _conformer(form: Form) -> Example:
    config = tf.Wav2Vec2ConformerConfig(position_embeddings_type="relative", conv_depthwise_kernel_size=5, **WAVEFORM)
    return _waveform_example(create(tf.Wav2Vec2ConformerModel, config, "eager"), {0: "batch"})


SPEECH = (
    Family("wav2vec2", _wav2vec2, LAYERS),
    Family("conformer_rel", _conformer, LAYERS, "conformer", sdpa=False),
)

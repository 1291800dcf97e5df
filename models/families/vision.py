"""Vision: patches with a class token, shifted windows, reduced keys, convolution mixed with attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from transformers.models.sam.modeling_sam import SamVisionEncoder

from models.families.family import (
    BATCH,
    HEADS,
    INNER,
    LAYERS,
    WIDTH,
    ByName,
    Example,
    Family,
    Form,
    create,
)

PATCHES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": 32,
    "patch_size": 8,
}


def _vision(
    name: str,
    model: Any,
    attentions: int = LAYERS,
    ort_model_type: str = "vit",
    size: int = 32,
    sdpa: bool = True,
    **options: Any,
) -> Family:
    def make(form: Form) -> Example:
        return _image_example(ByName(create(model, model.config_class(**options), form), ("pixel_values",)), size)

    return Family(name, make, attentions, ort_model_type, sdpa)


def _image_example(module: torch.nn.Module, size: int) -> Example:
    return Example(module, (torch.randn(BATCH, 3, size, size),), ("pixel_values",), ({0: "batch"},))


def _sam(form: Form) -> Example:
    config = tf.SamVisionConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=64,
        patch_size=8,
        output_channels=16,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=INNER,
    )
    config._attn_implementation = form
    return _image_example(ByName(SamVisionEncoder(config), ("pixel_values",)), 64)


VISION = (
    _vision("vit", tf.ViTModel, **PATCHES),
    _vision("deit", tf.DeiTModel, **PATCHES),
    _vision("dinov2", tf.Dinov2Model, **PATCHES),
    _vision("clip_vision", tf.CLIPVisionModel, ort_model_type="clip", **PATCHES),
    _vision(
        "swin",
        tf.SwinModel,
        4,
        "swin",
        image_size=32,
        patch_size=2,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    _vision(
        "segformer",
        tf.SegformerModel,
        4,
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[4, 1],
        hidden_sizes=[24, 48],
        num_attention_heads=[2, 4],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
    ),
    _vision(
        "mobilevit",
        tf.MobileViTModel,
        9,
        size=128,
        sdpa=False,
        image_size=128,
        patch_size=2,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 16, 24, 32, 32, 40, 64],
        num_attention_heads=4,
        output_stride=32,
    ),
    Family("sam_vision", _sam, LAYERS, "sam2"),
)

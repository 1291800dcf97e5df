"""Detectors and readers of image features, nobody tuned on: queries that are learned, or made of boxes."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from models.families.family import BATCH, HEADS, INNER, LAYERS, SIZES, WIDTH, Example, Form, create
from models.families.heldout_common import First, HeldOut

PIXELS = (3, 64, 64)
DETECTOR = {
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "num_queries": 5,
}


def _resnet() -> Any:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic"}
    return tf.ResNetConfig(**sizes, out_features=["stage2"])


def _detector(
    name: str, kind: str, attentions: int, sdpa: bool = True, fields: tuple[str, ...] = (), **options: Any
) -> HeldOut:
    """An encoder over the pixels of a small convolutional network, and a decoder of learned queries.

    What the first layer of the decoder makes of queries alone is constant, and no attention in the graph.
    """

    def make(form: Form) -> Example:
        config = getattr(tf, kind + "Config")(backbone_config=_resnet(), **(DETECTOR | options))
        made = getattr(tf, kind + "Model")._from_config(
            config, attn_implementation={"": form, "backbone_config": "eager"}
        )
        names = ("pixel_values",)
        return Example(First(made, names, fields), (torch.randn(BATCH, *PIXELS),), names, ({0: "batch"},))

    return HeldOut(name, make, attentions, "vit", sdpa)


def _maskformer(form: Form) -> Example:
    decoder = tf.DetrConfig(**(DETECTOR | {"backbone_config": _resnet(), "encoder_layers": 0, "d_model": 64}))
    backbone = tf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = tf.MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=64, mask_feature_size=64
    )
    model = create(tf.MaskFormerModel, config, form)
    names = ("pixel_values",)
    fields = ("transformer_decoder_last_hidden_state",)
    return Example(First(model, names, fields), (torch.randn(BATCH, *PIXELS),), names, ({0: "batch"},))


def _mask2former(form: Form) -> Example:
    backbone = tf.SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = tf.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=INNER,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=HEADS,
        dim_feedforward=INNER,
        num_queries=5,
    )
    names = ("pixel_values",)
    module = First(create(tf.Mask2FormerModel, config, form), names, ("transformer_decoder_last_hidden_state",))
    return Example(module, (torch.randn(BATCH, *PIXELS),), names, ({0: "batch"},))


def _idefics_perceiver(form: Form) -> Example:
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = tf.IdeficsConfig(vision_config={"embed_dim": WIDTH}, hidden_size=WIDTH, num_attention_heads=HEADS)
    module = IdeficsPerceiverResampler(config, WIDTH, 2, HEADS, 12, 5)
    return Example(First(module, ("context",)), (torch.randn(BATCH, 10, WIDTH),), ("context",), ({0: "batch"},))


def _qformer(form: Form) -> Example:
    """Learned queries attending to image features every second layer."""
    config = tf.Blip2QFormerConfig(**(SIZES | {"encoder_hidden_size": 32, "cross_attention_frequency": 2}))
    module = First(create(tf.Blip2QFormerModel, config, form), ("query_embeds", "encoder_hidden_states"))
    inputs = (torch.randn(BATCH, 6, WIDTH), torch.randn(BATCH, 10, 32))
    return Example(module, inputs, ("query_embeds", "encoder_hidden_states"), ({0: "batch"}, {0: "batch", 1: "seq"}))


def _qwen2_vl(form: Form) -> Example:
    """Patches of one image as a sequence, rotated by two axes."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Vision

    config = tf.Qwen2VLConfig().vision_config
    config.update(
        {
            "depth": LAYERS,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "mlp_ratio": 2,
            "patch_size": 4,
            "in_channels": 3,
        }
    )
    names = ("hidden_states",)
    module = First(create(Vision, config, form), names, grid_thw=torch.tensor([[1, 4, 6]]))
    return Example(module, (torch.randn(24, 96),), names, ({},))


HELD_OUT_DETECTORS = (
    HeldOut("qwen2_vl_vision", _qwen2_vl, LAYERS),
    _detector("detr", "Detr", 5),
    _detector("conditional_detr", "ConditionalDetr", 5, num_attention_heads=HEADS),
    _detector(
        "deformable_detr",
        "DeformableDetr",
        1,
        fields=("last_hidden_state",),
        d_model=64,
        encoder_n_points=2,
        decoder_n_points=2,
        num_feature_levels=2,
    ),
    _detector("table_transformer", "TableTransformer", 5, sdpa=False),
    _detector("dab_detr", "DabDetr", 5, sdpa=False, hidden_size=WIDTH),
    HeldOut("maskformer", _maskformer, 7, sdpa=False),
    HeldOut("mask2former", _mask2former, 6, sdpa=False),
    HeldOut("idefics_perceiver", _idefics_perceiver, 2, sdpa=False),
    HeldOut("blip2_qformer", _qformer, 3, sdpa=False),
)

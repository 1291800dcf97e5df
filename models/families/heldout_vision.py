"""Vision and vision with text, nobody tuned on: windows, pyramids, detectors, queries that are learned, videos."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from models.families.family import BATCH, HEADS, INNER, LAYERS, SIZES, WIDTH, Example, Form, create
from models.families.heldout_common import First, HeldOut, values

PATCHES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "image_size": 32,
    "patch_size": 8,
}
SMALL, PIXELS = (3, 32, 32), (3, 64, 64)
VIDEO = {"image_size": 16, "patch_size": 8, "num_frames": 4}
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


def _detector(name: str, kind: str, attentions: int, sdpa: bool = True, **options: Any) -> HeldOut:
    """An encoder over the pixels of a small convolutional network, and a decoder of learned queries."""

    def make(form: Form) -> Example:
        config = getattr(tf, kind + "Config")(backbone_config=_resnet(), **(DETECTOR | options))
        made = getattr(tf, kind + "Model")._from_config(
            config, attn_implementation={"": form, "backbone_config": "eager"}
        )
        names = ("pixel_values",)
        return Example(First(made, names), (torch.randn(BATCH, *PIXELS),), names, ({0: "batch"},))

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


def _pair(name: str, kind: str, part: str, attentions: int = LAYERS, sdpa: bool = True, **options: Any) -> HeldOut:
    """The vision half of a model of images and text."""
    return values(name, kind, attentions, SMALL, model=part, sdpa=sdpa, config=kind + "Vision", **(PATCHES | options))


BEIT = PATCHES | {"out_indices": [0, 1], "use_relative_position_bias": True}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
PVT = {"num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [24, 48], "num_attention_heads": [2, 4]}
PYRAMID = PVT | {"mlp_ratios": [2, 2], "patch_sizes": [4, 2], "strides": [4, 2]}
DEPTH = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}

HELD_OUT_VISION = (
    values("beit", "Beit", 2, SMALL, **BEIT),
    values("data2vec_vision", "Data2VecVision", 2, SMALL, **BEIT),
    _detector("detr", "Detr", 6),
    _detector("conditional_detr", "ConditionalDetr", 6, num_attention_heads=HEADS),
    _detector(
        "deformable_detr", "DeformableDetr", 2, d_model=64, encoder_n_points=2, decoder_n_points=2, num_feature_levels=2
    ),
    _detector("table_transformer", "TableTransformer", 6, sdpa=False),
    _detector("dab_detr", "DabDetr", 6, sdpa=False, hidden_size=WIDTH),
    values("yolos", "Yolos", 2, SMALL, **(PATCHES | {"image_size": [32, 32], "num_detection_tokens": 5})),
    values("swinv2", "Swinv2", 4, SMALL, sdpa=False, **SWIN),
    values("donut_swin", "DonutSwin", 4, SMALL, sdpa=False, **SWIN),
    values(
        "cvt",
        "Cvt",
        4,
        PIXELS,
        sdpa=False,
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=[24, 48],
        num_heads=[2, 4],
        depth=[2, 2],
        mlp_ratio=[2.0, 2.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
    ),
    values("pvt", "Pvt", 4, PIXELS, sdpa=False, image_size=64, sequence_reduction_ratios=[2, 1], **PYRAMID),
    values(
        "pvt_v2",
        "PvtV2",
        4,
        PIXELS,
        sdpa=False,
        image_size=64,
        sr_ratios=[2, 1],
        num_encoder_blocks=2,
        depths=[2, 2],
        hidden_sizes=[24, 48],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
    ),
    values(
        "levit",
        "Levit",
        8,
        PIXELS,
        sdpa=False,
        image_size=64,
        num_channels=3,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 3, 4],
        depths=[2, 2, 2],
        key_dim=[8, 8, 8],
        drop_path_rate=0,
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
        down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
    ),
    values(
        "poolformer",
        "PoolFormer",
        0,
        PIXELS,
        sdpa=False,
        negative=True,
        depths=[1, 1],
        hidden_sizes=[16, 24],
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        mlp_ratio=2.0,
    ),
    values(
        "convnext", "ConvNext", 0, PIXELS, sdpa=False, negative=True, num_stages=2, hidden_sizes=[16, 24], depths=[1, 1]
    ),
    values(
        "focalnet",
        "FocalNet",
        0,
        PIXELS,
        sdpa=False,
        negative=True,
        image_size=64,
        embed_dim=16,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        hidden_sizes=[16, 32],
    ),
    values(
        "swiftformer",
        "SwiftFormer",
        0,
        PIXELS,
        sdpa=False,
        negative=True,
        image_size=64,
        depths=[1, 1, 1, 1],
        embed_dims=[16, 24, 24, 32],
    ),
    values(
        "mobilevitv2",
        "MobileViTV2",
        0,
        PIXELS,
        sdpa=False,
        negative=True,
        image_size=64,
        width_multiplier=0.25,
        n_attn_blocks=[1, 1, 1],
    ),
    values("vit_mae", "ViTMAE", 2, SMALL, **PATCHES, mask_ratio=0.0),
    values("vit_msn", "ViTMSN", 2, SMALL, **PATCHES),
    values(
        "vitdet",
        "VitDet",
        2,
        SMALL,
        sdpa=False,
        **PATCHES,
        use_relative_position_embeddings=True,
        window_block_indices=[0],
        window_size=2,
        pretrain_image_size=32,
    ),
    _pair("siglip", "Siglip", "VisionModel"),
    _pair("blip", "Blip", "VisionModel"),
    _pair("chinese_clip", "ChineseCLIP", "VisionModel"),
    _pair("owlvit", "OwlViT", "VisionModel"),
    _pair("altclip", "AltCLIP", "VisionModel"),
    _pair("clipseg", "CLIPSeg", "VisionModel"),
    values(
        "groupvit",
        "GroupViT",
        5,
        SMALL,
        model="VisionModel",
        config="GroupViTVision",
        sdpa=False,
        **(PATCHES | {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0]}),
    ),
    values("timesformer", "Timesformer", 4, (4, 3, 16, 16), sdpa=False, **(PATCHES | VIDEO)),
    values("videomae", "VideoMAE", 2, (4, 3, 16, 16), **(PATCHES | VIDEO | {"tubelet_size": 2})),
    values("vivit", "Vivit", 2, (4, 3, 16, 16), **(PATCHES | VIDEO | {"tubelet_size": [2, 8, 8]})),
    values(
        "dpt",
        "DPT",
        4,
        SMALL,
        model="ForDepthEstimation",
        **(
            PATCHES
            | DEPTH
            | {
                "num_hidden_layers": 4,
                "is_hybrid": False,
                "reassemble_factors": [4, 2, 1, 0.5],
                "backbone_config": None,
            }
        ),
    ),
    values(
        "glpn",
        "GLPN",
        4,
        PIXELS,
        sdpa=False,
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[4, 1],
        hidden_sizes=[24, 48],
        num_attention_heads=[2, 4],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
    ),
    HeldOut("maskformer", _maskformer, 8, sdpa=False),
    HeldOut("mask2former", _mask2former, 6, sdpa=False),
    values(
        "hiera",
        "Hiera",
        3,
        SMALL,
        sdpa=False,
        image_size=[32, 32],
        embed_dim=24,
        depths=[1, 1, 1],
        num_heads=[1, 2, 4],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        query_stride=[2, 2],
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, True, False],
        embed_dim_multiplier=2,
        num_query_pool=2,
    ),
    values("ijepa", "IJepa", 2, SMALL, **PATCHES),
    values("dinov3", "DINOv3ViT", 2, SMALL, **PATCHES, num_register_tokens=2),
    values("dinov2_registers", "Dinov2WithRegisters", 2, SMALL, **PATCHES, num_register_tokens=2),
    values("aimv2", "Aimv2", 2, SMALL, model="VisionModel", config="Aimv2Vision", **PATCHES, use_head=False),
    values(
        "llama4_vision",
        "Llama4",
        2,
        SMALL,
        model="VisionModel",
        config="Llama4Vision",
        pixel_shuffle_ratio=0.5,
        projector_input_dim=32,
        projector_output_dim=32,
        vision_output_dim=32,
        **(PATCHES | {"intermediate_size": 192}),
    ),
    values("pixtral", "Pixtral", 2, SMALL, model="VisionModel", config="PixtralVision", **PATCHES),
    values(
        "internvl",
        "InternVL",
        2,
        SMALL,
        model="VisionModel",
        config="InternVLVision",
        **(PATCHES | {"image_size": [32, 32], "patch_size": [8, 8], "use_qk_norm": True}),
    ),
    values(
        "sam2_hiera",
        "Sam2HieraDet",
        4,
        PIXELS,
        config="Sam2HieraDet",
        hidden_size=24,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[24, 48, 96, 192],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[4, 4, 4, 4],
        window_positional_embedding_background_size=[4, 4],
        global_attention_blocks=[],
    ),
    values(
        "swin2sr",
        "Swin2SR",
        4,
        SMALL,
        sdpa=False,
        image_size=32,
        patch_size=1,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
    ),
    values(
        "vitpose",
        "VitPoseBackbone",
        2,
        SMALL,
        model="",
        config="VitPoseBackbone",
        **(PATCHES | {"image_size": [32, 32], "patch_size": [8, 8]}),
    ),
    values(
        "mgp_str",
        "MgpstrFor",
        2,
        (3, 8, 32),
        model="SceneTextRecognition",
        config="Mgpstr",
        sdpa=False,
        **(
            PATCHES
            | {
                "image_size": [8, 32],
                "patch_size": 4,
                "max_token_length": 5,
                "num_character_labels": 9,
                "num_bpe_labels": 9,
                "num_wordpiece_labels": 9,
            }
        ),
    ),
    values(
        "vjepa2",
        "VJEPA2",
        2,
        (4, 3, 32, 32),
        input_name="pixel_values_videos",
        patch_size=8,
        crop_size=32,
        frames_per_clip=4,
        tubelet_size=2,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        mlp_ratio=2.0,
        fixed={"skip_predictor": True},
    ),
    HeldOut("qwen2_vl_vision", _qwen2_vl, LAYERS),
    HeldOut("idefics_perceiver", _idefics_perceiver, 2, sdpa=False),
    HeldOut("blip2_qformer", _qformer, 3, sdpa=False),
)

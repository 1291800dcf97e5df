"""Text encoders and encoder-decoders nobody tuned on: sparse, local, relative, convolutional, hashed, pooled."""

from __future__ import annotations

from typing import Any

import torch

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
    Example,
    Form,
    padding,
    token_ids,
)
from models.families.heldout_common import First, HeldOut, model_of, text

PLAIN = SIZES | SPECIAL
XLNET = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "d_inner": INNER,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
XLM = {"vocab_size": VOCABULARY, "emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS}
XLM |= {"max_position_embeddings": 64, "pad_index": 0, "bos_index": 1, "eos_index": 2, "mask_token_id": 5}
FUNNEL = {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_head": HEADS, "d_head": HEAD_DIM, "d_inner": INNER}
FUNNEL |= {"block_sizes": [1, 1], "num_decoder_layers": 1}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
} | SPECIAL
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": HEAD_DIM,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
T5GEMMA_SIDE = PLAIN | {"num_key_value_heads": 2, "head_dim": HEAD_DIM, "query_pre_attn_scalar": 16}
T5GEMMA_SIDE |= {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
T2T = ("input_ids", "attention_mask", "decoder_input_ids")


def two_texts(name: str, kind: str, attentions: int = 3 * LAYERS, /, **options: Any) -> HeldOut:
    """Encoder and decoder, no cache."""
    return text(name, kind, attentions, names=T2T, fixed={"use_cache": False}, **({"sizes": BART} | options))


def _boxes(kind: str, **options: Any) -> Any:
    """Ids, a mask and a box for every token."""

    def make(form: Form) -> Example:
        names = ("input_ids", "attention_mask", "bbox")
        low = torch.randint(0, 30, (BATCH, 10, 2))
        box = torch.cat([low, low + torch.randint(1, 20, (BATCH, 10, 2))], -1)
        module = First(model_of(kind, form, **(PLAIN | options)), names)
        return Example(module, (token_ids(), padding(), box), names, (TEXT, TEXT, TEXT))

    return make


def _luke(form: Form) -> Example:
    """Words and entities, each attending to both with queries of their own."""
    names = ("input_ids", "attention_mask", "entity_ids", "entity_attention_mask", "entity_position_ids")
    sizes = PLAIN | {"entity_vocab_size": 20, "entity_emb_size": 16}
    module = First(model_of("Luke", form, **sizes), names, ("last_hidden_state", "entity_last_hidden_state"))
    places = torch.full((BATCH, 3, 5), -1)
    places[:, :, 0] = torch.tensor([1, 3, 5])
    inputs = (token_ids(), padding(), torch.randint(1, 20, (BATCH, 3)), torch.ones(BATCH, 3).long(), places)
    return Example(module, inputs, names, (TEXT, TEXT, {0: "batch"}, {0: "batch"}, {0: "batch"}))


def _perceiver(form: Form) -> Example:
    """Latents that attend to embedded inputs, then to themselves."""
    sizes = {"num_latents": 6, "d_latents": WIDTH, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2}
    sizes |= {"num_self_attention_heads": HEADS, "num_cross_attention_heads": HEADS}
    module = First(model_of("Perceiver", form, **sizes), ("inputs",))
    return Example(module, (torch.randn(BATCH, 10, 32),), ("inputs",), ({0: "batch", 1: "seq"},))


HELD_OUT_TEXT = (
    text("ernie", "Ernie", sizes=PLAIN),
    text("electra", "Electra", embedding_size=24),
    text("convbert", "ConvBert", sdpa=False, embedding_size=24, conv_kernel_size=3, head_ratio=2),
    text("xlnet", "XLNet", sizes=XLNET, sdpa=False),
    text("xlm", "XLM", sizes=XLM, sdpa=False),
    text("flaubert", "Flaubert", sizes=XLM, sdpa=False),
    text("funnel", "Funnel", 3, sizes=FUNNEL, sdpa=False),
    text(
        "fnet",
        "FNet",
        0,
        names=("input_ids",),
        sdpa=False,
        negative=True,
        sizes={k: v for k, v in SIZES.items() if "heads" not in k} | {"tpu_short_seq_length": 10},
    ),
    text(
        "nystromformer",
        "Nystromformer",
        sdpa=False,
        num_landmarks=10,
        segment_means_seq_len=10,
        tokens=10,
        conv_kernel_size=3,
    ),
    text(
        "nystromformer_landmarks",
        "Nystromformer",
        6,
        sdpa=False,
        num_landmarks=4,
        segment_means_seq_len=16,
        tokens=16,
        conv_kernel_size=3,
    ),
    text("longformer", "Longformer", sdpa=False, sizes=PLAIN, attention_window=4, tokens=12),
    text("big_bird_full", "BigBird", sdpa=False, sizes=PLAIN, attention_type="original_full"),
    text(
        "big_bird_sparse",
        "BigBird",
        10,
        sdpa=False,
        sizes=PLAIN | {"max_position_embeddings": 128},
        tokens=96,
        attention_type="block_sparse",
        block_size=8,
        num_random_blocks=1,
    ),
    text("rembert", "RemBert", sdpa=False, input_embedding_size=24),
    text("mobilebert", "MobileBert", sdpa=False, embedding_size=24, intra_bottleneck_size=24, true_hidden_size=24),
    text("squeezebert", "SqueezeBert", sdpa=False, embedding_size=WIDTH),
    text("ibert", "IBert", sdpa=False, sizes=PLAIN, quant_mode=False),
    HeldOut("luke", _luke, LAYERS, sdpa=False),
    HeldOut("layoutlm", _boxes("LayoutLM", max_2d_position_embeddings=64), LAYERS, sdpa=False),
    HeldOut(
        "layoutlmv3",
        _boxes(
            "LayoutLMv3",
            max_2d_position_embeddings=64,
            coordinate_size=8,
            shape_size=8,
            visual_embed=False,
            rel_pos_bins=8,
            max_rel_pos=16,
            rel_2d_pos_bins=8,
            max_rel_2d_pos=16,
            has_relative_attention_bias=True,
            has_spatial_attention_bias=True,
        ),
        LAYERS,
        sdpa=False,
    ),
    HeldOut("lilt", _boxes("Lilt", channel_shrink_ratio=2, max_2d_position_embeddings=64), 2 * LAYERS - 1, sdpa=False),
    HeldOut("perceiver", _perceiver, 3, sdpa=False),
    text("splinter", "Splinter", sdpa=False),
    text("roformer", "RoFormer", sdpa=False, embedding_size=WIDTH),
    text("roformer_value", "RoFormer", sdpa=False, embedding_size=WIDTH, rotary_value=True),
    text("nomic_bert", "NomicBert", sizes=PLAIN),
    text("esm", "Esm", sizes=PLAIN | {"mask_token_id": 5}, position_embedding_type="rotary", token_dropout=False),
    text("megatron_bert", "MegatronBert", sdpa=False),
    text(
        "deberta",
        "Deberta",
        sdpa=False,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
    ),
    text("roc_bert", "RoCBert", enable_pronunciation=False, enable_shape=False),
    text(
        "canine",
        "Canine",
        5,
        sdpa=False,
        sizes={k: v for k, v in SIZES.items() if k != "vocab_size"},
        tokens=16,
        downsampling_rate=4,
        upsampling_kernel_size=4,
        num_hash_functions=4,
        num_hash_buckets=32,
        local_transformer_stride=8,
    ),
    text("tapas", "Tapas", sdpa=False, max_position_embeddings=64),
    text("xmod", "Xmod", default_language="en_XX", languages=("en_XX",), sizes=PLAIN),
    text("xlm_roberta_xl", "XLMRobertaXL", sizes=PLAIN),
    text("roberta_prelayernorm", "RobertaPreLayerNorm", sizes=PLAIN),
    text("data2vec_text", "Data2VecText", sizes=PLAIN),
    text("markuplm", "MarkupLM", sdpa=False, sizes=PLAIN),
    text("mra", "Mra", 0, sdpa=False, negative=True, sizes=PLAIN, block_per_row=2, tokens=64),
    text("yoso", "Yoso", 0, sdpa=False, sizes=PLAIN, use_expectation=True, negative=True),
    text("eurobert", "EuroBert", sizes=PLAIN, num_key_value_heads=2),
    text("gte", "Gte", sizes=PLAIN),
    text("jina_v3", "JinaEmbeddingsV3", sizes=PLAIN),
    text("dpr", "DPRQuestionEncoder", model="", config="DPR"),
    text("visual_bert", "VisualBert", sdpa=False, visual_embedding_dim=16),
    two_texts("marian", "Marian"),
    two_texts("pegasus", "Pegasus"),
    two_texts("mbart", "MBart"),
    two_texts("m2m100", "M2M100"),
    two_texts("blenderbot", "Blenderbot"),
    two_texts("plbart", "PLBart"),
    two_texts("nllb_moe", "NllbMoe", sdpa=False, num_experts=2, encoder_sparse_step=2, decoder_sparse_step=2),
    two_texts(
        "prophetnet",
        "ProphetNet",
        8,
        sdpa=False,
        sizes={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "num_encoder_layers": LAYERS,
            "num_decoder_layers": LAYERS,
            "num_encoder_attention_heads": HEADS,
            "num_decoder_attention_heads": HEADS,
            "max_position_embeddings": 64,
            "ngram": 2,
            "num_buckets": 8,
            "relative_max_distance": 16,
            "decoder_start_token_id": 1,
        }
        | SPECIAL,
    ),
    two_texts(
        "led",
        "LED",
        sdpa=False,
        sizes=BART
        | {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4},
        tokens=12,
    ),
    two_texts("bigbird_pegasus", "BigBirdPegasus", sdpa=False, attention_type="original_full"),
    two_texts("pegasus_x", "PegasusX", 8, sdpa=False, block_size=4, num_global_tokens=2, tokens=12),
    two_texts(
        "longt5_local", "LongT5", sdpa=False, sizes=T5, encoder_attention_type="local", local_radius=3, tokens=12
    ),
    two_texts(
        "longt5_tglobal",
        "LongT5",
        sdpa=False,
        sizes=T5,
        encoder_attention_type="transient-global",
        local_radius=3,
        global_block_size=3,
        tokens=12,
    ),
    two_texts("umt5", "UMT5", sdpa=False, sizes=T5),
    two_texts("mt5", "MT5", sdpa=False, sizes=T5, feed_forward_proj="gated-gelu"),
    two_texts(
        "switch",
        "SwitchTransformers",
        sdpa=False,
        sizes=T5,
        num_experts=2,
        expert_capacity=20,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    ),
    two_texts(
        "t5gemma",
        "T5Gemma",
        sdpa=False,
        sizes={"encoder": T5GEMMA_SIDE, "decoder": T5GEMMA_SIDE, "vocab_size": VOCABULARY},
    ),
    two_texts(
        "fsmt",
        "FSMT",
        sdpa=False,
        sizes={k: v for k, v in BART.items() if k != "vocab_size"}
        | {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
    ),
)

"""Decoders nobody tuned on: sinks, latent caches, other rotations, experts, state spaces mixed with attention."""

from __future__ import annotations

from typing import Any

import torch

from models.families.decoders import NEW, PAST, WithCache
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
    Example,
    Form,
    padding,
    token_ids,
)
from models.families.heldout_common import HeldOut, model_of, text

GROUPED = SIZES | SPECIAL | {"num_key_value_heads": 2}
GPT = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "num_key_value_heads": HEADS,
    "n_group": 1,
    "topk_group": 1,
}


def decoder(name: str, kind: str, attentions: int = LAYERS, /, **options: Any) -> HeldOut:
    """Without a cache; grouped heads unless said otherwise."""
    fixed = {"use_cache": False}
    return text(name, kind, attentions, fixed=fixed, **({"sizes": GROUPED} | options))


def cached(name: str, kind: str, kv_heads: int, dim: int, /, sdpa: bool = True, **options: Any) -> HeldOut:
    """With a key/value cache that grows by three tokens."""

    def make(form: Form) -> Example:
        cache = [torch.randn(BATCH, kv_heads, PAST, dim) for _ in range(2 * LAYERS)]
        mask_BT = torch.cat([padding(PAST, left=True), torch.ones(BATCH, NEW, dtype=torch.long)], 1)
        names = ("input_ids", "attention_mask", *(f"past_{part}{i}" for i in range(LAYERS) for part in "kv"))
        cache_axes: Axes = {0: "batch", 2: "past"}
        axes = (TEXT, {0: "batch", 1: "total"}, *[cache_axes] * (2 * LAYERS))
        return Example(WithCache(model_of(kind, form, **options)), (token_ids(NEW), mask_BT, *cache), names, axes)

    return HeldOut(name, make, LAYERS, "gpt2", sdpa, past=True)


PLAIN = SIZES | SPECIAL
GPTJ = GPT | {"rotary_dim": 4}
NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
} | SPECIAL
MPT = {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 64, "vocab_size": VOCABULARY}
XGLM = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "d_model": WIDTH,
    "ffn_dim": INNER,
    "num_layers": LAYERS,
    "attention_heads": HEADS,
} | SPECIAL
HYBRID = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2}

HELD_OUT_DECODERS = (
    decoder("gptj", "GPTJ", sizes=GPTJ, sdpa=False),
    decoder("codegen", "CodeGen", sizes=GPTJ, sdpa=False),
    decoder("cohere", "Cohere"),
    decoder("cohere2", "Cohere2", sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    decoder("olmo", "Olmo", clip_qkv=0.5),
    decoder("olmo2", "Olmo2"),
    decoder("olmo3", "Olmo3", sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    decoder("olmoe", "Olmoe", **EXPERTS),
    decoder("mpt", "Mpt", sizes=MPT, sdpa=False),
    decoder("starcoder2", "Starcoder2"),
    decoder("gpt_bigcode", "GPTBigCode", sizes=GPT),
    decoder("gemma", "Gemma", head_dim=HEAD_DIM),
    decoder(
        "gemma3",
        "Gemma3Text",
        head_dim=HEAD_DIM,
        sliding_window=4,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    decoder(
        "gemma3n",
        "Gemma3nText",
        head_dim=HEAD_DIM,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    decoder(
        "gpt_oss",
        "GptOss",
        sdpa=False,
        head_dim=HEAD_DIM,
        sliding_window=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    decoder("deepseek_v2", "DeepseekV2", **LATENT),
    decoder("deepseek_v3", "DeepseekV3", **LATENT),
    decoder("minicpm3", "MiniCPM3", **{k: v for k, v in LATENT.items() if "expert" not in k and "group" not in k}),
    decoder("mixtral", "Mixtral", num_local_experts=4),
    decoder("qwen2_moe", "Qwen2Moe", shared_expert_intermediate_size=32, **EXPERTS),
    decoder("qwen3_moe", "Qwen3Moe", head_dim=HEAD_DIM, **EXPERTS),
    decoder("phi", "Phi", partial_rotary_factor=0.5, qk_layernorm=True),
    decoder("phimoe", "Phimoe", num_local_experts=4),
    decoder("stablelm", "StableLm", partial_rotary_factor=0.5, qk_layernorm=True, use_qkv_bias=True),
    decoder("persimmon", "Persimmon", sizes=PLAIN, partial_rotary_factor=0.5, qk_layernorm=True),
    decoder("granite", "Granite", attention_multiplier=0.3),
    decoder("granitemoe", "GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    decoder("glm", "Glm", head_dim=HEAD_DIM, partial_rotary_factor=0.5),
    decoder("glm4", "Glm4", head_dim=HEAD_DIM, partial_rotary_factor=0.5),
    decoder("nemotron", "Nemotron", partial_rotary_factor=0.5),
    decoder("bitnet", "BitNet"),
    decoder("smollm3", "SmolLM3", no_rope_layers=[1, 0]),
    decoder("llama4", "Llama4Text", head_dim=HEAD_DIM, intermediate_size_mlp=INNER, num_local_experts=2),
    decoder("helium", "Helium", head_dim=HEAD_DIM),
    decoder("arcee", "Arcee"),
    decoder("apertus", "Apertus"),
    decoder("exaone4", "Exaone4", sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    decoder("seed_oss", "SeedOss", head_dim=HEAD_DIM),
    decoder("ernie4_5", "Ernie4_5", head_dim=HEAD_DIM),
    decoder("hunyuan", "HunYuanDenseV1", head_dim=HEAD_DIM),
    decoder("nanochat", "NanoChat"),
    decoder("diffllama", "DiffLlama", 4),
    decoder("doge", "Doge"),
    decoder("vaultgemma", "VaultGemma", sdpa=False, head_dim=HEAD_DIM, sliding_window=4, query_pre_attn_scalar=16),
    decoder(
        "dbrx",
        "Dbrx",
        sizes={
            "d_model": WIDTH,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "max_seq_len": 64,
            "vocab_size": VOCABULARY,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": WIDTH},
        },
    ),
    decoder(
        "qwen3_next",
        "Qwen3Next",
        1,
        head_dim=HEAD_DIM,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        decoder_sparse_step=5,
        **EXPERTS,
    ),
    decoder("lfm2", "Lfm2", 1, layer_types=["conv", "full_attention"]),
    decoder(
        "jamba",
        "Jamba",
        1,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        **HYBRID,
    ),
    decoder(
        "bamba",
        "Bamba",
        1,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=12,
        mamba_n_groups=1,
        mamba_chunk_size=8,
        **HYBRID,
    ),
    decoder(
        "zamba2",
        "Zamba2",
        1,
        sizes=PLAIN,
        layers_block_type=["mamba", "hybrid"],
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=24,
        num_mem_blocks=1,
        use_shared_attention_adapter=False,
        mamba_d_state=4,
        chunk_size=8,
    ),
    decoder(
        "falcon_h1",
        "FalconH1",
        mamba_n_heads=8,
        mamba_d_head=12,
        mamba_d_ssm=96,
        mamba_n_groups=1,
        mamba_chunk_size=8,
        **HYBRID,
    ),
    decoder(
        "recurrent_gemma",
        "RecurrentGemma",
        1,
        lru_width=WIDTH,
        attention_window_size=4,
        head_dim=HEAD_DIM,
        block_types=("recurrent", "attention"),
    ),
    decoder("xglm", "XGLM", sizes=XGLM, sdpa=False),
    decoder("biogpt", "BioGpt", sizes=PLAIN),
    decoder("gpt_neo", "GPTNeo", sizes=NEO, sdpa=False),
    decoder("gpt_neox_japanese", "GPTNeoXJapanese", sizes=PLAIN, sdpa=False),
    decoder("ctrl", "CTRL", sizes=GPT | {"dff": INNER}, sdpa=False),
    text("openai_gpt", "OpenAIGPT", sizes=GPT, sdpa=False),
    decoder(
        "modernbert_decoder",
        "ModernBertDecoder",
        sizes=PLAIN,
        local_attention=4,
        layer_types=["sliding_attention", "full_attention"],
        cls_token_id=1,
        sep_token_id=2,
    ),
    decoder(
        "bert_generation", "BertGenerationEncoder", model="", config="BertGeneration", sizes=PLAIN, is_decoder=True
    ),
    text(
        "qwen2_vl_text",
        "Qwen2VLText",
        sizes=GROUPED,
        fixed={"use_cache": False},
        rope_parameters={"type": "default", "rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
    ),
    cached("olmo2_past", "Olmo2", 2, HEAD_DIM, **GROUPED),
    cached("starcoder2_past", "Starcoder2", 2, HEAD_DIM, **GROUPED),
    cached(
        "gemma3_past",
        "Gemma3Text",
        2,
        HEAD_DIM,
        head_dim=HEAD_DIM,
        sliding_window=4,
        query_pre_attn_scalar=16,
        **GROUPED,
    ),
    cached(
        "gpt_oss_past",
        "GptOss",
        2,
        HEAD_DIM,
        sdpa=False,
        head_dim=HEAD_DIM,
        sliding_window=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        **GROUPED,
    ),
    cached("gptj_past", "GPTJ", HEADS, HEAD_DIM, sdpa=False, **GPTJ),
    cached("cohere_past", "Cohere", 2, HEAD_DIM, **GROUPED),
    cached("gpt_bigcode_past", "GPTBigCode", 1, HEAD_DIM, **GPT),
    cached("stablelm_past", "StableLm", 2, HEAD_DIM, partial_rotary_factor=0.5, **GROUPED),
    cached("mpt_past", "Mpt", HEADS, HEAD_DIM, sdpa=False, **MPT),
    cached("glm_past", "Glm", 2, HEAD_DIM, head_dim=HEAD_DIM, partial_rotary_factor=0.5, **GROUPED),
)

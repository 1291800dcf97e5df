"""Text encoders: absolute, shared, relative and rotary positions; global and local attention."""

from __future__ import annotations

from typing import Any

import transformers as tf
from torch import Tensor, nn

from models.families.family import (
    HEADS,
    INNER,
    LAYERS,
    SIZES,
    SPECIAL,
    VOCABULARY,
    WIDTH,
    ByName,
    Example,
    Family,
    Form,
    create,
    text_example,
)


def _encoder(
    name: str, model: Any, attentions: int = LAYERS, ort_model_type: str = "bert", sdpa: bool = True, **options: Any
) -> Family:
    def make(form: Form) -> Example:
        names = ("input_ids", "attention_mask")
        return text_example(ByName(create(model, model.config_class(**options), form), names))

    return Family(name, make, attentions, ort_model_type, sdpa)


class ExposedAttentions(nn.Module):
    """BERT that also returns its attention probabilities, which forbids rewrites that change them."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = create(tf.BertModel, tf.BertConfig(**SIZES), "eager")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Hidden state, then the probabilities of each layer."""
        result = self.bert(input_ids=input_ids, attention_mask=attention_mask, output_attentions=True)
        return result[0], *result.attentions


ENCODERS = (
    _encoder("bert", tf.BertModel, **SIZES),
    _encoder("roberta", tf.RobertaModel, **SIZES),
    _encoder("albert", tf.AlbertModel, embedding_size=24, **SIZES),
    _encoder("mpnet", tf.MPNetModel, sdpa=False, **SIZES),
    _encoder("clip_text", tf.CLIPTextModel, ort_model_type="clip", **SPECIAL, **SIZES),
    _encoder(
        "distilbert",
        tf.DistilBertModel,
        vocab_size=VOCABULARY,
        dim=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=INNER,
        max_position_embeddings=64,
    ),
    _encoder(
        "deberta_v2",
        tf.DebertaV2Model,
        sdpa=False,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        **SIZES,
    ),
    _encoder(
        "modernbert",
        tf.ModernBertModel,
        attentions=3,
        local_attention=4,
        global_attn_every_n_layers=3,
        cls_token_id=1,
        sep_token_id=2,
        **SPECIAL,
        **(SIZES | {"num_hidden_layers": 3}),
    ),
    Family("bert_outputs_attentions", lambda form: text_example(ExposedAttentions()), LAYERS, sdpa=False),
)

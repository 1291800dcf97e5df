"""The tiny models: all known, a few of each kind built and run."""

import pytest
import torch

from models.families import FAMILIES
from models.families.family import shake

QUICK = [
    "bert", "bert_outputs_attentions", "modernbert", "llama", "mistral_past", "falcon_past", "t5", "whisper_dec_past",
    "vit", "wav2vec2", "packed_qk_norm", "conv1x1", "torch_mha_weights", "torch_encoder", "linear_attention",
    "talking_heads", "soft_router",
]  # fmt: skip


def test_every_kind_is_there():
    assert len(FAMILIES) == 56
    assert sum(family.past for family in FAMILIES.values()) == 12
    assert {name for name, family in FAMILIES.items() if family.negative} == {
        "mamba", "linear_attention", "talking_heads", "soft_router",
    }  # fmt: skip
    assert all(family.attentions > 0 or family.negative for family in FAMILIES.values())


@pytest.mark.parametrize("name", QUICK)
def test_families_build_run_and_vary(name):
    family = FAMILIES[name]
    examples = [family.build(form) for form in family.forms]
    outputs = [example.outputs() for example in examples]
    for example, output in zip(examples, outputs, strict=True):
        assert not example.module.training
        assert len(example.inputs) == len(example.names) == len(example.axes)
        assert output[0].std() > 1e-3 and all(torch.isfinite(tensor).all() for tensor in output)
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0][0], other[0], atol=1e-4, rtol=1e-4)


def test_a_seed_gives_the_same_model_and_another_seed_another():
    first, again, other = (FAMILIES["bert"].build(seed=seed).outputs()[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_a_mask_that_is_dropped_shows():
    example = FAMILIES["bert"].build()
    ids, mask = example.inputs
    whole = example.module(ids, torch.ones_like(mask))
    assert (whole - example.outputs()[0])[0].abs().max() > 1e-2


def test_shaking_leaves_no_zero_bias_and_no_unit_gain():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    torch.nn.init.zeros_(module[0].bias)
    shake(module)
    assert module[0].bias.abs().min() > 0 and (module[1].weight - 1).abs().min() > 0

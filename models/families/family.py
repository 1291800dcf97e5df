"""What a family is: a tiny seeded model with inputs, input names and dynamic axes, built in milliseconds, no download.

Freshly built models have zero biases, unit gains and sometimes outputs near zero, so a rewrite that drops a bias or a
whole branch would pass every comparison. `shake` removes that blindness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Form = Literal["eager", "sdpa"]
Axes = dict[int, str]

WIDTH, HEADS, LAYERS, INNER, VOCABULARY, TOKENS, BATCH = 48, 4, 2, 96, 120, 10, 2
HEAD_DIM = WIDTH // HEADS
TEXT: Axes = {0: "batch", 1: "seq"}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Example:
    """A module with one example of its positional inputs, their names, and the dynamic axes of each."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    axes: tuple[Axes, ...]

    def outputs(self) -> tuple[Tensor, ...]:
        """What the module gives on the example."""
        with torch.no_grad():
            result = self.module(*self.inputs)
        return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    `attentions` is the true number of attentions, soft routers and linear attention not counted. `ort_model_type` is
    what the ONNX Runtime optimizer has to be told. `sdpa` says whether a fused-attention form exists, `past` that
    it takes a key/value cache, `negative` that it holds something that looks like attention and is not to be taken
    for it.
    """

    name: str
    make: Callable[[Form], Example]
    attentions: int
    ort_model_type: str = "bert"
    sdpa: bool = True
    past: bool = False
    negative: bool = False

    @property
    def forms(self) -> tuple[Form, ...]:
        """The ways its attention can be written."""
        return ("eager", "sdpa") if self.sdpa else ("eager",)

    def build(self, form: Form = "eager", seed: int = 0, amount: float = 0.1) -> Example:
        """The module in evaluation mode, shaken. The same seed gives the same weights and inputs."""
        torch.manual_seed(seed)
        example = self.make(form)
        shake(example.module.eval(), seed, amount)
        return example


def shake(module: nn.Module, seed: int = 0, amount: float = 0.1) -> None:
    """Add noise to every parameter, so that no bias is zero, no gain is one and no branch is dead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)


class ByName(nn.Module):
    """Calls a model with named inputs and returns its first output."""

    def __init__(self, model: nn.Module, names: Sequence[str], **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, tuple(names), fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        """The inputs in the order of the names."""
        return self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed)[0]


def create(model_class: Any, config: Any, form: Form) -> nn.Module:
    """A transformers model with its attention in this form."""
    config._attn_implementation = form
    return model_class._from_config(config, attn_implementation=form)


def token_ids(tokens: int = TOKENS) -> Tensor:
    """(B, tokens) without special ids."""
    return torch.randint(3, VOCABULARY - 3, (BATCH, tokens))


def padding(tokens: int = TOKENS, left: bool = False) -> Tensor:
    """(B, tokens) attention mask whose first row is padded by two, so that a dropped mask shows."""
    mask_BS = torch.ones(BATCH, tokens, dtype=torch.long)
    mask_BS[0, slice(0, 2) if left else slice(tokens - 2, tokens)] = 0
    return mask_BS


def text_example(model: nn.Module) -> Example:
    """A model of ids and mask."""
    return Example(model, (token_ids(), padding()), ("input_ids", "attention_mask"), (TEXT, TEXT))

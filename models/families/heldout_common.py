"""Builders for families nobody tuned the recogniser on; classes by name, so nothing is imported before it is built.

Weights are drawn anew as in the table of targets: what a fresh model computes can be so small that any check passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from models.families.family import BATCH, LAYERS, SIZES, TEXT, Axes, Example, Family, Form, padding, token_ids

MASKED_TEXT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class HeldOut(Family):
    """A family whose weights are drawn anew."""

    def build(self, form: Form = "eager", seed: int = 0, amount: float = 1.0) -> Example:
        """The module in evaluation mode, weights moved by `amount` times the usual noise."""
        torch.manual_seed(seed)
        example = self.make(form)
        redraw(example.module.eval(), seed, amount)
        return example


def redraw(module: nn.Module, seed: int = 0, amount: float = 1.0) -> None:
    """Noise of 1.5 / sqrt(fan-in) on matrices and 0.2 on vectors; scalars and huge or infinite numbers stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 0 or not parameter.is_floating_point():
                continue
            size = 0.2 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
            noise = amount * size * torch.randn(parameter.shape, generator=generator)
            parameter.add_(torch.where(parameter.abs() < 1e3, noise, torch.zeros_like(noise)))


class First(nn.Module):
    """Calls a model with named inputs and returns its first output, or those with these names."""

    def __init__(self, model: nn.Module, names: Sequence[str], fields: Sequence[str] = (), **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.fields, self.fixed = model, tuple(names), tuple(fields), fixed

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The inputs in the order of the names."""
        result = self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed)
        if isinstance(result, Tensor):
            return result
        return tuple(result[name] for name in self.fields) if self.fields else result[0]


def model_of(kind: str, form: Form, model: str = "Model", config: str = "", **options: Any) -> nn.Module:
    """The transformers class `kind` + `model` from its configuration, with its attention in this form."""
    settings = getattr(tf, (config or kind) + "Config")(**options)
    settings._attn_implementation = form
    settings._experts_implementation = "batched_mm"  # the other ways depend on which experts were chosen
    made: nn.Module = getattr(tf, kind + model)._from_config(settings, attn_implementation=form)
    return made


def text(
    name: str,
    kind: str,
    attentions: int = LAYERS,
    /,
    model: str = "Model",
    sdpa: bool = True,
    names: Sequence[str] = MASKED_TEXT,
    tokens: int = 10,
    fixed: dict[str, Any] | None = None,
    negative: bool = False,
    sizes: dict[str, Any] | None = None,
    config: str = "",
    **options: Any,
) -> HeldOut:
    """A model of token ids and, by `names`, a mask and ids of a decoder."""

    def make(form: Form) -> Example:
        made = model_of(kind, form, model, config, **((SIZES if sizes is None else sizes) | options))
        inputs = tuple(_text_input(each, tokens) for each in names)
        axes = tuple({0: "batch", 1: "dseq"} if each.startswith("decoder") else TEXT for each in names)
        return Example(First(made, names, **(fixed or {})), inputs, tuple(names), axes)

    return HeldOut(name, make, attentions, "bert", sdpa, negative=negative)


def _text_input(name: str, tokens: int) -> Tensor:
    if name.startswith("decoder"):
        return token_ids(7)
    return padding(tokens) if "mask" in name else token_ids(tokens)


def values(
    name: str,
    kind: str,
    attentions: int,
    shape: Sequence[int],
    /,
    input_name: str = "pixel_values",
    model: str = "Model",
    sdpa: bool = True,
    axes: Axes | None = None,
    fixed: dict[str, Any] | None = None,
    negative: bool = False,
    config: str = "",
    **options: Any,
) -> HeldOut:
    """A model of one input of real numbers: images, sound, series."""

    def make(form: Form) -> Example:
        made = model_of(kind, form, model, config, **options)
        inputs = (torch.randn(BATCH, *shape),)
        return Example(First(made, (input_name,), **(fixed or {})), inputs, (input_name,), (axes or {0: "batch"},))

    return HeldOut(name, make, attentions, "vit", sdpa, negative=negative)

"""Tiny seeded models, exported live: what the tests of recognition look at."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from rewriter.attention.recognise import recognise
from rewriter.core.site import Recognition
from rewriter.graph.onnx import OnnxGraph, load

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
}


def export(
    module: nn.Module,
    inputs: Sequence[Tensor],
    names: Sequence[str],
    outputs: Sequence[str] = ("output",),
    dynamo: bool = False,
    opset: int = 17,
) -> OnnxGraph:
    """The module as a graph: leading axes and the second axis of whole numbers are dynamic."""
    axes = {
        n: {0: "batch", 1: "tokens"} if not t.is_floating_point() and t.ndim > 1 else {0: "batch"}
        for n, t in zip(names, inputs, strict=True)
    }
    for name, tensor in zip(names, inputs, strict=True):
        if tensor.is_floating_point() and tensor.ndim == 3:
            axes[name][1] = f"{name}_tokens"
    options: dict[str, object] = {"opset_version": opset, "input_names": list(names), "output_names": list(outputs)}
    with tempfile.TemporaryDirectory() as folder, _quiet(), torch.no_grad():
        path = Path(folder) / "model.onnx"
        if dynamo:
            # the module takes its inputs as one variadic argument
            shapes = (tuple(dict.fromkeys(axes[name], torch.export.Dim.AUTO) for name in names),)
            program = torch.export.export(module.eval(), tuple(inputs), dynamic_shapes=shapes, strict=False)
            torch.onnx.export(program, (), dynamo=True, **options).save(str(path))
        else:
            torch.onnx.export(module.eval(), tuple(inputs), str(path), dynamo=False, dynamic_axes=axes, **options)
        graph = load(path)
        for value in graph.model.graph.initializers.values():
            assert value.const_value is not None
            value.const_value.numpy()
    return graph


@contextlib.contextmanager
def _quiet():
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def randomise(module: nn.Module) -> nn.Module:
    """Noise on every parameter: default biases are zero and prove nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            size = 1.5 * parameter.shape[0] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return module


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    """Token numbers."""
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(1))


_FOUND: dict[int, Recognition] = {}


def recognised(graph: OnnxGraph) -> Recognition:
    """What is found in one of these graphs; looked for once, because graphs are cached."""
    if id(graph) not in _FOUND:
        _FOUND[id(graph)] = recognise(graph)
    return _FOUND[id(graph)]


class Take(nn.Module):
    """A transformers model with positional inputs by name and one output."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], field: str = "last_hidden_state", **fixed: object
    ) -> None:
        super().__init__()
        self.model, self.names, self.field, self.fixed = model, tuple(names), field, fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed), self.field)


def _text(
    kind: str, attention: str, dynamo: bool, names: Sequence[str], opset: int = 17, **settings: object
) -> OnnxGraph:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**COMMON, **settings})
    config._attn_implementation = attention
    model = getattr(transformers, f"{kind}Model")(config)
    fixed = {"use_cache": False} if kind in ("GPT2", "Llama", "T5", "Gemma2") else {}
    inputs = [tokens(), torch.ones(2, 9, dtype=torch.int64), tokens()][: len(names)]
    return export(Take(randomise(model), names, **fixed), inputs, names, dynamo=dynamo, opset=opset)


MASKED = ("input_ids", "attention_mask")


@cache
def bert(attention: str = "eager", dynamo: bool = False) -> OnnxGraph:
    return _text("Bert", attention, dynamo, MASKED, opset=18 if dynamo else 17)


@cache
def gpt2(attention: str = "sdpa") -> OnnxGraph:
    return _text("GPT2", attention, False, MASKED, n_positions=48, n_inner=40)


@cache
def llama(attention: str = "sdpa") -> OnnxGraph:
    return _text("Llama", attention, False, MASKED, num_key_value_heads=2)


@cache
def gemma2() -> OnnxGraph:
    return _text(
        "Gemma2", "eager", False, MASKED, num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=16, sliding_window=4
    )


@cache
def t5() -> OnnxGraph:
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    return _text(
        "T5", "eager", False, names, d_model=24, d_kv=6, d_ff=40, num_heads=4, num_layers=1, num_decoder_layers=1
    )


@cache
def vit() -> OnnxGraph:
    import transformers

    torch.manual_seed(0)
    settings = {k: v for k, v in COMMON.items() if k not in ("vocab_size", "max_position_embeddings")}
    model = transformers.ViTModel(
        transformers.ViTConfig(image_size=32, patch_size=8, **settings), add_pooling_layer=False
    )
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return export(Take(randomise(model), ("pixel_values",)), [pixels], ["pixel_values"])


class Block(nn.Module):
    """Packed attention written by hand, with switches for the near misses."""

    def __init__(self, mixing: bool = False, exposed: bool = False, gated: bool = False, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.packed, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.mix = nn.Linear(4, 4, bias=False) if mixing else None
        self.gate = nn.Linear(24, 24) if gated else None
        self.norm = nn.LayerNorm(6) if norm else None
        self.exposed = exposed

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        b, s, _ = x.shape
        query, key, value = self.packed(x).reshape(b, s, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        if self.norm is not None:
            query, key = self.norm(query), self.norm(key)
        scores = query @ key.transpose(-1, -2) * 6**-0.5
        if self.mix is not None:
            scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = scores.softmax(-1)
        context = (weights @ value).transpose(1, 2).reshape(b, s, 24)
        if self.gate is not None:
            context = context * torch.sigmoid(self.gate(x))
        result = x + self.out(context)
        return (result, weights) if self.exposed else result


class Router(nn.Module):
    """A soft mixture of experts: a softmax that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(24, 3)
        self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        outputs = torch.stack([torch.relu(expert(x)) for expert in self.experts], -2)
        return (weights.unsqueeze(-2) @ outputs).squeeze(-2)


class LinearAttention(nn.Module):
    """Softmax on queries and on keys, no scores (Shen et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.q(x).softmax(-1), self.k(x).softmax(-2)
        return self.o(query @ (key.transpose(-1, -2) @ self.v(x)))


@cache
def block(**switches: bool) -> OnnxGraph:
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    outputs = ["output", "weights"] if switches.get("exposed") else ["output"]
    return export(Block(**switches), [x], ["x"], outputs)


@cache
def negative(kind: str) -> OnnxGraph:
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    return export(Router() if kind == "router" else LinearAttention(), [x], ["x"])

"""Composite operators: ordinary nodes in a domain of our own that carry meaning, so no backend matches attention again.

`rewriter.graph.operators.composite` runs them, `rewriter.runtimes.standard` expands them to standard ONNX,
`rewriter.runtimes.tvm` lowers them to kernels. Their definitions are the docstring of `composite`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

COMPOSITE_DOMAIN = "rewriter"
COMPOSITE_VERSION = 1
ACTIVATION_NAMES = ("", "identity", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh")
PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Signature:
    """How many inputs a composite takes, and which attributes it must have and may have."""

    inputs: tuple[int, int]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_ROLES = ("query", "key", "value")
SIGNATURES: dict[str, Signature] = {
    "Linear": Signature((2, 3), (), ("activation", "precision")),
    "SplitHeads": Signature((1, 1), ("heads",)),
    "Attention": Signature(
        (3, 6),
        ("heads", "scale", *(f"{role}_heads" for role in _ROLES), *(f"{role}_head_of" for role in _ROLES)),
        ("softcap", "bias_kind", "empty_rows", "precision", "window", "sinks", "causal", "forms"),
    ),
    "Rotary": Signature((3, 3), ("size",), ("interleaved", "sign")),
    "HeadNorm": Signature((2, 3), ("kind", "epsilon")),
}


def composite(
    operator: str, inputs: Sequence[ir.Value | None], output: str, dtype: ir.DataType | None = None, **attributes: Any
) -> ir.Node:
    """A composite node whose single output is named `output`; not yet part of a graph.

    - ``Linear(x, weight_CN, bias_N?)``, `activation`, `precision`: ``act(x @ W + b)``, x with any leading axes.
      `precision` says how the operands of the product are rounded: fp32 (default), bf16 (to nearest, fp32 sums), int8
      (columns of W: 127 levels of either sign; rows of x: 255 levels from the least to the largest; exact sums).
    - ``SplitHeads(x_BSN)``, `heads`: (B, heads, S, N / heads).
    - ``Attention(query, key, value, bias?, kept?, sink?)`` -> (B, S, H * Dv):
      ``softmax(cap(scale * Q K^T) + bias) V``. Operands of
      rank 3 are (B, tokens, G * D), of rank 4 (B, G, tokens, D). `heads` is H, `query_heads`, `key_heads`,
      `value_heads` are each operand's G, `query_head_of`, `key_head_of`, `value_head_of` say which of its heads
      each of the H reads. `softcap` 0 is none; `bias_kind` is none, add or bool (True may attend); bias broadcasts
      to (B, H, S, T). Where `kept`, which broadcasts like it, is False, the bias alone is the score. `sink` has a logit
      for each of the H that every row of the softmax holds beside its keys, with no value. `empty_rows` (nan, zero) is
      what rows without an allowed key give. `precision` is fp32, or bf16: Q, scale * K, V and the
      exponentials are rounded to it, sums are not. `window` and `sinks` repeat what the bias does, for kernels that
      skip what it hides: keys `window` or more tokens away, but for the first `sinks`. `causal` says that there are as
      many queries as keys, and repeats that every key after the query is hidden (also), and no other (only). `forms`
      are those chosen to compute it (`rewriter.core.forms`).
    - ``Rotary(x_BGSD, cos, sin)``, `size`, `interleaved`, `sign`: leading dims ``u * cos + sign * rotate(u) * sin``.
    - ``HeadNorm(x, gain, bias?)``, `kind` (layer, rms), `epsilon`: over the last axis.

    Raises `ValueError` when it is not well-formed: that is a bug of the caller.
    """
    value = ir.Value(name=output, type=ir.TensorType(dtype) if dtype is not None else None)
    node = ir.Node(
        COMPOSITE_DOMAIN,
        operator,
        list(inputs),
        ir.convenience.convert_attributes(attributes),
        outputs=[value],
        version=COMPOSITE_VERSION,
        name=output,
    )
    problems = list(composite_problems(node))
    if problems:
        raise ValueError("; ".join(problems))
    return node


def is_composite(node: ir.Node, operator: str | None = None) -> bool:
    """Whether a node is a composite, or the named one."""
    return node.domain == COMPOSITE_DOMAIN and operator in (None, node.op_type)


def composite_problems(node: ir.Node) -> Iterator[str]:
    """What is wrong with a composite node, in sentences; nothing if it is well-formed."""
    signature = SIGNATURES.get(node.op_type)
    label = f"composite {node.op_type} ({node.outputs[0].name if node.outputs else node.name!r})"
    if signature is None:
        yield f"{label} does not exist"
        return
    given = [value for value in node.inputs if value is not None]
    low, high = signature.inputs
    if not low <= len(given) <= high or any(value is None for value in node.inputs[:low]):
        yield f"{label} takes {low} to {high} inputs, not {len(given)}"
    if len(node.outputs) != 1:
        yield f"{label} has one output, not {len(node.outputs)}"
    names = set(node.attributes)
    for name in signature.required:
        if name not in names:
            yield f"{label} lacks {name}"
    for name in sorted(names - {*signature.required, *signature.optional}):
        yield f"{label} has the unknown attribute {name}"
    if node.op_type == "Attention" and not set(signature.required) - names:
        yield from _head_problems(node, label)
    if node.op_type == "Linear" and _text(node, "activation", "") not in ACTIVATION_NAMES:
        yield f"{label} has the unknown activation {_text(node, 'activation', '')!r}"
    if node.op_type == "Linear" and _text(node, "precision", "fp32") not in PRECISIONS:
        yield f"{label} has the unknown precision {_text(node, 'precision', 'fp32')!r}"


def _head_problems(node: ir.Node, label: str) -> Iterator[str]:
    heads = node.attributes["heads"].as_int()
    for role in _ROLES:
        groups, picks = node.attributes[f"{role}_heads"].as_int(), node.attributes[f"{role}_head_of"].as_ints()
        if len(picks) != heads or any(not 0 <= pick < groups for pick in picks):
            yield f"{label}: {role}_head_of must name one of {groups} heads for each of {heads}"
    kind, biased = _text(node, "bias_kind", "none"), len(node.inputs) > 3 and node.inputs[3] is not None
    if kind not in ("none", "add", "bool") or biased != (kind != "none"):
        yield f"{label}: bias_kind {kind!r} does not fit {'a' if biased else 'no'} bias"
    if _text(node, "precision", "fp32") not in ("fp32", "bf16"):
        yield f"{label}: precision must be fp32 or bf16"
    if _text(node, "empty_rows", "nan") not in ("nan", "zero"):
        yield f"{label}: empty_rows must be nan or zero"


def _text(node: ir.Node, name: str, default: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else default

"""Which of the kernels computes an attention, and the call of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewriter.core.target import Target
from rewriter.runtimes.tvm.kernels import amx_flash, decode, flash, flash_bf16
from rewriter.runtimes.tvm.kernels.attention import Attention, Tile
from rewriter.runtimes.tvm.lowering import Lowering
from rewriter.runtimes.tvm.tiles import Tiles


def attend(lowering: Lowering, spec: Attention, inputs: Sequence[Any], precision: str = "fp32") -> Any:
    """The call on (Q, K, V, bias?, kept?, sink?): (B, S, H * Dv)."""
    name, make, tile = kernel_for(spec, lowering.target, lowering.tiles, precision)
    kernel = lowering.kernels.get(name, (spec, tile, name), lambda unique: make(spec, tile, unique))
    return lowering.call(kernel, inputs, ((spec.B, spec.S, spec.heads * spec.value.dim), "float32"))


def kernel_for(
    spec: Attention, target: Target, tiles: Tiles, precision: str = "fp32"
) -> tuple[str, Callable[..., Any], Tile]:
    """(name, template, tile).

    Processors without a format get more digits than asked for at the same meaning, and so do few queries, whose time
    is that of reading keys and values.
    """
    if decode.serves(spec):
        return "decode", decode.make_decode, decode.default_tile(spec, target)
    if precision == "bf16" and target.has_matrix_unit("bf16") and amx_flash.serves(spec):
        return "flash_amx_bf16", amx_flash.make_flash_amx, amx_flash.tile_for(spec)
    if precision == "bf16" and target.multiplies("bf16") and flash_bf16.serves(spec):
        return "flash_bf16", flash_bf16.make_flash_bf16, tiles.flash(spec, "bf16")
    return "flash", flash.make_flash, tiles.flash(spec)

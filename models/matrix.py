"""``python -m models.matrix``: every family by every exporter, what is recognised in it, and what others recognise.

Exports are kept in a folder and made only once. The table has a row per graph: true attentions, ours by state, and how
many ONNX Runtime's transformers optimizer (told the right model type) and onnxscript's fusions turn into one operator,
with a mark where their graph no longer computes the same.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from models.export import export, run_plainly
from models.families import FAMILIES, Family, Form
from models.fixtures import write_pack

FUSED = frozenset(
    ["Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "PackedMultiHeadAttention"]
)
DEFAULT = ("l17", "d18", "d20", "d23", "d24", "s18")
VARIED_SIZES = ("swin", "segformer", "mobilevit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what is missing, recognise, compare, print; optionally write the tests' packs."""
    parser = argparse.ArgumentParser(prog="python -m models.matrix", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/matrix"), help="where exports are kept")
    parser.add_argument("--variants", default=",".join(DEFAULT), help="exporters and opsets, by commas")
    parser.add_argument("--families", default="", help="names by commas (default: all)")
    parser.add_argument("--ours", action="store_true", help="leave the other recognisers out")
    parser.add_argument("--pack", type=Path, help="also write packs for the tests into this folder")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    options.output.mkdir(parents=True, exist_ok=True)
    totals: collections.Counter[tuple[str, str]] = collections.Counter()
    packs: dict[str, dict[str, onnx.ModelProto]] = collections.defaultdict(dict)
    print("graph | true | found | mapped | lowerable | optimizer | onnxscript")
    chosen = [name for name in options.families.split(",") if name] or list(FAMILIES)
    for family, form, variant in _cells(chosen, options.variants.split(",")):
        path = options.output / f"{family.name}.{form}.{variant}.onnx"
        if not _exported(family, form, variant, path):
            continue
        packs[variant][path.stem] = onnx.load(path)
        row = {"true": family.attentions, **ours(path)} | ({} if options.ours else others(family, form, path))
        totals.update({(variant, key): value for key, value in row.items() if isinstance(value, int)})
        print(" | ".join([path.stem, *(str(value) for value in row.values())]), flush=True)
    for (variant, key), count in sorted(totals.items()):
        print(f"{variant} {key}: {count}")
    if options.pack is not None:
        for variant, models in packs.items():
            write_pack(options.pack / f"{variant}.zip", models)
    return 0


def _cells(families: Sequence[str], variants: Sequence[str]) -> Iterator[tuple[Family, Form, str]]:
    for variant in variants:
        for name in families:
            for form in FAMILIES[name].forms:
                yield FAMILIES[name], form, variant


def _exported(family: Family, form: Form, variant: str, path: Path) -> bool:
    """Whether the graph is there; what an exporter cannot export is tried only once."""
    failed = path.with_suffix(".failed")
    if not path.exists() and not failed.exists():
        try:
            export(lambda: family.build(form), variant, path)
        except Exception as problem:  # noqa: BLE001 - exporters raise anything; it is recorded and shown
            path.unlink(missing_ok=True)
            failed.write_text(f"{type(problem).__name__}: {problem}")
    if failed.exists():
        print(f"{path.stem} | not exported: {failed.read_text().splitlines()[0][:100]}", flush=True)
    return path.exists()


def ours(path: Path) -> dict[str, int]:
    """How many attentions are found, mapped and lowerable; each state includes the later ones."""
    from rewriter.attention.recognise import recognise
    from rewriter.core.site import State
    from rewriter.graph.onnx import load

    states = [site.state for site in recognise(load(path)).attention]
    lowerable = states.count(State.LOWERABLE)
    mapped = lowerable + states.count(State.MAPPED)
    return {"found": len(states), "mapped": mapped, "lowerable": lowerable}


def others(family: Family, form: Form, path: Path) -> dict[str, int | str]:
    """Attentions fused by ONNX Runtime's optimizer and by onnxscript; text where the result is wrong."""
    example = family.build(form)
    feeds = {name: tensor.numpy() for name, tensor in zip(example.names, example.inputs, strict=True)}
    before = _fused(onnx.load(path))
    ways: dict[str, Callable[[], onnx.ModelProto]] = {
        "optimizer": lambda: _by_optimizer(path, family),
        "onnxscript": lambda: _by_onnxscript(path),
    }
    try:
        expected = run_plainly(path, feeds)
    except Exception as problem:  # noqa: BLE001 - a graph the runtime refuses is recorded as such
        return dict.fromkeys(ways, f"not run: {type(problem).__name__}")
    return {name: _verdict(way, feeds, expected, before) for name, way in ways.items()}


def _verdict(
    make: Callable[[], onnx.ModelProto], feeds: dict[str, np.ndarray], expected: list[Any], before: int
) -> int | str:
    try:
        model = make()
    except Exception as problem:  # noqa: BLE001 - recorded in the table
        return f"0 ({type(problem).__name__})"
    found = _fused(model) - before
    if not found:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fused.onnx"
        onnx.save(model, path)
        try:
            error = max(float(np.abs(a - b).max()) for a, b in zip(run_plainly(path, feeds), expected, strict=True))
        except Exception as problem:  # noqa: BLE001 - recorded in the table
            return f"{found} that do not run ({type(problem).__name__})"
    return found if error < 1e-3 else f"{found} WRONG by {error:.1g}"


def _fused(model: onnx.ModelProto) -> int:
    return sum(node.op_type in FUSED for node in model.graph.node)


def _by_optimizer(path: Path, family: Family) -> onnx.ModelProto:
    from onnxruntime.transformers import optimizer

    # where sizes differ between stages the optimizer has to find them itself
    heads, width = (0, 0) if family.name in VARIED_SIZES else (4, 64 if "neox" in family.name else 48)
    with contextlib.redirect_stdout(io.StringIO()):
        fused = optimizer.optimize_model(
            str(path), model_type=family.ort_model_type, num_heads=heads, hidden_size=width, opt_level=0
        )
    return fused.model


def _by_onnxscript(path: Path) -> onnx.ModelProto:
    import onnx_ir
    from onnxscript.rewriter import ort_fusions

    with contextlib.redirect_stdout(io.StringIO()):
        result = ort_fusions.optimize_for_ort(onnx_ir.load(path))
    return onnx_ir.serde.serialize_model(result[0] if isinstance(result, tuple) else result)


if __name__ == "__main__":
    sys.exit(main())

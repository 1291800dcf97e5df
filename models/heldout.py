"""``python -m models.heldout``: families nobody tuned on, exported, recognised, and packed for the tests.

The table has a row per graph: true attentions, found ones by state, and the reasons of what is not lowerable. Exports
are kept in a folder and made only once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx

from models.export import export
from models.families.family import Family, Form
from models.families.heldout import HELD_OUT
from models.fixtures import Pack, write_pack

# the most different ones, whose graphs are small
PACKED = (
    *("gptj", "olmo", "mpt", "gpt_bigcode", "gemma3", "deepseek_v3", "mixtral", "stablelm", "hunyuan", "nanochat"),
    *("bitnet", "gpt_neo", "gpt_bigcode_past", "xlnet", "xlm", "funnel", "convbert", "layoutlmv3"),
    *("lilt", "squeezebert", "roformer", "nystromformer", "longt5_local", "longformer", "perceiver"),
    *("luke", "swinv2", "cvt", "hiera", "qwen2_vl_vision", "idefics_perceiver", "blip2_qformer"),
    *("speecht5_encoder", "fastspeech2_conformer", "nanogpt", "single_head", "einsum_heads"),
    *("einsum_weights", "multi_query", "folded_heads", "time_first", "keys_first", "gated_heads", "cosine_heads"),
    *("memory_tokens", "chunked", "image_pixels", "non_local", "image_generator", "diffusion_block", "set_pooling"),
    *("pooled_by_query", "relative_shift", "luong", "bare", "channel_attention", "graph_attention", "bahdanau"),
    *("kernel_attention", "performer", "retention", "sigmoid_attention", "over_heads", "sinkhorn", "slot_attention"),
    *("pooled_tokens", "capsules", "squeeze_excite"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what is missing, recognise, print; optionally write the tests' pack."""
    parser = argparse.ArgumentParser(prog="python -m models.heldout", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("build/heldout"), help="where exports are kept")
    parser.add_argument("--cells", default="eager.l17,sdpa.d18", help="forms and variants, by commas")
    parser.add_argument("--families", default="", help="names by commas (default: all)")
    parser.add_argument("--pack", type=Path, help="write the tests' pack into this file, and print nothing")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.pack is not None:
        paths = [_exported(HELD_OUT[name], "eager", "l17", options.output) for name in PACKED]
        write_pack(options.pack, Pack({path.stem: onnx.load(path) for path in paths if path is not None}))
        return 0
    print("graph | true | found | mapped | lowerable | reasons")
    chosen = [name for name in options.families.split(",") if name] or list(HELD_OUT)
    for cell in options.cells.split(","):
        form, variant = cell.split(".")
        for family in (HELD_OUT[name] for name in chosen):
            if form in family.forms:
                path = _exported(family, form, variant, options.output)
                print(_row(family, path) if path else f"{family.name}.{cell} | not exported", flush=True)
    return 0


def _exported(family: Family, form: Form, variant: str, folder: Path) -> Path | None:
    path = folder / f"{family.name}.{form}.{variant}.onnx"
    failed = path.with_suffix(".failed")
    if not path.exists() and not failed.exists():
        try:
            export(lambda: family.build(form), variant, path)
        except Exception as problem:  # noqa: BLE001 - exporters raise anything; it is recorded
            path.unlink(missing_ok=True)
            failed.write_text(f"{type(problem).__name__}: {problem}")
    return path if path.exists() else None


def _row(family: Family, path: Path) -> str:
    from rewriter.attention.recognise import recognise
    from rewriter.core.site import State
    from rewriter.graph.onnx import load

    found = recognise(load(path))
    sites = found.attention
    reasons = [p.code for site in sites for p in site.problems] + [entry.refusal.code for entry in found.unrecognised]
    counts = (len(sites), sum(s.mapped for s in sites), sum(s.state is State.LOWERABLE for s in sites))
    return " | ".join([path.stem, str(family.attentions), *map(str, counts), ", ".join(sorted(set(reasons)))])


if __name__ == "__main__":
    sys.exit(main())

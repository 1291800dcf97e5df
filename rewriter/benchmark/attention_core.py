"""``python -m rewriter.benchmark.attention_core``: the attention core against torch's, as a Markdown table.

Every subject has a process of its own, blocks in turn, see `rewriter.measurement.race`. Ours reads queries, keys and
values as projections leave them, (B, tokens, heads * dim) of float32, and writes what the output projection reads; the
bfloat16 form rounds on its way. A cache of keys and values is (B, heads, tokens, dim). torch gets contiguous
(B, heads, tokens, dim) of float32, or of bfloat16 for the bfloat16 rows, and leaves its result so: neither its
transposition from projections nor its rounding is counted. For causal rows it gets ``is_causal``, and ours a mask.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewriter.core.measurement import speedup
from rewriter.core.refusal import Refusal
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.measurement.bench import Subject, save_feeds
from rewriter.measurement.race import RaceResult, Rules, race
from rewriter.report.markdown import ratio

Feeds = Mapping[str, NDArray[Any]]
HERE = "rewriter.benchmark.attention_core"  # also where this module is run as a program
ROTATED_BYTES = 48 << 20
MOST_SETS = 4


@dataclass(frozen=True)
class Case:
    """One attention: H heads on G heads of keys, S queries, T keys, one dim D. `precision` is fp32 or bf16."""

    heads: int
    groups: int
    dim: int
    queries: int
    keys: int
    mask: str = "none"
    precision: str = "fp32"

    @property
    def decoding(self) -> bool:
        """Few queries over a cache that is laid out for it."""
        return self.queries < self.keys and self.queries <= 8

    @property
    def label(self) -> str:
        """For the first columns of the table."""
        heads = f"{self.heads}" if self.heads == self.groups else f"{self.heads}/{self.groups}"
        return f"{heads} × {self.dim} | {self.queries} × {self.keys} | {self.mask} | {self.precision}"

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products, hidden scores left out."""
        scores = self.queries * (self.queries + 1) // 2 if self.mask == "causal" else self.queries * self.keys
        return 4 * self.heads * self.dim * scores

    @property
    def cache_bytes(self) -> int:
        """Of keys and values."""
        return 2 * self.groups * self.keys * self.dim * (4 if self.precision == "fp32" else 2)


def cases(decoding: bool, most_tokens: int) -> list[Case]:
    """What the table shows."""
    shapes = [(12, 12, 32), (12, 12, 64), (32, 8, 64)]
    found = []
    for precision in ("fp32", "bf16"):
        if decoding:
            lengths = [n for n in (512, 2048, 8192) if n <= most_tokens]
            found += [Case(*s, q, n, "none", precision) for s in shapes[1:] for n in lengths for q in (1, 4)]
        else:
            lengths = [n for n in (128, 197, 512, 2048) if n <= most_tokens]
            found += [
                Case(*s, n, n, mask, precision)
                for s in shapes
                for n in lengths
                for mask in ("none", "padding", "causal")
            ]
    return found


def feeds_of(case: Case, seed: int) -> dict[str, NDArray[Any]]:
    """Normal values as (1, heads, tokens, dim), and the mask that ours reads."""
    rng = np.random.default_rng(seed)
    sizes = {"q": (case.heads, case.queries), "k": (case.groups, case.keys), "v": (case.groups, case.keys)}
    feeds = {name: rng.standard_normal((1, *size, case.dim), np.float32) for name, size in sizes.items()}
    if case.mask == "causal":
        seen = np.tril(np.ones((case.queries, case.keys), bool))
        feeds["bias"] = np.where(seen, 0, -np.inf).astype(np.float32)[None, None]
    if case.mask == "padding":
        feeds["bias"] = np.zeros((1, 1, 1, case.keys), np.float32)
        feeds["bias"][..., case.keys - case.keys // 8 :] = -np.inf
    return feeds


class _Bound:
    """An executable of one function that takes converted inputs."""

    def __init__(self, convert: Callable[[Feeds], Callable[[], NDArray[Any]]]) -> None:
        self._convert = convert

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """The result as (1, tokens, heads * dim)."""
        return {"o": self._convert(feeds)()}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """One call."""
        call: Any = self._convert(feeds)
        return call  # what it returns is a result that nobody reads


class _Core:
    """What both runtimes share: an artifact is the case as JSON."""

    name = ""

    def available(self) -> Refusal | None:
        """Always."""
        return None

    def build(self, graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]], folder: Path, target: Target) -> Path:
        """There is no graph here."""
        raise ValueError("the attention core is written as a case, not built from a graph")


class TorchCore(_Core):
    """``torch.nn.functional.scaled_dot_product_attention``."""

    name = "torch"

    def load(self, artifact: Path, threads: int) -> _Bound:
        """Ready to bind."""
        import torch

        case = Case(**json.loads(artifact.read_text()))
        torch.set_num_threads(threads)
        dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
        attend = torch.nn.functional.scaled_dot_product_attention

        def convert(feeds: Feeds) -> Callable[[], NDArray[Any]]:
            q, k, v = (torch.from_numpy(feeds[name]).to(dtype) for name in "qkv")
            options: dict[str, Any] = {"enable_gqa": case.heads != case.groups, "is_causal": case.mask == "causal"}
            if case.mask == "padding":
                options["attn_mask"] = torch.from_numpy(feeds["bias"]).to(dtype)

            def call() -> Any:
                with torch.inference_mode():
                    return attend(q, k, v, **options)

            return call

        return _Bound(convert)


class OurCore(_Core):
    """The kernel that a model would get."""

    name = "ours"

    def load(self, artifact: Path, threads: int) -> _Bound:
        """Compiled here."""
        import tvm

        from rewriter.runtimes.tvm.target import detect, tvm_target

        case, target = Case(**json.loads(artifact.read_text())), detect("cpu", threads)
        function = kernel_of(case, target)
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        run = tvm.compile(module, target=tvm_target(target))["main"]

        def convert(feeds: Feeds) -> Callable[[], NDArray[Any]]:
            arrays = [laid_out(case, name, feeds[name]) for name in "qkv"]
            operands = [tvm.runtime.tensor(array) for array in [*arrays, *([feeds["bias"]] if "bias" in feeds else [])]]
            result = tvm.runtime.tensor(np.zeros((1, case.queries, case.heads * case.dim), np.float32))

            def call() -> Any:
                run(*operands, result)
                return result

            return call

        return _Bound(convert)


def laid_out(case: Case, name: str, x: NDArray[Any]) -> NDArray[Any]:
    """As projections leave it; a cache keeps its heads apart and may hold bfloat16."""
    import ml_dtypes

    if case.decoding and name != "q":
        return x.astype(ml_dtypes.bfloat16) if case.precision == "bf16" else x
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(1, x.shape[2], -1)


def kernel_of(case: Case, target: Target) -> Any:
    """The PrimFunc that `rewriter.runtimes.tvm.operators.attention_call` would choose, with its default tile."""
    from rewriter.runtimes.tvm.kernels.attention import Attention, Bias, Operand
    from rewriter.runtimes.tvm.operators.attention_call import kernel_for
    from rewriter.runtimes.tvm.tiles import Tiles

    def operand(name: str, heads: int, tokens: int) -> Operand:
        if not case.decoding or name == "q":
            return Operand.of((1, tokens, heads * case.dim), heads)
        return Operand.of((1, heads, tokens, case.dim), heads, "bfloat16" if case.precision == "bf16" else "float32")

    groups = tuple(head * case.groups // case.heads for head in range(case.heads))
    rows = {"causal": case.queries, "padding": 1}.get(case.mask)
    spec = Attention(
        1, case.queries, case.keys, operand("q", case.heads, case.queries), operand("k", case.groups, case.keys),
        operand("v", case.groups, case.keys), tuple(range(case.heads)), groups, groups, case.dim**-0.5,
        bias=None if rows is None else Bias((1, 1, rows, case.keys)),
        lanes=target.vector_floats, threads=target.threads,
    )  # fmt: skip
    name, make, tile = kernel_for(spec, target, Tiles(target), case.precision)
    return make(spec, tile, name)


def contest(case: Case, folder: Path, threads: int, rules: Rules) -> RaceResult:
    """Both cores on one case; the first is torch."""
    artifact = folder / "case.json"
    artifact.write_text(json.dumps(asdict(case)))
    one = feeds_of(case, 0)
    sets = max(1, min(MOST_SETS, ROTATED_BYTES // sum(array.nbytes for array in one.values())))
    feeds = save_feeds([feeds_of(case, seed) for seed in range(sets)], folder / "feeds")
    subjects = [Subject(core.name, f"{HERE}:{core.__name__}", artifact, feeds) for core in (TorchCore, OurCore)]
    return race(subjects, threads=threads, rules=rules)


def row(case: Case, result: RaceResult) -> str:
    """One line of the table."""
    if "torch" not in result or "ours" not in result:
        reasons = "; ".join(f"{name}: {failure}" for name, failure in result.failures.items())
        return f"| {case.label} | {reasons} | | | |"
    ours, theirs = (result[name].latency_s().median for name in ("ours", "torch"))
    rate = f"{case.cache_bytes / ours / 1e9:.0f} GB/s" if case.decoding else f"{case.operations / ours / 1e9:.0f} GF/s"
    gained = ratio(speedup(result["torch"], result["ours"]).as_dict())
    return f"| {case.label} | {ours * 1e3:.3f} ms | {rate} | {theirs * 1e3:.3f} ms | {gained} |"


def main() -> int:
    """Parse, race every case, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode", action="store_true", help="one and four queries over a cache")
    parser.add_argument("--most-tokens", type=int, default=8192, help="leave longer ones out")
    parser.add_argument("--only", default="", help="rows whose label contains this text")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of racing per row")
    parsed = parser.parse_args()
    rules = Rules(budget_s=parsed.budget, least_rounds=6, block_s=0.05, reopen_every=0, margin=0.02)
    sys.stdout.write("| heads | queries × keys | mask | precision | ours | | torch SDPA | speed |\n")
    sys.stdout.write("| --- | --- | --- | --- | --- | --- | --- | --- |\n")
    for case in cases(parsed.decode, parsed.most_tokens):
        if parsed.only in case.label:
            with tempfile.TemporaryDirectory() as scratch:
                sys.stdout.write(row(case, contest(case, Path(scratch), parsed.threads, rules)) + "\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m rewriter.benchmark caches KIND FOLDER``: what a smaller cache saves, in bytes and in time per token.

A decoder with random weights decodes one token from a full cache, as it is and with smaller caches (`low_rank_cache`),
under ONNX Runtime and TVM, in one interleaved race. Graphs and builds are kept in FOLDER and found again: a first call
with ``--budget 0`` only prepares. Time does not depend on what weights hold, so nothing is calibrated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from rewriter.attention.caches import cached_width
from rewriter.attention.lower import lower
from rewriter.attention.recognise import recognise
from rewriter.benchmark.cached_decoder import Shape, cached_decoder
from rewriter.core.errors import ModelError
from rewriter.core.measurement import speedup
from rewriter.core.option import Option
from rewriter.core.passes_registry import discover
from rewriter.core.site import AttentionSite, Site
from rewriter.graph.onnx import OnnxGraph, load
from rewriter.measurement.bench import Subject, save_feeds
from rewriter.measurement.race import RaceResult, Rules, race
from rewriter.runtimes import jobs
from rewriter.runtimes.standard import to_standard
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.workers import Worker, WorkerFailure
from rewriter.search.session import ONNXRUNTIME, TVM
from rewriter.search.structure import blank_statistics

SHAPES = {
    "llama": Shape("llama", 4, 768, 12, 4, 2048, 4000, 16384),
    "gpt2": Shape("gpt2", 4, 768, 12, 12, 3072, 4000, 16384),
}
FORMS = {
    "llama": ("heads=2", "key=32,value=32", "key_latent=128,value_latent=128"),
    "gpt2": ("heads=4", "key=32,value=32", "key_latent=192,value_latent=192"),
}
RUNTIMES = {"ONNX Runtime": ONNXRUNTIME, "TVM": TVM}


@dataclass(frozen=True)
class Entry:
    """One row: what the cache is made of, numbers cached per token, and the graph with composites."""

    name: str
    width: int
    graph: OnnxGraph


def entries(kind: str, folder: Path, forms: tuple[str, ...]) -> list[Entry]:
    """The decoder as it is and with smaller caches."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}.onnx"
    if not file.exists():
        onnx.save(cached_decoder(SHAPES[kind], True), file)
    graph = load(file)
    sites = recognise(graph).sites
    made = [Entry("as it is", cached_width(sites), lower(graph, sites))]
    for form in forms:
        changed = [_changed(site, form) for site in sites]
        made.append(Entry(form, cached_width(changed), lower(graph, changed)))
    return made


def _changed(site: Site, form: str) -> Site:
    if not isinstance(site, AttentionSite):
        return site
    one = discover()["low_rank_cache"].permitted()
    option = Option.parse(f"low_rank_cache{{{form}}}@{site.id}")
    return one.apply(site, option, blank_statistics(site))


def _feeds(graph: OnnxGraph, context: int) -> dict[str, np.ndarray]:
    """One new token after `context` tokens."""
    random, found = np.random.default_rng(0), {}
    for spec in graph.inputs:
        if spec.name == "input_ids":
            found[spec.name] = np.full((1, 1), 7, np.int64)
        elif spec.name == "attention_mask":
            found[spec.name] = np.ones((1, context + 1), np.int64)
        else:
            sizes = (1, int(spec.shape[1] or 0), context, int(spec.shape[3] or 0))
            found[spec.name] = random.standard_normal(sizes).astype(np.float32)
    return found


def subjects(made: list[Entry], folder: Path, contexts: list[int], threads: int) -> tuple[list[Subject], list[str]]:
    """Everything built for every context; sentences about what could not be."""
    target, found, failures = detect("cpu", threads), [], []
    with Worker("builder", 1) as builder:
        for context in contexts:
            for number, entry in enumerate(made):
                feeds = _feeds(entry.graph, context)
                saved = save_feeds([feeds], folder / f"feeds-{context}-{number}")
                shapes = {name: array.shape for name, array in feeds.items()}
                for runtime, spec in RUNTIMES.items():
                    name = f"{runtime}, {context} tokens, {entry.name}"
                    place = folder / f"{runtime.partition(' ')[2] or runtime}-{context}-{number}"
                    built = _built(builder, entry, spec, shapes, place, target)
                    if isinstance(built, WorkerFailure):
                        failures.append(f"{name}: {built}")
                    else:
                        found.append(Subject(name, spec, built, saved))
    return found, failures


def _built(
    builder: Worker, entry: Entry, spec: str, shapes: Mapping[str, tuple[int, ...]], place: Path, target: object
) -> Path | WorkerFailure:
    done = place / "done"
    if done.exists():
        return Path(done.read_text())
    graph = to_standard(entry.graph) if spec == ONNXRUNTIME else entry.graph
    saved = graph.save(place / "source.onnx")
    built = builder.call(f"{jobs.__name__}:build", spec, saved, dict(shapes), place / "build", target, timeout_s=600.0)
    if isinstance(built, WorkerFailure):
        return built
    done.write_text(str(built))
    return Path(built)


def table(made: list[Entry], result: RaceResult, contexts: list[int]) -> str:
    """As Markdown: bytes cached, milliseconds and tokens per second, and how many times faster than as it is."""
    lines = ["| runtime | context | cache | bytes per token | cache, MB | ms per token | tokens/s | against as it is |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for runtime in RUNTIMES:
        for context in contexts:
            first = f"{runtime}, {context} tokens, {made[0].name}"
            for entry in made:
                name = f"{runtime}, {context} tokens, {entry.name}"
                if name not in result:
                    continue
                seconds = result[name].latency_s().median
                ratio = speedup(result[first], result[name]) if first in result else None
                gain = "" if ratio is None else f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
                size = 4 * entry.width
                lines.append(
                    f"| {runtime} | {context} | {entry.name} | {size:,} | {size * context / 1e6:.1f} "
                    f"| {1e3 * seconds:.2f} | {1 / seconds:.0f} | {gain} |"
                )
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    """Parse, prepare, race, print. Raises `UserError`."""
    parser = argparse.ArgumentParser(
        prog="python -m rewriter.benchmark caches", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("kind", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--form", nargs="+", default=None, help="low_rank_cache's parameters, such as key=32,value=32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of racing; 0 only prepares")
    parsed = parser.parse_args(words)
    made = entries(parsed.kind, parsed.folder, tuple(parsed.form or FORMS[parsed.kind]))
    ready, failures = subjects(made, parsed.folder, parsed.context, parsed.threads)
    if not ready:
        raise ModelError("nothing could be built", "; ".join(failures))
    if parsed.budget:
        result = race(
            ready, threads=parsed.threads, rules=Rules(budget_s=parsed.budget, most_rounds=60, reopen_every=0)
        )
        failures += [f"{name}: {why}" for name, why in result.failures.items()]
        sys.stdout.write("\n".join([table(made, result, parsed.context), *failures, ""]))
    return 0

"""From a command to a session: read and check everything before the first second of searching is spent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rewriter.accuracy.splits import Splits, split
from rewriter.assembly.several_graphs import Decoder, Sibling, open_decoder, read_siblings
from rewriter.attention.recognise import recognise
from rewriter.calibration.data import Dataset, load_data
from rewriter.core.errors import DeviceError, ModelError, OptionError
from rewriter.core.options import Options, Runtime
from rewriter.core.progress import Progress
from rewriter.core.site import Recognition, State
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.report.output import check_room
from rewriter.runtimes.openvino import OpenVino
from rewriter.runtimes.tvm.target import detect
from rewriter.runtimes.workers import Worker, WorkerFailure
from rewriter.search.selection import select_passes
from rewriter.search.session import Session
from rewriter.search.traffic import choose_traffic

_DEVICE_LIMIT_S = 60.0
_BUILD_MEMORY_BYTES = 16 * 2**30


@contextmanager
def open_session(model: Path, options: Options, progress: Progress, folder: Path) -> Iterator[Session]:
    """Load, check, recognise. Raises `UserError` for bad input; ends the workers afterwards."""
    notes: list[str] = []
    _check_runtime(options.runtime)
    target = detect(options.target, options.threads, away=options.rpc is not None)
    if options.rpc is not None:
        target = _lent(target, options)
    selection = select_passes(options.passes, options.precision, target, options.allow_cache_change)
    with progress.stage("load", f"reading {model}"):
        decoder = open_decoder(model)
        graph = decoder.graph
        data = _data(graph, options)
        workload, traffic = choose_traffic(graph, data, options)
        splits = _splits(data, options, notes)
        check_room(folder, 6 * _weight_bytes(graph))
    with progress.stage("recognise", "finding attention and feed-forward blocks by what they compute"):
        recognition = recognise(graph, dict(workload.feeds[0]) if data is None else _example(data), options.seed)
        progress.advance(1.0, _census(recognition))
        siblings = _siblings(decoder, recognition, options)
    _check_something_found(recognition, model)
    cache = folder.parent
    # Thousands of small factorisations: BLAS threads only wait for each other there, and badly so on a busy machine.
    with (
        threadpool_limits(1, user_api="blas"),
        Worker("build", 1, _BUILD_MEMORY_BYTES) as builder,
        Worker("timer", target.threads) as timer,
    ):
        if target.remote:
            _check_device(timer, target)
        yield Session(
            options, progress, graph, recognition, selection, target, workload, splits, cache, folder, builder, timer,
            traffic=traffic, notes=notes, siblings=siblings,
        )  # fmt: skip


def _check_runtime(asked: str) -> None:
    """Raises `OptionError` for a runtime that does not exist or of which nothing is installed."""
    if asked not in get_args(Runtime):
        raise OptionError(f"unknown runtime {asked!r}", f"Choose one of {', '.join(get_args(Runtime))}")
    if asked == "openvino" and (refusal := OpenVino().available()) is not None:
        raise OptionError(f"--runtime {asked} cannot be used: {refusal.why}", "Or leave it to --runtime auto")


def _siblings(decoder: Decoder, recognition: Recognition, options: Options) -> tuple[Sibling, ...]:
    """The other files of the same decoder; of one file alone only where its signature may change."""
    if decoder.siblings and (decoder.together or options.allow_cache_change):
        return read_siblings(decoder.siblings, recognition.sites, options.seed)
    return ()


def _lent(target: Target, options: Options) -> Target:
    """The target as the device that a tracker lends."""
    if target.kind != "llvm":
        raise OptionError("only processors are timed through RPC", "Compile for a GPU with --compile-only")
    if options.runtime != "tvm":
        raise OptionError(f"--runtime {options.runtime} cannot be timed through RPC", "Use --runtime tvm")
    return replace(target, remote=f"{options.rpc}/{options.key}")


def _check_device(timer: Worker, target: Target) -> None:
    """Raises `DeviceError` before anything was searched if the device cannot be had."""
    found = timer.call("rewriter.runtimes.tvm.remote:check", target.remote, timeout_s=_DEVICE_LIMIT_S)
    if isinstance(found, WorkerFailure):
        raise DeviceError(f"asking for the device {target.remote} failed: {found}", "Check the tracker and its log")


def _data(graph: OnnxGraph, options: Options) -> Dataset | None:
    if options.data is None:
        if options.metric is not None:
            raise OptionError("--metric needs data to be measured on", "Give --data")
        return None
    return load_data(options.data, graph.inputs, options.tokenizer)


def _splits(data: Dataset | None, options: Options, notes: list[str]) -> Splits | None:
    if data is None:
        notes.append(
            "no data was given, so only exact rewrites were considered; give --data data.npz (one array per model "
            "input, samples first) to let calibrated rewrites compete"
        )
        return None
    found = split(data, options.seed)
    if found.repeats:
        notes.append(f"{found.repeats} repeated samples were dropped before splitting")
    return found


def _example(data: Dataset) -> dict[str, NDArray[Any]]:
    """Four samples to recognise on."""
    return {name: array[:4] for name, array in data.inputs.items()}


def _weight_bytes(graph: OnnxGraph) -> int:
    return sum(value.const_value.nbytes for value in graph.constants.values() if value.const_value is not None)


def _census(recognition: Recognition) -> str:
    ready = sum(site.state is State.LOWERABLE for site in recognition.sites)
    counts = f"{len(recognition.attention)} attentions and {len(recognition.feed_forward)} feed-forwards"
    unknown = len(recognition.unrecognised)
    return f"{counts}, {ready} can be rewritten" + (f", {unknown} not understood" if unknown else "")


def _check_something_found(recognition: Recognition, model: Path) -> None:
    if not recognition.attention:
        reasons = "; ".join(f"{entry.node}: {entry.refusal.why}" for entry in recognition.unrecognised[:3])
        raise ModelError(
            f"{model} has no attention that was understood" + (f" ({reasons})" if reasons else ""),
            "Check the model with optimize inspect",
        )

"""Feeds to look at a graph with: drawn from what its inputs are used for, or cut from an example.

Sizes are small, pairwise different and coprime, so that axes can be told apart. Names of inputs decide nothing: an
integer input that indexes a table is a number below the table's length, one that does not is a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import onnx_ir as ir

from rewriter.attention.float_masks import is_float_mask, softened
from rewriter.attention.lengths import counted_up_to, draw_lengths, length_of, table_of
from rewriter.attention.paths import Paths
from rewriter.attention.sizes import Sizes
from rewriter.attention.values import Values
from rewriter.core.errors import UnsupportedOperator, UserError
from rewriter.core.site import Array
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph, TensorSpec

BATCHES = (2, 5, 3)
IMAGE_SIDES, SOUND_SAMPLES = (32, 64, 128), (400, 1200)
LENGTHS = ((10, 7, 6, 9, 8), (13, 11, 17, 19, 23), (11, 5, 8, 7, 12))
MOST_ELEMENTS = 2**27
SIGNALS = frozenset(("Conv", "STFT", "DFT", "MaxPool", "AveragePool"))  # what shortens a long signal
# for attention over windows and blocks, whose lengths must be multiples
WHOLE_LENGTHS = ((12, 16, 32, 64, 96, 128), (24, 48, 80, 160), (36, 144, 64, 96))
STEP = 200  # nodes between two looks at what may be dropped
_LAID_OUT = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Slice", "Add")
_COMPUTED = ("Sub", "Concat", "Flatten", "Transpose", "Mul", "Max", "Min", "Clip")
TRACED = frozenset((*_LAID_OUT, *_COMPUTED))


@dataclass(frozen=True)
class Roles:
    """What the inputs are used for: `limits` bounds numbers that index tables, `masks` names 0/1 inputs.

    `lengths` names numbers of valid keys, with what they hold beyond them.
    """

    limits: Mapping[str, int]
    masks: frozenset[str]
    lengths: Mapping[str, int]


def roles(graph: OnnxGraph) -> Roles:
    """Follow every input to what it is used for: tables it indexes, scores it hides."""
    consumers: dict[str, list[ir.Node]] = {}
    for node in graph.topological():
        for value in node.inputs:
            if value is not None:
                consumers.setdefault(str(value.name), []).append(node)
    limits, masks, lengths = {}, set(), {}
    for spec in graph.inputs:
        if spec.dtype.kind in "iu":
            sizes = list(_tables(graph, consumers, spec.name))
            length = length_of(consumers, spec)
            if length is not None:
                lengths[spec.name] = length
            elif sizes:
                limits[spec.name] = min(sizes)
            elif counted_up_to(consumers, spec):
                lengths[spec.name] = 0
            else:
                masks.add(spec.name)
        elif spec.dtype.kind == "b" or is_float_mask(graph, consumers, spec.name):
            masks.add(spec.name)
    return Roles(limits, frozenset(masks), lengths)


def _tables(graph: OnnxGraph, consumers: Mapping[str, list[ir.Node]], start: str) -> Iterator[int]:
    stack, seen = [start], set()
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in consumers.get(name, []):
            names = ["" if value is None else str(value.name) for value in node.inputs]
            if node.op_type == "Gather" and names[1] == name:
                table = graph.constant(names[0])
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                if table is not None and table.ndim and table.dtype.kind not in "iub":
                    yield int(table.shape[axis])
            elif table_of(node, name):
                table = graph.constant(table_of(node, name))
                if table is not None and table.ndim:
                    yield int(table.shape[0])
            elif node.op_type in TRACED and names[0] == name:
                stack += [str(value.name) for value in node.outputs]


def size_choices(graph: OnnxGraph, round_: int) -> Iterator[Sizes]:
    """Sizes to try, most telling first: a length of its own for every name, or for all axes in the same place of larger
    inputs of the same rank (caches), one of them the sum of two others; one length for all, long ones (audio, images);
    a batch of one."""
    lengths = LENGTHS[round_]
    names = list(_axis_names(graph))
    free = [name for name, leading in names if not leading]
    places = _places(graph, free)
    for batch in dict.fromkeys((BATCHES[round_], 2, 1)):
        leading = dict.fromkeys((name for name, first in names if first), batch)
        for alike in ({name: name for name in free}, places):
            kinds = list(dict.fromkeys(alike.values()))
            distinct = {kind: lengths[i % len(lengths)] for i, kind in enumerate(kinds)}
            for chosen in (distinct, *_sums(distinct)):
                yield Sizes({**{name: chosen[alike[name]] for name in free}, **leading})
        long = [length * (round_ + 1) for length in _long_lengths(graph)]
        sound = any(spec.dtype.kind == "f" and len(spec.shape) == 2 for spec in graph.inputs)
        more = (*long, *WHOLE_LENGTHS[round_]) if sound else (*WHOLE_LENGTHS[round_], *long)
        for length in (lengths[0], *more):
            yield Sizes({**dict.fromkeys(free, length), **leading})
    yield from _several_to_one(names, round_)


def _several_to_one(names: Sequence[tuple[str, bool]], round_: int) -> Iterator[Sizes]:
    """Several items of one input to each item of the others (code books, beams)."""
    firsts = [name for name, first in names if first and not name.startswith("?")]
    free = {name: LENGTHS[round_][i % 5] for i, name in enumerate(name for name, first in names if not first)}
    for name in firsts if len(firsts) > 1 else ():
        for factor in (2, 4):
            yield Sizes({**free, **dict.fromkeys(firsts, BATCHES[round_]), name: factor * BATCHES[round_]})


def _sums(distinct: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The same sizes with one of them the sum of two others."""
    used = [name for name in distinct if not name.startswith("?")][:6]
    for total, one, other in permutations(used, 3):
        if one < other:
            yield {**distinct, total: distinct[one] + distinct[other]}


def _places(graph: OnnxGraph, free: list[str]) -> dict[str, str]:
    """For every name, the first name of an axis in the same place of an input of the same rank and kind."""
    first: dict[tuple[int, int, str], str] = {}
    same: dict[str, str] = {}
    for spec in graph.inputs:
        for position, axis in enumerate(spec.shape):
            if axis in free and len(spec.shape) > 2:
                named = first.setdefault((len(spec.shape), position, spec.dtype.kind), str(axis))
                same.setdefault(str(axis), same.get(named, named))
    return {name: same.get(name, name) for name in free}


def near_choices(graph: OnnxGraph, round_: int, known: Sizes) -> Iterator[Sizes]:
    """Sizes for graphs with lengths baked in: known ones with all but one changed, with just one changed, as is."""
    names = list(known.chosen)
    for batch in (BATCHES[round_], 1):
        fresh = {name: LENGTHS[round_][i % 5] for i, name in enumerate(names)}
        fresh |= {name: batch for name, leading in _axis_names(graph) if leading}
        yield from (Sizes({**fresh, name: known.chosen[name]}) for name in names)
        yield from (Sizes({**known.chosen, name: fresh[name]}) for name in names)
    yield known


@dataclass(frozen=True)
class Run:
    """Feeds that a graph takes, and the shape of every value on them."""

    feeds: dict[str, Array]
    shapes: Mapping[str, tuple[int, ...]]
    sizes: Sizes | None = None


def usable_feeds(
    interpreter: Interpreter,
    paths: Paths,
    example: Mapping[str, Array] | None,
    seed: int,
    failures: list[str] | None = None,
) -> list[Run] | None:
    """Feeds of three sizes that the graph takes, the second and third with hostile masks; None if it takes none.

    What went wrong with feeds that the graph did not take is added to `failures`.
    """
    failures = [] if failures is None else failures
    try:
        return _three_runs(interpreter, paths, example, seed, failures)
    except UnsupportedOperator as problem:  # no other feeds would help
        failures.append(problem.what)
        return None


def _three_runs(
    interpreter: Interpreter, paths: Paths, example: Mapping[str, Array] | None, seed: int, failures: list[str]
) -> list[Run] | None:
    graph, found = interpreter.graph, list[Run]()
    known = roles(graph)
    if example is not None:
        interpreter.bind(example)  # raises for missing inputs
    for round_ in range(3):
        usable = second_best = None
        before = found[0].sizes if found else None
        near = near_choices(graph, round_, before) if before else iter(())
        for sizes in (*size_choices(graph, round_), *near):
            if _too_large(graph, sizes):
                continue
            feeds = draw(graph, sizes, known, seed + round_, round_ > 0, example)
            run = _tried(interpreter, paths, feeds, sizes, failures)
            if run is not None and _as_declared(graph, run, sizes):
                usable = run
                break
            second_best = second_best or run
        usable = usable or second_best
        if usable is None and example is not None:
            usable = _tried(interpreter, paths, dict(example), None, failures)
        if usable is None:
            return None
        found.append(usable)
    return found


def _too_large(graph: OnnxGraph, sizes: Sizes) -> bool:
    """Whether an input of these sizes would be a burden, or have an axis that cannot be cut to any use."""
    shapes = [[sizes.of(axis, key_of(place)) for place, axis in enumerate(spec.shape)] for spec in graph.inputs]
    return any(math.prod(shape) > MOST_ELEMENTS or min(shape, default=1) < 0 for shape in shapes)


def _as_declared(graph: OnnxGraph, run: Run, sizes: Sizes) -> bool:
    """Whether axes of outputs that have the names of drawn ones also have their sizes."""
    pairs = [
        (sizes.chosen[axis], size)
        for spec in graph.outputs
        for axis, size in zip(spec.shape, run.shapes.get(spec.name, ()), strict=False)
        if isinstance(axis, str) and axis in sizes.chosen
    ]
    return all(declared == actual for declared, actual in pairs)


def _tried(
    interpreter: Interpreter, paths: Paths, feeds: dict[str, Array], sizes: Sizes | None, failures: list[str]
) -> Run | None:
    try:
        values = Values(interpreter, paths, feeds)
        for end in range(0, len(paths.nodes) + STEP, STEP):
            values.advance(end)
            values.prune(end)
    except UnsupportedOperator:
        raise
    except UserError as problem:
        failures.append(problem.what)
        return None
    return Run(feeds, values.shapes, sizes)


def _long_lengths(graph: OnnxGraph) -> tuple[int, ...]:
    """Lengths for signals; never for tokens, whose attention would grow with the square."""
    if any(spec.dtype.kind in "iub" for spec in graph.inputs):
        return ()
    if any(len(spec.shape) == 4 for spec in graph.inputs):
        return IMAGE_SIDES
    return SOUND_SAMPLES if any(node.op_type in SIGNALS for node in graph.topological()) else ()


def _axis_names(graph: OnnxGraph) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a leading axis) of every independent dynamic axis; unnamed lengths share one name."""
    seen: set[str] = set()
    names = [(axis, position, key_of(position)) for spec in graph.inputs for position, axis in enumerate(spec.shape)]
    plain = {axis for axis, _, _ in names if isinstance(axis, str) and axis.isidentifier()}
    for axis, position, key in names:
        if isinstance(axis, int):
            continue
        name = axis if axis in plain else key
        if name not in seen:
            seen.add(name)
            yield name, position == 0
    for key in ("?batch", "?length"):
        if key not in seen:
            yield key, key == "?batch"


def key_of(position: int) -> str:
    """The stand-in name of an unnamed axis."""
    return "?batch" if position == 0 else "?length"


def draw(
    graph: OnnxGraph,
    sizes: Sizes,
    known: Roles,
    seed: int,
    hostile: bool = False,
    example: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Feeds of these sizes: random, or an example cut and repeated. Masks get right padding, or are hostile."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in graph.inputs:
        shape = tuple(sizes.of(axis, key_of(position)) for position, axis in enumerate(spec.shape))
        if example is None or not np.asarray(example[spec.name]).size:  # an empty cache shows nothing
            feeds[spec.name] = _fill(spec, shape, known, rng, hostile)
        else:
            feeds[spec.name] = _cut(spec, np.asarray(example[spec.name]), shape, known, hostile)
    others = [array for name, array in feeds.items() if name not in known.lengths]
    for spec in graph.inputs:
        if spec.name in known.lengths:
            shape = feeds[spec.name].shape
            feeds[spec.name] = draw_lengths(spec, shape, known.lengths[spec.name], others)
    return feeds


def _fill(spec: TensorSpec, shape: tuple[int, ...], known: Roles, rng: np.random.Generator, hostile: bool) -> Array:
    if spec.name in known.masks:
        return _mask(spec, shape, hostile)
    if spec.name in known.limits:
        limit = max(1, known.limits[spec.name])
        return rng.integers(min(3, limit - 1), limit, shape).astype(spec.dtype)
    return rng.standard_normal(shape).astype(spec.dtype)


def _cut(spec: TensorSpec, array: Array, shape: tuple[int, ...], known: Roles, hostile: bool) -> Array:
    for axis, size in enumerate(shape):
        array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
    if spec.name not in known.masks:
        return array
    drawn = _mask(spec, shape, hostile)
    return drawn if drawn.dtype == np.bool_ else np.where(drawn == 1, array, 0).astype(array.dtype)


def _mask(spec: TensorSpec, shape: tuple[int, ...], hostile: bool) -> Array:
    """A mask input. Nobody says whether True means to attend, so every second item of a boolean one is inverted;
    nor that real ones are 0 or 1."""
    mask = pad_mask(shape, hostile).astype(spec.dtype)
    if mask.dtype == np.bool_ and mask.ndim > 1:
        mask[1::2] = ~mask[1::2]
    return softened(mask) if hostile and mask.dtype.kind == "f" else mask


def pad_mask(shape: tuple[int, ...], hostile: bool) -> Array:
    """Ones with padding on the right of the first item; hostile: left, a hole, right, a row without any, full.

    A single item gets padding on the left and a hole at once.
    """
    mask = np.ones(shape, np.int64)
    if len(shape) < 2 or shape[-1] < 5 or not mask.size:
        return mask
    if not hostile:
        mask[0, ..., -2:] = 0
        return mask
    if shape[0] == 1:
        mask[0, ..., 0] = mask[0, ..., 3:5] = 0
        return mask
    cuts = (slice(0, 2), slice(3, 5), slice(-3, None), slice(None))
    for item, cut in zip(range(shape[0] - 1), cuts, strict=False):
        mask[item, ..., cut] = 0
    return mask

"""A plan applied to a torch model: rewritten sites, in its own fx graph, checked against the ONNX lowering."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rewriter.assembly.assemble import Resolve, assemble
from rewriter.attention.lower import lower
from rewriter.core.errors import DataError, ModelError, OptionError
from rewriter.core.option import Option, Plan
from rewriter.core.passes_registry import discover
from rewriter.core.refusal import Refusal
from rewriter.core.rewrite import Pass
from rewriter.core.site import Site
from rewriter.graph.interpreter import Interpreter
from rewriter.torch_graphs.matching import CLOSE, Matches, evaluating
from rewriter.torch_graphs.sites import TorchSites
from rewriter.torch_graphs.splice import Spliced, splice

Choices = Plan | str | Iterable[Option] | Mapping[str, Option | Sequence[Option]]


@dataclass(frozen=True)
class Rewritten:
    """A rewritten torch model.

    `module` is a plain `fx.GraphModule` with parameters of its own. `names` maps every parameter that is new or has
    changed to those of the original that it came from, `removed` are originals it has no use for, `sites` are the
    rewritten sites by id. Sites that were only refitted and could not be written are in `refused`, as they were.
    """

    module: fx.GraphModule
    plan: Plan
    sites: Mapping[str, Site]
    names: Mapping[str, tuple[str, ...]]
    removed: tuple[str, ...]
    refused: Mapping[str, Refusal]


def apply(
    sites: TorchSites,
    plan: Choices,
    data: Iterable[object] = (),
    passes: Iterable[Pass] = (),
    resolve: Resolve = "all",
) -> Rewritten:
    """Rewrite a torch model by a plan; the given model stays as it is.

    `data` are batches to calibrate on, each what the model takes: a mapping of keyword arguments, a tuple of
    positional ones, or a tensor. `passes` are passes of one's own beside those of the package. ``resolve="all"`` also
    refits the outputs of unchanged sites above the first change. Raises `OptionError` for options that do not apply,
    or a site that has no form in fx, `DataError` where data is missing or does not fit.
    """
    chosen = as_plan(plan)
    for option in chosen.options:
        sites[option.site]
    known = {**discover(), **{one.name: one for one in passes}}
    batches = [feeds_of(sites, batch) for batch in data]
    before = {site.id: site for site in sites}
    assembled = assemble(sites.graph, list(sites), chosen, known, batches, resolve=resolve)
    after = {name: site for name, site in assembled.sites.items() if site is not before[name]}
    missing = [name for name in chosen.choices if chosen.at(name) and name not in assembled.sites]
    if missing:
        what = f"site {missing[0]!r} cannot be rewritten: it was not shown that writing it anew is the identity"
        raise OptionError(what, "See its problems in rewriter.inspect")
    made = _checked(sites.matches, before, after)
    asked = [name for name in made.refused if chosen.at(name)]
    if asked:
        raise OptionError(f"site {asked[0]!r} cannot be written in fx: {made.refused[asked[0]].why}", "Leave it out")
    written = {name: site for name, site in after.items() if name not in made.refused}
    return Rewritten(made.module, chosen, written, made.names, made.removed, made.refused)


def as_plan(choices: Choices) -> Plan:
    """A plan from its text, from options with sites, or from options by site."""
    if isinstance(choices, Plan):
        return choices
    if isinstance(choices, str):
        return Plan.parse(choices)
    if not isinstance(choices, Mapping):
        return Plan.of(choices)
    listed = [(site, [given] if isinstance(given, Option) else list(given)) for site, given in choices.items()]
    return Plan.of(replace(option, site=site) for site, options in listed for option in options)


def feeds_of(sites: TorchSites, batch: object) -> dict[str, np.ndarray]:
    """Inputs of the ONNX graph from what the torch model takes; raises `DataError` if it takes something else."""
    if isinstance(batch, Tensor):
        return sites.bridge.feeds_of(batch)
    if isinstance(batch, Mapping):
        return sites.bridge.feeds_of(**batch)
    if isinstance(batch, (tuple, list)):
        return sites.bridge.feeds_of(*batch)
    raise DataError(f"a batch is a {type(batch).__name__}", "Give mappings of keyword arguments, tuples, or tensors")


def _checked(matches: Matches, before: Mapping[str, Site], after: Mapping[str, Site]) -> Spliced:
    """All sites spliced, without those that spoil the result on their own."""
    made = splice(matches, before, after)
    if _agrees(matches, made, after):
        return made
    refused = dict(made.refused)
    for name in [name for name in after if name not in refused]:
        if not _agrees(matches, splice(matches, before, {name: after[name]}), {name: after[name]}):
            refused[name] = Refusal("fx-differs", "written in fx it differs from what was written in ONNX")
    left = {name: site for name, site in after.items() if name not in refused}
    made = splice(matches, before, left)
    if not _agrees(matches, made, left):
        raise ModelError("the rewritten fx graph differs from the rewritten ONNX graph", "Report this as a bug")
    return replace(made, refused=refused)


def _agrees(matches: Matches, made: Spliced, after: Mapping[str, Site]) -> bool:
    """Whether the module gives what the lowered ONNX graph gives, on feeds of two sizes."""
    bridge = matches.bridge
    lowered = lower(bridge.graph, [site for name, site in after.items() if name not in made.refused])
    interpreter = Interpreter(lowered)
    for feeds in matches.feeds:
        expected = interpreter.run(feeds)
        args, kwargs = bridge.arguments(bridge.leaves_of(feeds))
        with torch.no_grad(), evaluating(made.module):
            leaves = pytree.tree_leaves(made.module(*args, **kwargs))
        actual = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(actual) != len(expected) or not all(map(_close, actual, expected.values())):
            return False
    return True


def _close(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    if not actual.is_floating_point():
        return torch.equal(actual, expected.to(actual.dtype))
    # rows that may attend to nothing are NaN in an explicit softmax, and zero in torch's own attention
    known = ~torch.isnan(expected)
    scale = expected[known].abs().max() if known.any() else torch.tensor(0.0)
    far = (actual[known].double() - expected[known].double()).abs()
    return bool((far <= CLOSE[actual.dtype] * (scale.double() + 1e-30)).all())

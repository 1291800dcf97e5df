"""One torch model in its two shapes: the fx graph that is rewritten, and the ONNX graph in which it is understood.

What is rewritten is the user's own graph where there is one (`fx.GraphModule`), else that of the exported program.
Nothing is written in ONNX: it is where meaning is read, and values tell which of its names is which fx node.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rewriter.core.errors import DataError, UserError
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.tensors import to_numpy, to_torch
from rewriter.graph.torch_export import Exported, export_torch

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


@dataclass(frozen=True)
class Bridge:
    """The fx graph `host`, the ONNX graph of the same model, and what leads from one to the other.

    `leaves` and `spec` are the example the model was exported with, flattened; `fed` are the positions in it of the
    tensors that are inputs of the ONNX graph, in its order. `fx_names` maps names of ONNX nodes and values to fx nodes
    they may stem from, likeliest first: claims of the exporter, to be checked by value.
    """

    host: fx.GraphModule
    graph: OnnxGraph
    program: torch.export.ExportedProgram
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    fed: tuple[int, ...]
    fx_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the example."""
        return self.arguments(self.leaves)

    def arguments(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Leaves in the structure of the model's arguments."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return tuple(args), dict(kwargs)

    def leaves_of(self, feeds: Mapping[str, np.ndarray | Tensor]) -> tuple[Any, ...]:
        """The example's leaves with inputs of the ONNX graph in place of its tensors."""
        found = list(self.leaves)
        for position, spec in zip(self.fed, self.graph.inputs, strict=True):
            given = feeds[spec.name]
            tensor = given if isinstance(given, Tensor) else to_torch(np.array(given))
            found[position] = tensor.to(found[position].dtype)
        return tuple(found)

    def feeds_of(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """Inputs of the ONNX graph by name, from arguments in the structure of the example.

        Raises `DataError` if they have another structure.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            raise DataError("these arguments differ in structure from the example", f"The example is {self.spec}")
        names = [entry.name for entry in self.graph.inputs]
        return {name: to_numpy(leaves[place].detach()) for place, name in zip(self.fed, names, strict=True)}

    def placeholders(self, leaves: Sequence[Any]) -> list[Any]:
        """What the host's placeholders take, in their order."""
        nodes = [node for node in self.host.graph.nodes if node.op == "placeholder"]
        if is_flat(self.host):
            return list(leaves)
        args, kwargs = self.arguments(leaves)
        bound = inspect.signature(self.host.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return [bound.arguments[str(node.target).lstrip("*")] for node in nodes]


def bridge(
    model: nn.Module | torch.export.ExportedProgram,
    inputs: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Bridge:
    """Read a torch model. `inputs`, `kwargs` and `dynamic_shapes` are as `torch.export.export` takes them.

    An `ExportedProgram` brings its own example. Raises `UserError` without an example, `ModelError` if torch cannot
    export the model.
    """
    exported = export_torch(model, inputs, dynamic_shapes=dynamic_shapes, kwargs=kwargs)
    example = exported.program.example_inputs
    if example is None:
        raise UserError("this exported program has no example of its inputs", "Export it anew from its module")
    leaves, spec = pytree.tree_flatten((tuple(example[0]), dict(example[1])))
    fed = _fed(exported, leaves)
    host = model if isinstance(model, fx.GraphModule) else unlifted(exported.program)
    return Bridge(host, exported.graph, exported.program, tuple(leaves), spec, fed, dict(_fx_names(exported)))


def unlifted(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The graph of an exported program as a module that holds its parameters, without checks of its inputs."""
    host = program.module(check_guards=False)
    assert isinstance(host, fx.GraphModule)
    return host


def is_flat(host: fx.GraphModule) -> bool:
    """Whether placeholders are the leaves of the arguments, as torch.export writes them."""
    return hasattr(host.graph._codegen, "pytree_info")


def _fed(exported: Exported, leaves: Sequence[Any]) -> tuple[int, ...]:
    places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    if len(places) != len(exported.graph.inputs):
        what = f"the model has {len(places)} tensor inputs, its export {len(exported.graph.inputs)}"
        raise UserError(what, "Export it with all inputs that it uses, and no others")
    return places


def _fx_names(exported: Exported) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of ONNX nodes and values with the fx nodes that the exporter says they stem from."""
    origins = {} if exported.decomposed is None else dict(_origins(exported.decomposed))
    for node in exported.graph.topological():
        scopes = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
        names = [str(value.name) for value in node.outputs]
        for name in (str(node.name), *names):
            claimed = [*origins.get(name, ()), *(origins.get(scopes[-1], ()) if scopes else ())]
            yield name, tuple(dict.fromkeys(claimed))


def _origins(program: torch.export.ExportedProgram) -> Iterator[tuple[str, tuple[str, ...]]]:
    """For each node of a decomposed program, the names it had before, oldest last."""
    for node in program.graph.nodes:
        names, sources = [], list(node.meta.get("from_node") or ())
        while sources:
            names.append(sources[-1].name)
            sources = list(sources[-1].from_node or ())
        yield node.name, (*dict.fromkeys(names), node.name)


def parameter_names(graph: OnnxGraph, known: Mapping[str, Any], initialiser: str) -> tuple[str, ...]:
    """The parameters, by full name, that an initialiser of the ONNX graph was made of."""
    if initialiser in known:
        return (initialiser,)
    value = graph.constants.get(initialiser)
    folded = [] if value is None else ast.literal_eval(value.metadata_props.get(FOLDED_FROM, "[]"))
    found = [name for source in folded if source != initialiser for name in parameter_names(graph, known, source)]
    return tuple(dict.fromkeys(found))

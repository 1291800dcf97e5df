"""Functions written for another opset than their model: inlined only if their operators mean the same in both."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from rewriter.core.errors import ModelError


def align(model: ir.Model) -> None:
    """Let every function import the model's opsets. Raises `ModelError` where that would change what one computes."""
    for function in model.functions.values():
        for domain, version in list(function.opset_imports.items()):
            wanted = model.opset_imports.get(domain)
            if wanted is None or wanted == version:
                continue
            for node in _nodes(function):
                if node.domain == domain and not same_meaning(node.op_type, domain, version, wanted):
                    raise ModelError(
                        f"the function {function.domain}::{function.name} is written for opset {version} and the model "
                        f"for {wanted}, in which {node.op_type} is another operator",
                        "Convert the model to one opset with onnx.version_converter, or export it again",
                    )
            function.opset_imports[domain] = wanted


def _nodes(function: ir.Function) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(function)


def same_meaning(operator: str, domain: str, one: int, other: int) -> bool:
    """Whether an operator has the same inputs, outputs and defaults at two opsets; dtypes and options may be added.

    Operators of domains whose definitions are not known here are taken to keep their meaning.
    """
    try:
        schemas = [onnx.defs.get_schema(operator, version, domain) for version in (one, other)]
    except onnx.defs.SchemaError:
        return bool(domain)
    if schemas[0].since_version == schemas[1].since_version:
        return True
    return _formals(schemas[0]) == _formals(schemas[1]) and _attributes_agree(*schemas)


def _formals(schema: onnx.defs.OpSchema) -> list[list[tuple[str, object]]]:
    return [[(formal.name, formal.option) for formal in side] for side in (schema.inputs, schema.outputs)]


def _attributes_agree(one: onnx.defs.OpSchema, other: onnx.defs.OpSchema) -> bool:
    """Whether attributes that both have keep their defaults, and those that one lacks need not be given."""
    for name in {*one.attributes, *other.attributes}:
        both = [schema.attributes.get(name) for schema in (one, other)]
        defaults = [None if entry is None else entry.default_value.SerializeToString() for entry in both]
        if None not in both and defaults[0] != defaults[1]:
            return False
        if None in both and any(entry is not None and entry.required for entry in both):
            return False
    return True

"""From planned Relax functions to straight-line steps: which kernel runs on which memory, in which order."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline

from rewriter.core.errors import UnsupportedOperator

ALIGNMENT = 64
_ENGINE = "a static library"


@dataclass(frozen=True)
class Region:
    """A tensor somewhere: in the weights, or in the workspace. `offset` and sizes in bytes."""

    place: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size."""
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Step:
    """One call of a kernel."""

    kernel: str
    operands: tuple[Region, ...]


@dataclass
class Routine:
    """One function of the library: inputs and outputs by name, steps between them, workspace in bytes."""

    inputs: list[Region] = field(default_factory=list)
    outputs: list[Region] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    workspace_bytes: int = 0

    def room(self, nbytes: int) -> int:
        """The offset of fresh workspace."""
        offset = self.workspace_bytes
        self.workspace_bytes += aligned(max(nbytes, 1))
        return offset


def aligned(nbytes: int) -> int:
    """Rounded up to where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return int(np.dtype(dtype).itemsize)


def planned(functions: Any, target: Any) -> Any:
    """The module with kernels written out and memory planned."""
    passes = [
        *pipeline.library_dispatch_passes(target),
        *pipeline.legalize_passes(target),
        *pipeline.dataflow_lower_passes(target),
        relax.transform.StaticPlanBlockMemory(),
    ]
    with target:
        return tvm.transform.Sequential(passes)(functions)


class Reader:
    """Reads one planned function. `weights` gives the place of each parameter; constants are added to `constants`."""

    def __init__(self, weights: list[Region], constants: dict[bytes, Region]) -> None:
        self.weights, self.constants = weights, constants
        self.routine = Routine()
        self._storages: dict[Any, int] = {}
        self._regions: dict[Any, Any] = {}

    def read(self, function: Any, inputs: int) -> Routine:
        """The routine of a function whose first `inputs` parameters are inputs. Raises `UnsupportedOperator`."""
        for index, parameter in enumerate(function.params):
            if index >= inputs:
                self._regions[parameter] = self.weights[index - inputs]
                continue
            shape, dtype = _type(parameter)
            offset = self.routine.room(prod(shape) * itemsize(dtype))
            region = Region("workspace", offset, shape, dtype)
            self.routine.inputs.append(region)
            self._regions[parameter] = region
        for block in function.body.blocks:
            for binding in block.bindings:
                self._regions[binding.var] = self._value(binding.value, binding.var)
        results = self._value(function.body.body, None)
        self.routine.outputs = list(results) if isinstance(results, tuple) else [results]
        return self.routine

    def _value(self, value: Any, variable: Any) -> Any:
        if isinstance(value, relax.Tuple):
            return tuple(self._value(part, None) for part in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value, None)[value.index]
        if isinstance(value, type(relax.const(1.0))):
            return self._constant(np.ascontiguousarray(value.value.numpy()))
        if isinstance(value, relax.Call):
            return self._call(value, variable)
        if value in self._regions:
            return self._regions[value]
        raise UnsupportedOperator(_ENGINE, type(value).__name__, str(variable))

    def _constant(self, array: np.ndarray) -> Region:
        key = repr((array.shape, str(array.dtype))).encode() + array.tobytes()
        if key not in self.constants:
            used = sum(aligned(region.nbytes) for region in self.constants.values())
            self.constants[key] = Region("constants", used, array.shape, str(array.dtype))
        return self.constants[key]

    def _call(self, call: Any, variable: Any) -> Any:
        if isinstance(call.op, tvm.ir.GlobalVar):
            operands = tuple(part for argument in call.args for part in self._operands(argument))
            self.routine.steps.append(Step(str(call.op.name_hint), operands))
            return ()
        name = _name(call)
        if name == "relax.memory.alloc_storage":
            self._storages[variable] = self.routine.room(int(call.args[0].values[0]))
            return None
        if name == "relax.memory.alloc_tensor":
            shape, dtype = _type(variable)
            return Region("workspace", self._storages[call.args[0]] + int(call.args[1].value), shape, dtype)
        if name == "relax.builtin.alloc_tensor":
            shape, dtype = _type(variable)
            return Region("workspace", self.routine.room(prod(shape) * itemsize(dtype)), shape, dtype)
        if name in ("relax.reshape", "relax.memory.view", "vm.builtin.reshape"):
            source, (shape, dtype) = self._value(call.args[0], None), _type(variable)
            return Region(source.place, source.offset, shape, dtype)
        if name in ("relax.memory.kill_tensor", "relax.memory.kill_storage", "relax.null_value"):
            return None
        raise UnsupportedOperator(_ENGINE, name, str(variable))

    def _operands(self, argument: Any) -> tuple[Region, ...]:
        found = self._value(argument, None)
        return found if isinstance(found, tuple) else (found,)


def _name(call: Any) -> str:
    if getattr(call.op, "name", "") == "relax.call_packed" or hasattr(call.op, "global_symbol"):
        return str(getattr(call.op, "global_symbol", call.args[0]))
    return str(getattr(call.op, "name", call.op))


def _type(variable: Any) -> tuple[tuple[int, ...], str]:
    return tuple(int(size) for size in variable.ty.shape.values), str(variable.ty.dtype)

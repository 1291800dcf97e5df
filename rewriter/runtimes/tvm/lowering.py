"""From a `Program` to a Relax function: plain operators by the table, heavy ones by our templates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from rewriter.core.errors import UnsupportedOperator
from rewriter.core.target import Target
from rewriter.runtimes.tvm.parameters import Parameters
from rewriter.runtimes.tvm.program import Node, Program
from rewriter.runtimes.tvm.specialise import ENGINE
from rewriter.runtimes.tvm.tiles import Tiles
from rewriter.runtimes.tvm.work import operations

Expression = Any
INLINE_ELEMENTS = 8
OPAQUE_PATTERN = 8  # relax: never fuse into or with this kernel


class Kernels:
    """The templates instantiated for one module; equal specifications share one function."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self._made: dict[Hashable, Any] = {}
        self.work: dict[str, int] = {}  # operations of one call, by kernel

    def get(self, name: str, key: Hashable, make: Callable[[str], Any]) -> Any:
        """The function of the module for a specification, made on first use."""
        if key not in self._made:
            unique = f"{name}_{len(self._made)}"
            function = make(unique).with_attr("op_pattern", OPAQUE_PATTERN).without_attr("global_symbol")
            self._made[key] = self.builder.add_func(function, unique)
            self.work[unique] = operations(key)
        return self._made[key]


class Lowering:
    """One function being built. `table` maps operator keys to functions that return the expressions of the outputs."""

    def __init__(
        self, program: Program, target: Target, kernels: Kernels, parameters: Parameters, tiles: Tiles
    ) -> None:
        self.program, self.target, self.kernels = program, target, kernels
        self.parameters, self.tiles, self.builder = parameters, tiles, kernels.builder
        self.lanes, self.threads = target.vector_floats, target.threads
        self.env: dict[str, Expression] = {}
        self.read = frozenset(program.uses())
        self.used: dict[str, Expression] = {}
        self.rounded: dict[tuple[str, str], list[Expression]] = {}  # values in a number format, by name and format

    def lower(self, name: str, table: Mapping[str, Callable[[Lowering, Node], Any]]) -> tuple[str, ...]:
        """Add the function `name` to the module; returns the parameters it takes after the inputs, by name."""
        program = self.program
        inputs = [self._variable(value) for value in program.inputs]
        self.env.update(zip(program.inputs, inputs, strict=True))
        # Only inputs are checked in each run: weights were when they were read, and a check of each costs 1 us.
        with self.builder.function(name, attrs={"num_input": len(inputs)}):
            with self.builder.dataflow():
                for node in program.nodes:
                    self._emit(node, table)
                outputs = [self.builder.emit_output(self.value(output)) for output in program.outputs]
            self.builder.emit_func_output(relax.Tuple(outputs), params=[*inputs, *self.used.values()])
        return tuple(self.used)

    def _emit(self, node: Node, table: Mapping[str, Callable[[Lowering, Node], Any]]) -> None:
        if node.key not in table:
            raise UnsupportedOperator(ENGINE, node.key, node.name)
        try:
            found = table[node.key](self, node)
            results = found if isinstance(found, (list, tuple)) else [found]
            for output, result in zip(node.outputs, results, strict=False):
                if output and result is not None:
                    self.env[output] = self._checked(node, output, self.builder.emit(result))
        except (TypeError, ValueError, LookupError, RuntimeError, AssertionError) as error:
            # What Relax refuses (a dtype, a rank) is for the caller a node that this engine cannot run.
            raise self.unsupported(node, str(error).splitlines()[0] if str(error) else type(error).__name__) from error

    def _checked(self, node: Node, name: str, result: Expression) -> Expression:
        """The result, if it is of the shape and dtype that the interpreter found: else it was lowered wrongly."""
        shape, dtype = tuple(int(size) for size in result.ty.shape.values), str(result.ty.dtype)
        if (shape, dtype) != (self.shape(name), self.dtype(name)):
            raise self.unsupported(node, f"it came out as {dtype} {shape}, not {self.dtype(name)} {self.shape(name)}")
        return result

    def _variable(self, name: str) -> Expression:
        value = self.program.values[name]
        return relax.Var(_identifier(name), relax.TensorType(value.shape, str(value.dtype)))

    # ---- what operators use

    def value(self, name: str) -> Expression:
        """The expression of a value: computed, a small constant, or a parameter."""
        if name in self.env:
            return self.env[name]
        array = self.program.constant(name)
        assert array is not None, f"{name} is neither computed nor constant"
        return self.array(array)

    def array(self, array: NDArray[Any]) -> Expression:
        """A constant: written into the code when tiny, otherwise handed in at run time."""
        if array.size <= INLINE_ELEMENTS:
            return relax.const(array, str(array.dtype))  # untold, it makes int32 of whole scalars
        key = self.parameters.add(array)
        if key not in self.used:
            self.used[key] = relax.Var(f"p{len(self.used)}", relax.TensorType(array.shape, str(array.dtype)))
        return self.used[key]

    def parameter(self, key: Hashable, make: Callable[[], NDArray[Any]]) -> Expression:
        """A constant that is costly to make (a packed weight), made once per `key`."""
        name, array = self.parameters.derived(key, make)
        if name not in self.used:
            self.used[name] = relax.Var(f"p{len(self.used)}", relax.TensorType(array.shape, str(array.dtype)))
        return self.used[name]

    def constant(self, node: Node, index: int) -> NDArray[Any] | None:
        """The array of an input that decides shapes; None when it is not given, an error when it is computed."""
        name = node.input(index)
        if not name:
            return None
        array = self.program.constant(name)
        if array is None:
            raise self.unsupported(node, f"input {index} ({name}) decides shapes but depends on the data")
        return array

    def wants(self, node: Node, *indices: int) -> bool:
        """Whether anybody reads one of these outputs; exporters name outputs that nobody reads."""
        return any(node.outputs[index] in self.read for index in indices if index < len(node.outputs))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a value."""
        return self.program.shape(name)

    def dtype(self, name: str) -> str:
        """Of a value, in TVM's spelling."""
        return str(self.program.dtype(name))

    def call(self, function: Any, inputs: Sequence[Expression], *outputs: tuple[Sequence[int], str]) -> Expression:
        """A call of a template; several outputs come as a tuple."""
        types = [relax.TensorType(tuple(shape), dtype) for shape, dtype in outputs]
        return relax.call_tir(function, list(inputs), types if len(types) > 1 else types[0])

    def unsupported(self, node: Node, detail: str) -> UnsupportedOperator:
        """The error for a form of an operator that has no lowering."""
        return UnsupportedOperator(ENGINE, node.key, node.name, detail)


def _identifier(name: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in name) or "x"


def is_float32(lowering: Lowering, name: str) -> bool:
    """Whether a value is single precision, which is what the templates compute in."""
    return lowering.program.dtype(name) == np.float32


def by_template(lowering: Lowering, name: str) -> bool:
    """Whether our kernels serve a value: they compute in single precision, on processors."""
    return lowering.target.kind == "llvm" and is_float32(lowering, name)

"""What an attention operator of the graph computes inside itself, as steps written before or after its site."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from rewriter.attention.build import Builder
from rewriter.attention.trace import Trace
from rewriter.core.site import Array, Step


class Aside(Builder):
    """Steps on top of the values of a run. Each is computed as it is written, so that its result can be looked at.

    A name is made of what it stands for: sites that compute the same share it. With `blind` nothing is computed, for
    steps that read what only the site makes.
    """

    def __init__(self, trace: Trace, blind: bool = False) -> None:
        super().__init__("inside", trace.graph.opset, lambda name: ir.Value(name=name))
        self.trace, self.blind = trace, blind
        self.steps: list[Step] = []

    def constant(self, array: Array, name: str = "") -> str:
        """A constant, by its content."""
        digest = hashlib.sha256(f"{array.dtype} {array.shape} {name}".encode() + np.ascontiguousarray(array).tobytes())
        return self._taken(Step("Constant", (), f"{self.prefix}/{digest.hexdigest()[:16]}", {}, array))

    def number(self, value: float) -> str:
        """A constant float without axes."""
        return self.constant(np.array(float(value)))

    def whole(self, value: int) -> str:
        """A constant int64 without axes."""
        return self.constant(np.array(value, np.int64))

    def op(self, kind: str, /, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A standard operator; its result is known at once."""
        digest = hashlib.sha256(repr((kind, inputs, sorted(attributes.items()))).encode())
        return self._taken(Step(kind, inputs, output or f"{self.prefix}/{digest.hexdigest()[:16]}", attributes))

    def length(self, name: str, axis: int) -> str:
        """One axis of a value's shape, without axes."""
        return self.op("Gather", self.op("Shape", name), self.whole(axis))

    def _taken(self, step: Step) -> str:
        if all(step.output != other.output for other in self.steps):
            self.steps.append(step)
            if not self.blind:
                self._compute(step)
        return step.output

    def _compute(self, step: Step) -> None:
        trace = self.trace
        if step.array is not None:
            trace.env.add(step.output, trace.interpreter.tensor(step.array))
            return
        maker = Builder(self.prefix, self.opset, lambda name: ir.Value(name=name))
        maker.op(step.operator, *step.inputs, output=step.output, **step.attributes)
        env = {name: trace.env[name] for name in step.inputs if name}
        trace.interpreter.run_nodes(maker.nodes, env)
        trace.interpreter.forget(maker.nodes)
        trace.env.add(step.output, env[step.output])


def write(builder: Builder, steps: Iterable[Step]) -> None:
    """Steps as nodes and constants of a site under construction."""
    constants: dict[str, str] = {}
    for step in steps:
        if step.array is not None:
            known = f"{builder.prefix}/{step.output}"
            constants[step.output] = known if known in builder.constants else builder.constant(step.array, step.output)
        else:
            inputs = [constants.get(name, name) for name in step.inputs]
            builder.op(step.operator, *inputs, output=step.output, **step.attributes)


def read_by(steps: Iterable[Step], wanted: str) -> list[str]:
    """The values of the graph that a step's result is made of; the name itself if no step makes it.

    What is read for its shape alone does not count.
    """
    made = {step.output: step for step in steps}
    found, stack = dict[str, None](), [wanted]
    while stack:
        name = stack.pop()
        if name in made:
            stack += [read for read in made[name].inputs if read and made[name].operator != "Shape"]
        else:
            found[name] = None
    return list(found)

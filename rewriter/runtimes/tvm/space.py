"""What a tuner needs to know about one kernel: what may be tried, what each try should take, and how to run one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from rewriter.core.target import Target
from rewriter.runtimes.tvm import amx
from rewriter.runtimes.tvm.database import Subject
from rewriter.runtimes.tvm.target import tvm_target

Choice = Any  # a frozen dataclass of plain fields: how one kernel is cut

ROTATED_BYTES = 48 << 20  # beyond any cache that one core has to itself
MOST_SETS = 16


class Run(Protocol):
    """One compiled choice with operands of normal values, in several sets so that none stays in cache."""

    sets: int

    def error(self) -> float:
        """The largest difference from a reference in numpy, as a share of what is tolerated: beyond 1 it is wrong."""
        ...

    def seconds(self, index: int) -> float:
        """One run on one set of operands."""
        ...


class Space(Protocol):
    """One kernel at one shape. Travels to a worker by pickle, so it is plain data; only `run` builds anything."""

    @property
    def subject(self) -> Subject:
        """What it is in the database, with a version of its source."""
        ...

    def choices(self) -> Sequence[Choice]:
        """The default first, then the others in the order in which they are worth trying."""
        ...

    def predicted(self, choice: Choice) -> float:
        """What a choice should take by a roofline model, in any unit."""
        ...

    def choice(self, fields: Mapping[str, Any]) -> Choice:
        """The choice that `asdict` made plain. Raises TypeError for fields it does not have."""
        ...

    def run(self, choice: Choice) -> Run:
        """In the worker: compile one choice and draw its operands."""
        ...


def text_of(choice: Choice) -> str:
    """A choice as text, equal for equal choices."""
    return json.dumps(asdict(choice), sort_keys=True)


@cache
def source_version(*names: str) -> str:
    """A version of kernel templates: of the content of these files below ``kernels``."""
    folder = Path(__file__).parent / "kernels"
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in names)).hexdigest()[:12]


def compiled(function: Any, target: Target) -> Any:
    """One template as a function to call in this process."""
    import tvm

    amx.ask_for(target)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=tvm_target(target))["main"]

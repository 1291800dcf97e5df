"""The contract of a pass: data in, data out. One file in `passes/` holds one subclass of `Pass`.

The framework finds passes by listing that folder, and enforces what a pass must not promise by itself: the input is
unchanged, options print and parse, refusals have reasons (tests/passes/contract.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from rewriter.core.option import Option
from rewriter.core.refusal import Refusal
from rewriter.core.site import Site
from rewriter.core.statistics import Statistics
from rewriter.core.target import Target


class Pass(ABC):
    """One rewrite of a raised site.

    `kind` is ``exact`` (same function in exact arithmetic, needs no data) or ``calibrated`` (needs statistics, its
    output projection is solved anew by `rewriter.assembly`). `order` sorts passes that meet at one site: exact
    ones below 10, cuts of whole heads before ranks.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["exact", "calibrated"]]
    order: ClassVar[int] = 50

    @abstractmethod
    def refuse(self, site: Site) -> Refusal | None:
        """Why this pass must leave the site alone, or None."""

    @abstractmethod
    def options(self, site: Site, target: Target) -> tuple[Option, ...]:
        """The choices worth pricing at this site, cheapest cut first; empty if refused. Options carry the site's id."""

    @abstractmethod
    def apply(self, site: Site, option: Option, statistics: Statistics | None) -> Site:
        """The rewritten site. `statistics` is given to calibrated passes and describes this very site."""

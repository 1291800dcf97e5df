"""Floating-point operations as a budget: what a rival is given, whatever it saves them with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rewriter.attention.flops import site_flops
from rewriter.core.site import Site


@dataclass(frozen=True)
class Reduced:
    """Sites by id as a rival leaves them, and the share of their operations that it counts as left."""

    sites: Mapping[str, Site]
    share: float
    detail: str = ""


@dataclass(frozen=True)
class Sizes:
    """Operations of sites at one length; linear layers alone where a rival keeps the rest.

    `tokens` is the length (queries and keys) at which operations are counted.
    """

    original: Mapping[str, Site]
    tokens: int = 128
    _whole: list[int] = field(default_factory=list)

    def flops(self, site: Site) -> int:
        """Operations of one site for one sequence."""
        return site_flops(site, 1, self.tokens)

    @property
    def whole(self) -> int:
        """Operations of all sites as they are in the original."""
        if not self._whole:
            self._whole.append(sum(map(self.flops, self.original.values())))
        return self._whole[0]

    def share(self, sites: Mapping[str, Site]) -> float:
        """What is left of the operations."""
        return sum(map(self.flops, sites.values())) / self.whole


def largest(levels: Sequence[float], reduced: Callable[[float], Reduced], share: float) -> Reduced:
    """The mildest level whose operations fit into `share`; the strongest if none does. `levels` rise with size."""
    low, high = 0, len(levels) - 1
    best = reduced(levels[0])
    while low <= high:
        middle = (low + high) // 2
        tried = reduced(levels[middle])
        if tried.share <= share + 1e-9:
            best, low = tried, middle + 1
        else:
            high = middle - 1
    return best

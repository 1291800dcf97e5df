"""The search problem: at each site one choice, each with its latency on the target and its damage to the metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rewriter.core.option import Option, Plan

Options = tuple[Option, ...]


@dataclass(frozen=True)
class Choice:
    """What is done at one site (nothing, if `options` is empty), with its predicted latency and damage."""

    site: str
    options: Options
    latency_s: float
    damage: float


@dataclass(frozen=True)
class Problem:
    """Sites in data-flow order, each with its choices. The first choice of each site is to leave it alone."""

    sites: Mapping[str, Sequence[Choice]]

    def plan(self, picked: Mapping[str, Choice]) -> Plan:
        """The plan that makes these choices."""
        return Plan({site: choice.options for site, choice in picked.items() if choice.options})

    def pick(self, plan: Plan) -> dict[str, Choice]:
        """The choices a plan makes; a plan outside the problem is an error of the caller."""
        picked = {}
        for site, choices in self.sites.items():
            picked[site] = next(choice for choice in choices if choice.options == plan.at(site))
        return picked

    def saved_s(self, picked: Mapping[str, Choice]) -> float:
        """Predicted seconds saved against leaving every site alone."""
        return sum(choices[0].latency_s - picked[site].latency_s for site, choices in self.sites.items())

    def damage(self, picked: Mapping[str, Choice]) -> float:
        """Predicted damage, added up over sites."""
        return sum(choice.damage for choice in picked.values())


def undominated(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Without choices that another one beats (or equals) in both latency and damage; the first one always stays."""
    kept = [choices[0]]
    best = float("inf")
    for choice in sorted(choices[1:], key=lambda c: (c.damage, c.latency_s)):
        if choice.latency_s < min(best, choices[0].latency_s):
            kept.append(choice)
            best = choice.latency_s
    return tuple(kept)

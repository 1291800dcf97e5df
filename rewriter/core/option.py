"""Options and plans: one choice at one site, and the choices at all sites, with a text form that round-trips.

``head_pruning{keep=8}@layers.3.attention`` is one option; a plan is a list of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rewriter.core.errors import OptionError

Value = int | float | str

_TEXT = re.compile(r"^(?P<name>[a-z_][a-z0-9_]*)(\{(?P<fields>[^}]*)\})?(@(?P<site>[A-Za-z0-9_.]+))?$")


@dataclass(frozen=True, order=True)
class Option:
    """One pass with its parameters, at one site. Parameters are a sorted tuple, so equal options are equal."""

    name: str
    parameters: tuple[tuple[str, Value], ...] = ()
    site: str = ""

    @classmethod
    def of(cls, name: str, site: str = "", **parameters: Value) -> Option:
        """``Option.of("head_pruning", "layers.3.attention", keep=8)``."""
        return cls(name, tuple(sorted(parameters.items())), site)

    def __str__(self) -> str:
        fields = ",".join(f"{key}={value}" for key, value in self.parameters)
        return self.name + (f"{{{fields}}}" if fields else "") + (f"@{self.site}" if self.site else "")

    def __getitem__(self, key: str) -> Value:
        return dict(self.parameters)[key]

    def integer(self, key: str) -> int:
        """A whole-number parameter; raises `OptionError` when it is missing or something else."""
        value = dict(self.parameters).get(key)
        if not isinstance(value, int):
            raise OptionError(f"option {self} needs a whole number {key}", f"Write {self.name}{{{key}=8}}")
        return value

    @classmethod
    def parse(cls, text: str) -> Option:
        """The inverse of `str`."""
        match = _TEXT.match(text.strip())
        if not match:
            raise OptionError(f"cannot read option {text!r}", "Write it like head_pruning{keep=8}@layers.3.attention")
        fields = [part for part in (match["fields"] or "").split(",") if part.strip()]
        pairs = [part.partition("=") for part in fields]
        if any(not equals for _, equals, _ in pairs):
            raise OptionError(f"cannot read option {text!r}", "Give each parameter as name=value")
        return cls(
            match["name"],
            tuple(sorted((key.strip(), _value(raw.strip())) for key, _, raw in pairs)),
            match["site"] or "",
        )


def _value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_options(text: str) -> tuple[Option, ...]:
    """``"a,b{x=1,y=2}"`` split at the commas outside braces."""
    parts = re.findall(r"[^,{]+(?:\{[^}]*\}[^,]*)?", text)
    return tuple(Option.parse(part) for part in parts if part.strip())


@dataclass(frozen=True)
class Plan:
    """What is done at each site, in the order in which passes are applied there. Sites not named stay as they are."""

    choices: Mapping[str, tuple[Option, ...]] = field(default_factory=dict)

    def at(self, site: str) -> tuple[Option, ...]:
        """The options at one site."""
        return self.choices.get(site, ())

    @property
    def options(self) -> tuple[Option, ...]:
        """All options, sites in their order."""
        return tuple(option for options in self.choices.values() for option in options)

    @property
    def empty(self) -> bool:
        """Whether nothing is changed."""
        return not self.options

    def __str__(self) -> str:
        return "\n".join(map(str, self.options))

    def __hash__(self) -> int:
        return hash(self.options)

    @classmethod
    def of(cls, options: Iterable[Option]) -> Plan:
        """Group options by their site, keeping order."""
        choices: dict[str, tuple[Option, ...]] = {}
        for option in options:
            choices[option.site] = (*choices.get(option.site, ()), option)
        return cls(choices)

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The inverse of `str`."""
        return cls.of(Option.parse(line) for line in text.splitlines() if line.strip())

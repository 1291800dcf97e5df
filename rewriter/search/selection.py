"""Which passes take part: all of them, or those named by ``--passes``, with parameters fixed where given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rewriter.core.errors import OptionError
from rewriter.core.option import Option, parse_options
from rewriter.core.passes_registry import discover
from rewriter.core.rewrite import Pass
from rewriter.core.site import Site
from rewriter.core.target import Target

_ON_REQUEST = frozenset({"precision"})  # number formats are what --precision asks for, or --passes by name


@dataclass(frozen=True)
class Selection:
    """The passes of one run by name, in order of application, and the parameters that are fixed."""

    passes: Mapping[str, Pass]
    fixed: Mapping[str, Option]

    def options(self, one: Pass, site: Site, target: Target) -> tuple[Option, ...]:
        """What the pass offers at this site, less what contradicts a fixed parameter."""
        wanted = dict(self.fixed[one.name].parameters) if one.name in self.fixed else {}
        offered = one.options(site, target)
        return tuple(o for o in offered if all(dict(o.parameters).get(key) == value for key, value in wanted.items()))


def select_passes(text: str | None) -> Selection:
    """From ``a,b{x=1}``; None means all. Raises `OptionError` that lists the passes there are."""
    known = discover()
    if text is None:
        return Selection({name: one for name, one in known.items() if name not in _ON_REQUEST}, {})
    asked = {option.name: option for option in parse_options(text)}
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise OptionError(
            f"there is no pass named {unknown[0]!r}" if unknown else f"--passes {text!r} names no pass",
            f"Choose from {', '.join(sorted(known))}",
        )
    return Selection({name: one for name, one in known.items() if name in asked}, asked)

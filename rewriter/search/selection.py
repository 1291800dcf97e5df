"""Which passes take part: all of them, or those named by ``--passes``, with parameters fixed where given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rewriter.core.errors import OptionError
from rewriter.core.option import Option, parse_options
from rewriter.core.options import Precision
from rewriter.core.passes_registry import discover
from rewriter.core.rewrite import Pass
from rewriter.core.site import Site
from rewriter.core.target import Target

PRECISION = "precision"  # the pass whose options ``--precision`` decides


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


def select_passes(text: str | None, precision: Precision, target: Target, cache_change: bool = False) -> Selection:
    """From ``a,b{x=1}`` (None means all) and the number format that may be used.

    ``any`` is the narrowest format that the target multiplies. With `cache_change` passes may change the sizes of
    caches in the model's signature. Raises `OptionError` that lists the passes there are, or when the target lacks the
    format asked for.
    """
    known = {name: one.permitted() if cache_change else one for name, one in discover().items()}
    dtype = precision if precision != "any" else next((d for d in ("int8", "bf16") if target.multiplies(d)), "fp32")
    if not target.multiplies(dtype):
        raise OptionError(
            f"{target.name} has no instructions for --precision {dtype}",
            "Use --precision fp32 or any, or another target",
        )
    if dtype == "fp32":
        known.pop(PRECISION, None)
    formats = {PRECISION: Option.of(PRECISION, dtype=dtype)}
    if text is None:
        return Selection(known, formats)
    asked = {option.name: option for option in parse_options(text)}
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise OptionError(
            f"there is no pass named {unknown[0]!r}" if unknown else f"--passes {text!r} names no pass",
            f"Choose from {', '.join(sorted(known))}",
        )
    taking_part = {name: one for name, one in known.items() if name in asked}
    return Selection(taking_part, formats | {name: option for name, option in asked.items() if option.parameters})

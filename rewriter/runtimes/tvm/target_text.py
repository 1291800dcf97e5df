"""Reading what a user wrote for ``--target``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from rewriter.core.errors import OptionError

LOCAL_KINDS = ("cpu", "llvm", "native")
_KNOWN = ("mcpu", "mattr", "mtriple", "arch", "num-cores")


@dataclass(frozen=True)
class TargetText:
    """A target as it was written: its kind and options."""

    text: str
    kind: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> TargetText:
        """``cpu``, ``llvm -mcpu=NAME``, ``cuda -arch=sm_90`` or the JSON of a TVM target. Raises `OptionError`."""
        if text.lstrip().startswith("{"):
            return cls._of_json(text)
        words = text.split()
        if not words:
            raise OptionError("the target is empty", "Use --target cpu")
        options = {}
        for word in words[1:]:
            key, equals, value = word.lstrip("-").partition("=")
            if not word.startswith("-") or not equals:
                raise OptionError(f"cannot read {word!r} in target {text!r}", "Write it like llvm -mcpu=x86-64-v3")
            options[key] = value
        return cls(text, words[0], options)._checked()

    @classmethod
    def _of_json(cls, text: str) -> TargetText:
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            hint = 'Write it like {"kind": "llvm"}'
            raise OptionError(f"target {text!r} is not valid JSON: {error}", hint) from error
        options = {key: ",".join(value) if isinstance(value, list) else str(value) for key, value in found.items()}
        return cls(text, options.pop("kind", "llvm"), options)._checked()

    def _checked(self) -> TargetText:
        for key in self.options:
            if key not in _KNOWN:
                raise OptionError(
                    f"target {self.text!r} has an unknown option {key!r}", f"Known are {', '.join(_KNOWN)}"
                )
        return self

    @property
    def attributes(self) -> tuple[str, ...]:
        """LLVM attributes, each with its sign."""
        return tuple(part for part in self.options.get("mattr", "").split(",") if part)

"""Why something was left alone. A value that travels to the report, never an exception."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """`code` is stable and machine-readable (``kebab-case``), `why` is one sentence, `nodes` say where."""

    code: str
    why: str
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.code}: {self.why}"


class Refused(Exception):
    """Carries a `Refusal` out of deep recognition code to the one place that records it."""

    def __init__(self, code: str, why: str, nodes: tuple[str, ...] = ()) -> None:
        self.refusal = Refusal(code, why, nodes)
        super().__init__(str(self.refusal))

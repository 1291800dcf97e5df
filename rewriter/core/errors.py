"""Errors a user can act on, and the exit codes they turn into.

An error says what is wrong, where, and what to do. Anything else that escapes is a bug and exits with `INTERNAL`.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the command line returns; documented in docs/command-line.md."""

    DONE = 0
    INTERNAL = 1
    BAD_INPUT = 2
    ANSWER_IS_NO = 3  # with --fail-if-not-faster: the original was kept; verify: the results differ
    INTERRUPTED = 130


class UserError(Exception):
    """Bad input: one sentence for what and where, one for what to do.

    `what` names the thing and the problem, `hint` says what to do next.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, what: str, hint: str = "") -> None:
        self.what = what.rstrip(".")
        self.hint = hint.rstrip(".")
        super().__init__(f"{self.what}. {self.hint}." if self.hint else f"{self.what}.")

    def __reduce__(self) -> tuple[object, ...]:
        # Subclasses have constructors of their own, which pickling would call with the finished message.
        return _restored, (type(self), self.args), self.__dict__


class ModelError(UserError):
    """The model file cannot be used: missing, truncated, not ONNX, or malformed."""


class DataError(UserError):
    """The data does not fit the model or is not sound: names, dtypes, shapes, NaN, too few samples."""


class OptionError(UserError):
    """An unknown or contradictory option: target, metric, pass, shape."""


class DeviceError(UserError):
    """A device that is not here cannot be had, or vanished and did not come back."""


class CrashError(UserError):
    """What was built ends, every time, the process that runs it."""


class OutputError(UserError):
    """The result cannot be written: folder in use by something else, no room on disk."""


class UnsupportedOperator(UserError):
    """An engine does not know an operator. The message names it, its domain and opset, and the node."""

    def __init__(self, engine: str, operator: str, node: str, detail: str = "") -> None:
        self.engine, self.operator, self.node = engine, operator, node
        super().__init__(
            f"{engine} cannot run operator {operator} (node {node!r}){': ' + detail if detail else ''}",
            "Report the operator, or use --runtime onnxruntime to time variants without this engine",
        )


def _restored(kind: type[UserError], arguments: tuple[object, ...]) -> UserError:
    error = kind.__new__(kind)
    error.args = arguments
    return error

"""What probes of odd graphs make numpy and torch raise becomes a refusal; our own mistakes come out where asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from rewriter.core.errors import UserError
from rewriter.core.refusal import Refused

_ODD = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AssertionError)
_OPEN: ContextVar[bool] = ContextVar("open", default=False)


@contextlib.contextmanager
def named(node: str) -> Iterator[None]:
    """Errors within become the refusal ``probe-failed`` of a node; refusals pass."""
    try:
        yield
    except Refused:
        raise
    except UserError as problem:
        raise _refused(problem, node) from problem
    except _ODD as problem:
        if _OPEN.get():
            raise
        raise _refused(problem, node) from problem


@contextlib.contextmanager
def in_the_open() -> Iterator[None]:
    """Within, errors that no check foresaw are raised as they are: for tests on graphs that are not odd."""
    token = _OPEN.set(True)
    try:
        yield
    finally:
        _OPEN.reset(token)


def _refused(problem: Exception, node: str) -> Refused:
    return Refused("probe-failed", f"it could not be probed ({type(problem).__name__}: {problem})", (node,))

"""Remembering what was derived from objects that compare by identity, for as long as they live."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class IdentityMemo(Generic[Result]):
    """A memo keyed by the identity of weakly held objects: an entry dies with the first of its keys.

    Sites and statistics hold arrays, so they can be neither hashed nor compared; passes use this to share one
    expensive sweep between all levels of one site.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], Result] = {}

    def get(self, keys: tuple[Any, ...], compute: Callable[[], Result]) -> Result:
        """The remembered result for these very objects, computed on first use."""
        identity = tuple(id(key) for key in keys)
        if identity not in self._entries:
            self._entries[identity] = compute()
            for key in keys:
                weakref.finalize(key, self._entries.pop, identity, None)
        return self._entries[identity]

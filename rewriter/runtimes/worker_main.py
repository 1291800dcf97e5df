"""The child's side of `rewriter.runtimes.workers`: receive a call, run it, answer, sleep.

Nothing heavier than the standard library is imported before the first call asks for it, so that thread counts and core
sets are in place when a numerical library loads.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

_registry: dict[str, Any] = {}


def store(key: str, value: Any) -> None:
    """Keep an object in this process between calls."""
    _registry[key] = value


def fetch(key: str) -> Any:
    """What `store` kept; KeyError when this process has never stored it (it may have been restarted since)."""
    if key not in _registry:
        raise KeyError(f"{key!r} is not stored in this worker; it may have been restarted since")
    return _registry[key]


def discard(key: str) -> None:
    """Forget a stored object; unknown keys are fine."""
    _registry.pop(key, None)


@dataclass(frozen=True)
class Answer:
    """What goes back: `kind` is ``value``, ``user`` (a UserError to raise anew), ``memory`` or ``error``."""

    kind: str
    value: Any = None
    detail: str = ""
    traceback: str = ""


def main(settings: dict[str, Any]) -> None:
    """Serve calls on the inherited socket until the parent goes away."""
    _prepare(settings)
    connection = Connection(int(settings["socket"]))
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, requests), daemon=True, name="parent").start()
    connection.send_bytes(b"ready")
    while True:
        answer = _answer(requests.get())
        try:
            payload = ForkingPickler.dumps(answer)
        except Exception as error:  # noqa: BLE001 - whatever pickling raises, the parent is told
            payload = ForkingPickler.dumps(_failed("error", error))
        connection.send_bytes(payload)


def _prepare(settings: dict[str, Any]) -> None:
    # Ctrl-C belongs to the parent, which ends or keeps its workers as it sees fit.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    # Asked for before a child that gives no answer is ended: where it hangs is worth knowing.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if settings["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, settings["cores"])
    if settings["dies_with_parent"]:
        _die_with(settings["parent"])
    if settings["memory_limit_bytes"]:
        _limit_memory(int(settings["memory_limit_bytes"]))


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process with the parent's main thread, also while native code holds the interpreter."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _limit_memory(limit_bytes: int) -> None:
    """Bound private writable memory, not address space, which runtimes reserve without using it."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    # A system that cannot limit data still has the parent's watch over resident memory.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _listen(connection: Connection, requests: queue.SimpleQueue[bytes]) -> None:
    """Hand requests over; the end of the stream means that the parent is gone, whatever the main thread is doing."""
    while True:
        try:
            requests.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def _answer(request: bytes) -> Answer:
    from rewriter.core.errors import UserError

    try:
        spec, arguments, keywords = ForkingPickler.loads(request)
        module, _, attribute = spec.partition(":")
        function = import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
        return Answer("value", function(*arguments, **keywords))  # type: ignore[operator]
    except UserError as error:
        return Answer("user", error, traceback=traceback.format_exc())
    except MemoryError as error:
        return _failed("memory", error)
    except Exception as error:  # noqa: BLE001 - a fault of the function is an answer, with its traceback
        return _failed("error", error)


def _failed(kind: str, error: Exception) -> Answer:
    return Answer(kind, None, f"{type(error).__name__}: {error}", traceback.format_exc())

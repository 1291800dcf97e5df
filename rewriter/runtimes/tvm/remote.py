"""TVM on another machine: built here, uploaded, run and timed there through TVM's RPC tracker and server.

RPC is remote execution without any authentication: use it on loopback or through a tunnel.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, rpc

from rewriter.core.errors import CrashError, DeviceError
from rewriter.core.options import parse_address
from rewriter.core.target import Target
from rewriter.graph.onnx import OnnxGraph
from rewriter.runtimes.tvm.artifact import CODE, WEIGHTS, read_manifest
from rewriter.runtimes.tvm.buckets import Fit
from rewriter.runtimes.tvm.load import TvmExecutable, read_weights
from rewriter.runtimes.tvm.runtime import TvmRuntime

REMOTE = "remote.json"
REQUEST_S = 20.0  # how long the tracker may take to lend the device
CHECK_S = 5.0
RETURN_S = 60.0  # how long a device that vanished may take to come back
ATTEMPTS = 3  # a run that ends the server every time is no accident
_PAUSE_S = 0.5
_KNOCK_S = 5.0
_logger = logging.getLogger("rewriter")
_Value = TypeVar("_Value")
_uploads = itertools.count()


class TvmRemote(TvmRuntime):
    """Builds like `TvmRuntime`; what it loads runs on the device that the target's tracker lends."""

    name = "tvm-rpc"

    def build_buckets(
        self,
        graph: OnnxGraph,
        shapes: Sequence[Mapping[str, tuple[int, ...]]],
        folder: Path,
        target: Target,
        pad: Mapping[str, float] | None = None,
    ) -> Path:
        """An artifact with the address of the device beside it."""
        built = super().build_buckets(graph, shapes, folder, target, pad)
        (built / REMOTE).write_text(json.dumps({"remote": target.remote}) + "\n")
        return built

    def load(self, artifact: Path, threads: int) -> RemoteExecutable:
        """Upload an artifact. `threads` is what it was built for; the server's own TVM_NUM_THREADS must agree."""
        manifest = read_manifest(artifact, here=False)
        return RemoteExecutable(artifact, manifest, connect(json.loads((artifact / REMOTE).read_text())["remote"]))


class Device:
    """A device behind a tracker, by ``HOST:PORT/KEY``."""

    def __init__(self, remote: str) -> None:
        self.address, _, self.key = remote.partition("/")

    def request(self, patience_s: float = REQUEST_S) -> Any:
        """A session on the device; raises `DeviceError` when none is lent in time."""
        end_s, host_port = time.monotonic() + patience_s, parse_address(self.address)
        while True:
            try:
                # TVM itself would knock for a minute where nobody listens.
                socket.create_connection(host_port, _KNOCK_S).close()
                tracker = rpc.connect_tracker(*host_port)
                known, free = _servers(tracker.summary(), self.key)
                # The tracker makes whoever asks for a device that is not free wait without end.
                if free:
                    left_s = max(1.0, end_s - time.monotonic())
                    return tracker.request(self.key, priority=1, session_timeout=0, max_retry=int(left_s))
                state = (
                    f"has no free device {self.key!r}: it is in use, or its server has died"
                    if known
                    else (f"knows no device {self.key!r}")
                )
                problem = f"the tracker at {self.address} {state}"
            except (RuntimeError, OSError, ValueError, tvm.error.InternalError) as error:
                problem = f"no device {self.key!r} from the tracker at {self.address}: {_first_line(error)}"
            if time.monotonic() >= end_s:
                hint = "Start the tracker and the server (python -m tvm.exec.rpc_tracker, rpc_server --tracker)"
                raise DeviceError(problem, f"{hint}; finished measurements are kept")
            time.sleep(_PAUSE_S)


def _servers(summary: Mapping[str, Any], key: str) -> tuple[bool, bool]:
    """Whether the tracker knows servers of this key, and whether one of them is free."""
    known = any(server.get("key") == f"server:{key}" for server in summary.get("server_info", ()))
    return known, known and summary.get("queue_info", {}).get(key, {}).get("free", 0) > 0


class Connection:
    """A session on a device, shared by the executables of a process: a server lends itself to one at a time."""

    def __init__(self, device: Device) -> None:
        self.device, self.generation = device, 0
        self._session = device.request()

    @property
    def session(self) -> Any:
        """The session in use; after a loss the device is asked for again, and `DeviceError` raised if it stays away."""
        if self._session is None:
            self._session = self.device.request(RETURN_S)
            self.generation += 1
        return self._session

    def lose(self) -> None:
        """Give up the present session, which broke."""
        self._session = None


_connections: WeakValueDictionary[str, Connection] = WeakValueDictionary()


def connect(remote: str) -> Connection:
    """The process's connection to a device; it ends with its last executable."""
    found = _connections.get(remote)
    if found is None:
        found = _connections[remote] = Connection(Device(remote))
    return found


def check(remote: str) -> str:
    """In a worker: whether the device can be had, before anything is built for it. Raises `DeviceError`."""
    Device(remote).request(CHECK_S)
    return remote


class RemoteExecutable(TvmExecutable):
    """An uploaded artifact. A device that vanishes is asked for again and the run repeated: see `reconnections`."""

    def __init__(self, folder: Path, manifest: dict[str, Any], connection: Connection) -> None:
        self._connection, self._generation = connection, -1
        self.reconnections = 0
        super().__init__(folder, manifest)

    def _open(self) -> None:
        """Nothing yet: code and weights are sent with the first run, and again after each loss of the device."""

    def _send(self) -> None:
        """Make sure that the device of the present session has code and weights."""
        session, generation = self._connection.session, self._connection.generation
        if self._generation == generation:
            return
        # Never the name of a file that the server has loaded: overwriting mapped code ends the server.
        name = f"model-{os.getpid()}-{next(_uploads)}.so"
        session.upload(str(self.folder / CODE), name)
        self._cpu = session.cpu(0)
        self._machine = relax.VirtualMachine(session.load_module(name), self._cpu)
        weights = read_weights(self.folder / WEIGHTS)
        self._weights = {key: self._put(tensor.numpy()) for key, tensor in weights.items()}
        self._generation = generation

    def _put(self, array: NDArray[Any]) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self._cpu)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name, computed on the device."""
        arrays = self._checked(feeds)
        fit = self._sizes.fit(arrays)
        function = fit.bucket["function"]

        def once() -> list[NDArray[Any]]:
            self._set(fit.bucket, self._inputs(arrays, fit))
            self._machine.invoke_stateful(function)
            found = self._machine.get_outputs(function)
            return [np.array(part.numpy()) for part in (found if isinstance(found, (tuple, list)) else (found,))]

        named = zip(self.output_names, self._persistently(once), fit.crops, strict=True)
        return {name: output if crop is None else output[crop] for name, output, crop in named}

    def bind(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        """One run on the device as often as it is called."""
        timed = self.bind_clock(feeds)

        def once() -> None:
            timed()

        return once

    def bind_clock(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """One run as often as it is called, which returns its seconds by the device's own clock."""
        arrays = self._checked(feeds)
        fit = self._sizes.fit(arrays)
        bucket = fit.bucket
        held: dict[int, list[Any]] = {}

        def once() -> float:
            # Inputs live on the device until the session they were sent in ends.
            if self._generation not in held:
                held.clear()
                held[self._generation] = self._inputs(arrays, fit)
            self._set(bucket, held[self._generation])
            clock = self._machine.time_evaluator("invoke_stateful", self._cpu, number=1, repeat=1)
            return float(clock(bucket["function"]).results[0])

        return lambda: self._persistently(once)

    def _inputs(self, arrays: Mapping[str, NDArray[Any]], fit: Fit) -> list[Any]:
        return [self._put(self._sizes.padded(name, arrays[name], fit)) for name in self._order]

    def _set(self, bucket: Mapping[str, Any], inputs: list[Any]) -> None:
        self._machine.set_input(bucket["function"], *inputs, *self._parameters(bucket))

    def _persistently(self, action: Callable[[], _Value]) -> _Value:
        """The result of an action on the device, repeated on a new session when the old one broke.

        Raises `DeviceError` when the device does not come back, `CrashError` when it does and the run fails each time.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._send()
                return action()
            except (RuntimeError, OSError, tvm.error.InternalError) as error:
                problem = _first_line(error)
                _logger.info("device %s: attempt %d failed: %s", self._connection.device.key, attempt, problem)
                self._connection.lose()
                self.reconnections += 1
        hint = "Check that it has the target's instruction set and enough memory; finished measurements are kept"
        key, name = self._connection.device.key, self.folder
        raise CrashError(f"{name} failed {ATTEMPTS} times in a row on device {key!r}: {problem}", hint)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__

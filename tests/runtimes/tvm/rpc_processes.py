"""A tracker and servers as processes of their own, on loopback, as a user would start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEY = "board"
_START_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Devices:
    """One tracker, and a server that can be ended and started again."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.port, self.started = logs, free_port(), 0
        self.server: subprocess.Popen[bytes] | None = None
        self.tracker = self._start("rpc_tracker", "--port", str(self.port), "--port-end", str(self.port + 1))
        self._await("rpc_tracker", "bind to")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def serve(self) -> None:
        self.started += 1
        port = free_port()
        where = ["--port", str(port), "--port-end", str(port + 1)]
        self.server = self._start("rpc_server", "--tracker", self.address, "--key", KEY, *where)
        self._await(f"rpc_server-{self.started}", "bind to")

    def lose(self) -> None:
        """End the server as a power cut would, with the process that serves the session."""
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
            self.server = None

    @contextmanager
    def kept_up(self) -> Iterator[None]:
        """While this lasts, a server that cannot serve any more is started again, as a supervisor on a board does.

        The process lives on when what it runs crashes; the thread that listens has ended.
        """
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.1):
                if "exited unsuccessfully" in (self.logs / f"rpc_server-{self.started}.log").read_text():
                    self.lose()
                    self.serve()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def close(self) -> None:
        self.lose()
        os.killpg(self.tracker.pid, signal.SIGKILL)
        self.tracker.wait()

    def _start(self, module: str, *words: str) -> subprocess.Popen[bytes]:
        name = module if module == "rpc_tracker" else f"{module}-{self.started}"
        with (self.logs / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", f"tvm.exec.{module}", "--host", "127.0.0.1", *words]
            environment = os.environ | {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _await(self, name: str, word: str) -> None:
        end_s = time.monotonic() + _START_S
        while word not in (self.logs / f"{name}.log").read_text():
            assert time.monotonic() < end_s, (self.logs / f"{name}.log").read_text()
            time.sleep(0.1)


@contextmanager
def devices(logs: Path) -> Iterator[Devices]:
    made = Devices(logs)
    try:
        yield made
    finally:
        made.close()

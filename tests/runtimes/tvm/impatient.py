"""The remote runtime for tests of a device that stays away: nobody waits a minute for it."""

from __future__ import annotations

from rewriter.runtimes.tvm import remote


class Impatient(remote.TvmRemote):
    """As its base, in a process of its own."""

    def __init__(self) -> None:
        super().__init__()
        remote.RETURN_S = 0.5

"""What several tests of runtimes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtimes import amx_emulator


@pytest.fixture(scope="session")
def amx(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The emulator of AMX for this session; None where the processor runs tile instructions itself."""
    if amx_emulator.native():
        return None
    return amx_emulator.shared_library("emulator", tmp_path_factory.mktemp("amx"))

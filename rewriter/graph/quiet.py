"""Keeping a library from talking over us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_onnx_ir() -> Iterator[None]:
    """Mute `onnx_ir`'s warnings: what matters in them is checked and reported by us, with a sentence."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

"""The emulator against what the assembler writes: every instruction, every form of address, every fault."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rewriter.runtimes.workers import Worker, WorkerFailure
from tests.runtimes import amx_emulator

JOBS = "tests.runtimes.amx_emulator.jobs"
ROW = 64
SHAPES = [(16, 16, 16), (1, 1, 1), (5, 16, 3), (16, 7, 16), (3, 2, 11)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-mamx-tile", "-mamx-int8", "-mamx-bf16")
    return amx_emulator.shared_library("instructions", tmp_path_factory.mktemp("instructions"), *flags)


@pytest.fixture(scope="module")
def child(amx: Path | None) -> Iterator[Worker]:
    with amx_emulator.worker(amx) as made:
        yield made


def config(*tiles: tuple[int, int]) -> np.ndarray:
    """The 64 bytes for (rows, bytes of a row) of tiles 0, 1, ..."""
    found = np.zeros(64, np.uint8)
    found[0] = 1
    for tile, (rows, count) in enumerate(tiles):
        found[48 + tile] = rows
        found[16 + 2 * tile] = count
    return found


def call(child: Worker, library: Path, name: str, *arguments: object, **keywords: object) -> list[np.ndarray]:
    found = child.call(f"{JOBS}:instruction", library, name, *arguments, **keywords)
    assert not isinstance(found, WorkerFailure), found
    return list(found)


def rows_of(array: np.ndarray, stride: int = 80) -> np.ndarray:
    """Bytes of a matrix, its rows `stride` apart in a sea of 0xAA."""
    flat = np.full((16, stride), 0xAA, np.uint8)
    flat[: len(array), : array[0].nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)
    return flat


def product(child: Worker, library: Path, name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a b by one instruction, where a has words of k in its rows and b words of k by columns."""
    tiles = [(0, 0)] * 6
    tiles[1], tiles[2], tiles[5] = ((len(x), x[0].nbytes) for x in (a, b, c))
    *_, sums = call(child, library, name, config(*tiles), rows_of(a), rows_of(b), rows_of(c), 80)
    untouched = rows_of(c)
    untouched[: len(c), : c[0].nbytes] = sums[: len(c), : c[0].nbytes]
    np.testing.assert_array_equal(sums, untouched)
    return sums[: len(c), : c[0].nbytes].copy().view(c.dtype)


@pytest.mark.parametrize(("rows", "words", "columns"), SHAPES)
@pytest.mark.parametrize("signs", ["ss", "su", "us", "uu"])
def test_bytes_multiply_exactly(child: Worker, library: Path, signs: str, rows: int, words: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    kinds = [np.int8 if sign == "s" else np.uint8 for sign in signs]
    a = rng.integers(0, 256, (rows, words * 4)).astype(np.uint8).view(kinds[0])
    b = rng.integers(0, 256, (words, columns, 4)).astype(np.uint8).view(kinds[1])
    c = rng.integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)
    got = product(child, library, f"tdpb{signs}d", a, b, c)
    wanted = c + a.astype(np.int64) @ b.transpose(0, 2, 1).reshape(-1, columns).astype(np.int64)
    np.testing.assert_array_equal(got, wanted.astype(np.int32))  # wraps around


@pytest.mark.parametrize(("rows", "words", "columns"), SHAPES)
def test_bfloat16_multiplies(child: Worker, library: Path, rows: int, words: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    a, b = ((rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            for shape in ((rows, words * 2), (words, columns, 2)))  # fmt: skip
    c = rng.standard_normal((rows, columns)).astype(np.float32)
    got = product(child, library, "tdpbf16ps", a, b, c)
    left, right = ((x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in (a, b))
    wanted = c + left @ right.transpose(0, 2, 1).reshape(-1, columns)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_tiny_products_are_zero_and_the_order_of_sums_is_kept(child: Worker, library: Path) -> None:
    """Denormals are flushed; even and odd k are summed apart: 2^24 + 1 loses the 1, 1 + (2^24 + 1 - 2^24) keeps it."""
    as_bits = np.array([2.0**-70, 2.0**24, 1.0, -(2.0**24), 0.0], np.float32).view(np.uint32) >> 16
    tiny, large, one, less, none = as_bits.astype(np.uint16)
    a = np.array([[tiny, none, none, none], [large, one, less, none]], np.uint16)
    b = np.array([[[tiny, one]], [[one, one]]], np.uint16)
    b[0, 0] = [tiny, one]
    c = np.zeros((2, 1), np.float32)
    got = product(child, library, "tdpbf16ps", a, b, c)
    assert got[0, 0] == 0.0
    ones = np.array([[[one, one]], [[one, one]]], np.uint16)
    assert product(child, library, "tdpbf16ps", a, ones, c)[1, 0] == 1.0


def test_all_forms_of_address(child: Worker, library: Path) -> None:
    source = np.random.default_rng(0).integers(0, 256, 8192).astype(np.uint8)
    _, found = call(child, library, "copies", source, np.zeros(8192, np.uint8))
    assert (found[:3072] == source[:3072]).all() and not found[4096:].any()
    np.testing.assert_array_equal(found[3072:4096], source[1024:2048])


def test_without_an_index_rows_repeat(child: Worker, library: Path) -> None:
    tiles = config(*[(0, 0)] * 7, (4, 12))
    source = np.arange(64, dtype=np.uint8)
    *_, found = call(child, library, "repeats", tiles, source, np.zeros(96, np.uint8), 24)
    wanted = np.zeros((4, 24), np.uint8)
    wanted[:, :12] = source[:12]
    np.testing.assert_array_equal(found.reshape(4, 24), wanted)


def test_a_configuration_can_be_read_back(child: Worker, library: Path) -> None:
    wanted = config((16, 64), (3, 8))
    _, found = call(child, library, "stored_config", wanted, np.full(128, 7, np.uint8))
    np.testing.assert_array_equal(found, np.r_[wanted, np.zeros(64, np.uint8)])


def ill(at: int, value: int) -> np.ndarray:
    found = config((16, 64))
    found[at] = value
    return found


FAULTS = [
    ("unconfigured", [], "not configured"),
    ("same_tile_twice", [], "three different tiles"),
    ("unknown", [], "does not know"),
    ("configured_by", [ill(0, 2)], "no such palette"),
    ("configured_by", [ill(8, 1)], "reserved bytes"),
    ("configured_by", [ill(48, 17)], "too large"),
    ("configured_by", [ill(48, 0)], "rows without bytes"),
    ("dot_only", [config((4, 16), (5, 16), (4, 16))], "another shape"),
    ("dot_only", [config((4, 16), (4, 16), (5, 16))], "rows of B"),
    ("dot_only", [config((4, 6), (4, 16), (4, 6))], "whole words"),
    ("dot_only", [config((4, 16), (4, 16))], "not configured"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "message"), FAULTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_a_processor_refuses_ends_the_process(
    amx: Path | None, library: Path, name: str, arguments: list[np.ndarray], message: str
) -> None:
    with amx_emulator.worker(amx) as child:
        found = child.call(f"{JOBS}:instruction", library, name, *arguments)
    assert isinstance(found, WorkerFailure) and found.kind == "crash"
    if amx is not None:
        assert found.exit_code == -signal.SIGILL and message in found.output


def test_permission_must_have_been_asked(amx: Path | None, library: Path) -> None:
    with amx_emulator.worker(amx, ask=False) as child:
        found = child.call(f"{JOBS}:instruction", library, "configured_by", config((16, 64)), permission=False)
        assert amx is None or (isinstance(found, WorkerFailure) and "permission was not asked" in found.output)
    with amx_emulator.worker(amx) as child:
        call(child, library, "configured_by", config((16, 64)))

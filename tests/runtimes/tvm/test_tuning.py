"""The database survives kills and company; tuning chooses, records, and never asks twice."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from rewriter.core.errors import OutputError
from rewriter.runtimes.tvm import tuning
from rewriter.runtimes.tvm.database import Subject, TuningDatabase
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Tile
from rewriter.runtimes.tvm.tiles import Tiles, default_gemm
from tests.runtimes.tvm.database_writer import write_many
from tests.runtimes.tvm.harness import target

SUBJECT = Subject.of("gemm::0", (4, 32, 8), target())


def test_a_record_is_found_by_another_reader(tmp_path: Path) -> None:
    writer, reader = TuningDatabase(tmp_path / "t.jsonl"), TuningDatabase(tmp_path / "t.jsonl")
    assert reader.find(SUBJECT) is None
    writer.add(SUBJECT, {"seconds": 1.0})
    writer.add(SUBJECT, {"seconds": 2.0})
    assert reader.find(SUBJECT) == {"seconds": 2.0}
    assert reader.find(Subject.of("gemm::0", (4, 32, 9), target())) is None
    assert reader.find(Subject.of("gemm::0", (4, 32, 8), target(2))) is None


@pytest.mark.parametrize("torn", [b'{"kernel": "gemm::0", "sha', b"\xff\x00\n", b"[1, 2]\n", b'{"kernel": 3}'])
def test_torn_lines_cost_only_themselves(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "t.jsonl"
    TuningDatabase(path).add(SUBJECT, {"seconds": 1.0})
    with path.open("ab") as file:
        file.write(torn)
    other = Subject.of("gemm::1", (1, 1, 1), target())
    TuningDatabase(path).add(other, {"seconds": 3.0})
    database = TuningDatabase(path)
    assert database.find(SUBJECT) == {"seconds": 1.0} and database.find(other) == {"seconds": 3.0}


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path, context = tmp_path / "t.jsonl", multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(path, name)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    database = TuningDatabase(path)
    for name in ("a", "b"):
        for size in range(50):
            found = database.find(Subject(name, (size,), "float32", "t", "v"))
            assert found is not None and found["seconds"] == size


def test_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        TuningDatabase(tmp_path / "file" / "t.jsonl").add(SUBJECT, {})


def test_tuning_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MEASURE_S", 0.02)
    spec, database = Gemm((4,), 40, 16, bias=True, activation="relu"), TuningDatabase(tmp_path / "t.jsonl")
    default = default_gemm(spec, target())
    tile = tuning.GemmTuner(target(), database).tile(spec, default)
    assert tile in tuning.candidates(spec, target(), default)

    def refuse(*_: object) -> list[tuning.Timing]:
        raise AssertionError("measured again")

    monkeypatch.setattr(tuning, "measure_tiles", refuse)
    assert tuning.GemmTuner(target(), TuningDatabase(tmp_path / "t.jsonl")).tile(spec, default) == tile
    unknown = Gemm((4,), 41, 16)
    assert tuning.GemmTuner(target(), database, measure=False).tile(unknown, default) == default


@pytest.mark.parametrize(("seconds", "chosen"), [((1.0, 0.5), 1), ((1.0, 0.995), 0), ((1.0, 2.0), 0)])
def test_a_tie_keeps_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], chosen: int
) -> None:
    tiles = [Tile(8, 3), Tile(12, 2)]
    timings = [tuning.Timing(tile, value) for tile, value in zip(tiles, seconds, strict=True)]
    monkeypatch.setattr(tuning, "measure_tiles", lambda *_: timings)
    found = tuning.GemmTuner(target(), TuningDatabase(tmp_path / "t.jsonl")).tile(Gemm((24,), 96, 8), tiles[0])
    assert found == tiles[chosen]


def test_the_model_prefers_tiles_that_waste_less() -> None:
    spec = Gemm((24,), 96, 64)
    assert tuning.predicted(spec, Tile(12, 2)) < tuning.predicted(spec, Tile(1, 4))
    uneven = Gemm((24,), 100, 64)
    assert tuning.predicted(uneven, Tile(12, 2)) < tuning.predicted(uneven, Tile(8, 3))
    found = tuning.candidates(spec, target(), Tile(8, 3))
    assert found[0] == Tile(8, 3) and len(found) <= tuning.MOST
    costs = [tuning.predicted(spec, tile) for tile in found[1:]]
    assert costs == sorted(costs)


def test_hopeless_candidates_are_dropped_but_never_the_default() -> None:
    class Fake:
        def __init__(self, tile: Tile) -> None:
            self.tile = tile

    default, good, bad = (Fake(Tile(rows, 2)) for rows in (8, 12, 6))
    samples = {default.tile: [2.0] * 3, good.tile: [1.0] * 3, bad.tile: [1.3, 1.4, 1.3]}
    few = {tile: values[:2] for tile, values in samples.items()}
    assert tuning.contenders([default, good, bad], few) == [default, good, bad]
    assert tuning.contenders([default, good, bad], samples) == [default, good]


def test_buckets_agree_on_the_panel_width() -> None:
    tiles = Tiles(target(), lambda spec, _: Tile(12, 2) if spec.M > 50 else Tile(6, 4))
    assert tiles.gemm(Gemm((64,), 96, 8)).vectors == tiles.gemm(Gemm((8,), 96, 8)).vectors == 2


@pytest.mark.parametrize("rows", [1, 7, 128, 1000, 1001, 1024, 4096])
def test_default_blocks_divide_the_rows(rows: int) -> None:
    for columns, depth in ((384, 1536), (1536, 384), (37, 19)):
        tile = default_gemm(Gemm((rows,), columns, depth), target())
        assert tile.rows * tile.vectors <= 24 and 1 <= tile.rows <= rows
        assert tile.block == 0 or (rows % tile.block == 0 and tile.block % tile.rows == 0)

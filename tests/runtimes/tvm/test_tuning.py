"""Tuning chooses, records, never asks twice, and survives whatever a candidate does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rewriter.core.errors import UnsupportedOperator
from rewriter.runtimes.tvm import gemm_space, tuning
from rewriter.runtimes.tvm.database import TuningDatabase
from rewriter.runtimes.tvm.gemm_space import GemmSpace
from rewriter.runtimes.tvm.kernels.attention import Attention, Bias, Operand
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Precision, Tile
from rewriter.runtimes.tvm.space import text_of
from rewriter.runtimes.tvm.tiles import Tiles, default_gemm
from rewriter.runtimes.tvm.tuned_tiles import FlashSpace, tuned_tiles
from rewriter.runtimes.tvm.tuning import Tuner, contenders, shortlist
from tests.runtimes.tvm.harness import target
from tests.runtimes.tvm.spaces import Act, ActSpace

SLOW, FAST = Act(seconds=0.004), Act("quick", 0.001)


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "MEASURE_S", 0.03)
    yield


def tuner(folder: Path, **options: float) -> Tuner:
    return Tuner(target(), TuningDatabase(folder / "t.jsonl"), **options)  # type: ignore[arg-type]


def acts(folder: Path, *listed: Act, source: str = "1") -> ActSpace:
    return ActSpace(target(), listed, str(folder / "log"), source)


def tried(folder: Path) -> list[str]:
    return (folder / "log").read_text().split("\n")[:-1]


def test_the_fastest_is_chosen_once(tmp_path: Path) -> None:
    space = acts(tmp_path, SLOW, FAST)
    assert tuner(tmp_path).best(space) == FAST
    before = tried(tmp_path)
    assert tuner(tmp_path).best(space) == FAST and tried(tmp_path) == before
    assert Tuner(target(), TuningDatabase(tmp_path / "t.jsonl"), measure=False).best(space) == FAST
    # An improved template is measured anew.
    tuner(tmp_path).best(acts(tmp_path, SLOW, FAST, source="2"))
    assert len(tried(tmp_path)) > len(before)


def test_a_tie_keeps_the_default(tmp_path: Path) -> None:
    assert tuner(tmp_path).best(acts(tmp_path, Act("a", 0.002), Act("b", 0.002))) == Act("a", 0.002)


@pytest.mark.parametrize("kind", ["segfault", "abort", "wrong", "nan", "hang"])
def test_a_bad_candidate_costs_only_itself(tmp_path: Path, kind: str) -> None:
    """Written down with its reason, never chosen, never tried again; the others are measured all the same."""
    bad, space = Act(kind, 0.0), acts(tmp_path, SLOW, Act(kind, 0.0), FAST)
    assert tuner(tmp_path, limit_s=1.5).best(space) == FAST
    reason = TuningDatabase(tmp_path / "t.jsonl").failure(space.subject, text_of(bad))
    wanted = {"segfault": "SIGSEGV", "abort": "SIGABRT", "hang": "gave no result within 1.5 s"}
    assert wanted.get(kind, "differs from the reference") in reason
    assert tried(tmp_path).count(kind) == 1


def test_a_default_that_fails_is_replaced_and_not_tried_again(tmp_path: Path) -> None:
    bad = Act("abort", 0.0)
    assert tuner(tmp_path).best(acts(tmp_path, bad, SLOW)) == SLOW
    # Also where the choice itself was lost, the failure is remembered.
    lines = (tmp_path / "t.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "t.jsonl").write_text("".join(line for line in lines if '"failed"' in line))
    assert tuner(tmp_path, budget_s=0.0).best(acts(tmp_path, bad, SLOW)) == SLOW
    assert tuner(tmp_path).best(acts(tmp_path, bad, SLOW)) == SLOW and tried(tmp_path).count("abort") == 1


def test_a_kernel_whose_choices_all_fail_is_named(tmp_path: Path) -> None:
    space = acts(tmp_path, Act("abort"), Act("wrong"))
    for _ in range(2):
        with pytest.raises(UnsupportedOperator, match=r"acts.*SIGABRT"):
            tuner(tmp_path).best(space)
    assert sorted(tried(tmp_path)) == ["abort", "wrong"]


def test_a_process_ended_from_outside_is_no_fault_of_its_candidate(tmp_path: Path) -> None:
    killed = Act("killed", 0.001)
    assert tuner(tmp_path).best(acts(tmp_path, SLOW, killed)) == killed


def test_a_search_that_was_killed_goes_on(tmp_path: Path) -> None:
    """What was hopeless then is not measured again."""
    space = acts(tmp_path, FAST, Act("hopeless", 0.004), Act("close", 0.001))
    database = TuningDatabase(tmp_path / "t.jsonl")
    database.add_measured(space.subject, text_of(Act("hopeless", 0.004)), 4.0)
    database.add_measured(space.subject, text_of(Act("close", 0.001)), 1.0)
    assert tuner(tmp_path).best(space) in (FAST, Act("close", 0.001))
    assert set(tried(tmp_path)) == {"quick", "close"}


def test_without_budget_or_measuring_unknown_shapes_take_their_default(tmp_path: Path) -> None:
    space = acts(tmp_path, SLOW, FAST)
    spent = tuner(tmp_path, budget_s=0.0)
    assert spent.best(space) == SLOW and spent.left_out == 1
    assert Tuner(target(), TuningDatabase(tmp_path / "t.jsonl"), measure=False).best(space) == SLOW
    assert not (tmp_path / "log").exists()


def test_the_model_prunes(tmp_path: Path) -> None:
    many = [Act("ruled out"), *[Act("x", 0.001 * number) for number in range(9)]]
    assert shortlist(acts(tmp_path, SLOW, *many), [SLOW, *many]) == [SLOW, *many[1 : tuning.MOST]]


def test_hopeless_candidates_are_dropped_but_never_the_default() -> None:
    default, good, bad = Act("default"), Act("good"), Act("bad")
    samples = {text_of(default): [2.0] * 3, text_of(good): [1.0] * 3, text_of(bad): [1.3, 1.4, 1.3]}
    few = {name: values[:2] for name, values in samples.items()}
    assert contenders([default, good, bad], few) == [default, good, bad]
    assert contenders([default, good, bad], samples) == [default, good]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_gemms_are_measured_and_right(tmp_path: Path, precision: Precision) -> None:
    if not target().multiplies(precision):
        pytest.skip(f"this processor does not multiply {precision}")
    spec = Gemm((1, 5), 40, 16, bias=True, activation="gelu", residual=True, precision=precision)
    space = GemmSpace.of(spec, target())
    found = tuner(tmp_path)
    assert found.best(space) in space.choices() and found.measured == 1
    record = found.database.find(space.subject)
    assert record is not None and record["seconds"] > 0 and record["tried"] > 1


@pytest.mark.parametrize("activation", ["", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "tanh"])
def test_every_epilogue_has_a_reference(activation: str) -> None:
    spec = Gemm((3,), 20, 12, activation=activation)
    space = GemmSpace.of(spec, target())
    assert space.run(space.default).error() < 0.5


def test_a_wrong_gemm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gemm_space.formats.weight_operands
    monkeypatch.setattr(gemm_space.formats, "weight_operands", lambda *given: tuple(2 * p for p in real(*given)))
    space = GemmSpace.of(Gemm((3,), 20, 12), target())
    assert space.run(space.default).error() > 10.0


def test_attention_is_measured_and_right(tmp_path: Path) -> None:
    queries, keys, heads = Operand.of((1, 40, 32), 4), Operand.of((1, 600, 16), 2), (0, 0, 1, 1)
    spec = Attention(1, 40, 600, queries, keys, keys, (0, 1, 2, 3), heads, heads, 0.3, 5.0, Bias((1, 1, 1, 600)))
    space = FlashSpace(spec, target(), "fp32")
    found = tuner(tmp_path)
    assert len(space.choices()) > 1 and found.best(space) in space.choices() and found.measured == 1


def test_builds_take_what_the_tuner_finds(tmp_path: Path) -> None:
    spec = Gemm((4,), 40, 16)
    space = GemmSpace.of(spec, target())
    other = space.choices()[1]
    database = TuningDatabase(tmp_path / "t.jsonl")
    database.add(space.subject, {"choice": {"rows": other.rows, "no such field": 1}})
    assert tuned_tiles(target(), Tuner(target(), database, measure=False)).gemm(spec) == space.default
    database.add(space.subject, {"choice": {**vars(other)}})
    assert tuned_tiles(target(), Tuner(target(), database, measure=False)).gemm(spec) == other


def test_the_model_prefers_tiles_that_waste_less() -> None:
    space = GemmSpace.of(Gemm((24,), 96, 64), target())
    assert space.predicted(Tile(12, 2)) < space.predicted(Tile(1, 4))
    uneven = GemmSpace.of(Gemm((24,), 100, 64), target())
    assert uneven.predicted(Tile(12, 2)) < uneven.predicted(Tile(8, 3))
    found = space.choices()
    assert found[0] == space.default and len(set(found)) == len(found)
    costs = [space.predicted(tile) for tile in found[1:]]
    assert costs == sorted(costs)


@pytest.mark.parametrize("rows", [3, 127, 128])
def test_all_tiles_divide_among_threads_what_the_default_does(rows: int) -> None:
    """Which core holds which rows decides about the next kernel, which a GEMM measured alone knows nothing of."""
    space = GemmSpace.of(Gemm((rows,), 384, 384, threads=2), target(2))
    assert {tile.by_rows for tile in space.choices()} == {space.default.by_rows}
    assert not any(tile.by_rows and tile.block % tile.rows for tile in space.choices())


def test_buckets_agree_on_the_panel_width() -> None:
    tiles = Tiles(target(), lambda spec, _: Tile(12, 2) if spec.M > 50 else Tile(6, 4))
    assert tiles.gemm(Gemm((64,), 96, 8)).vectors == tiles.gemm(Gemm((8,), 96, 8)).vectors == 2


@pytest.mark.parametrize("rows", [1, 7, 128, 1000, 1001, 1024, 4096])
def test_default_blocks_divide_the_rows(rows: int) -> None:
    for columns, depth in ((384, 1536), (1536, 384), (37, 19)):
        tile = default_gemm(Gemm((rows,), columns, depth), target())
        assert tile.rows * tile.vectors <= 24 and 1 <= tile.rows <= rows
        assert tile.block == 0 or (rows % tile.block == 0 and tile.block % tile.rows == 0)

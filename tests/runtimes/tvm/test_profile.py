"""The profile counts what kernels do, and says how far that is from what the processor can."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rewriter.cli import main
from rewriter.core.errors import ModelError
from rewriter.runtimes.tvm import peak
from rewriter.runtimes.tvm.compile import build
from rewriter.runtimes.tvm.kernels.attention import Attention, Operand
from rewriter.runtimes.tvm.kernels.gemm import Gemm, Tile
from rewriter.runtimes.tvm.kernels.matmul import MatMul
from rewriter.runtimes.tvm.load import load
from rewriter.runtimes.tvm.profile import drawn, profile_folder
from rewriter.runtimes.tvm.work import operations
from tests.runtimes.tvm import graphs
from tests.runtimes.tvm.harness import target


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = [{"ids": (1, tokens), "bias": (1, 1, 1, tokens)} for tokens in (4, 8)]
    return build(graphs.encoder(), shapes, tmp_path_factory.mktemp("profile") / "a", target())


def test_operations_are_two_per_product() -> None:
    assert operations(Gemm((2, 3), 5, 7)) == operations((Gemm((2, 3), 5, 7), Tile())) == 2 * 6 * 5 * 7
    assert operations(MatMul((2,), 3, 5, 7)) == 2 * 2 * 3 * 5 * 7
    rows = Operand.of((1, 4, 6), 2)
    assert operations(Attention(1, 4, 4, rows, rows, rows, (0, 1), (0, 1), (0, 1), 1.0)) == 2 * 2 * 16 * (3 + 3)
    assert operations("anything else") == 0


def test_every_kernel_is_there_with_what_it_achieved(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "_COPIED_BYTES", 1 << 20)
    found = profile_folder(artifact, 3, {})
    rows = {row["kernel"].split("_")[0]: row for row in found["kernels"]}
    assert {"gemm", "flash", "norm", "gather"} <= set(rows) and found["shapes"]["ids"] == [1, 8]
    assert rows["gemm"]["gflops_per_s"] > 0 and rows["norm"]["gflops_per_s"] == 0 and rows["norm"]["calls"] == 2
    assert set(found["peaks"]) == {"fp32", "bytes"} and min(found["peaks"].values()) > 0
    shares = sum(row["share"] for row in found["kernels"]) + found["virtual_machine_seconds"] / found["seconds"]
    assert shares == pytest.approx(1.0)


def test_inputs_are_drawn_for_the_asked_shapes(artifact: Path) -> None:
    feeds = drawn(load(artifact), {"ids": (1, 4), "bias": (1, 1, 1, 4)})
    assert feeds["ids"].shape == (1, 4) and feeds["ids"].dtype == np.int64 and feeds["ids"].all()
    with pytest.raises(ModelError, match="no input 'nothing'"):
        drawn(load(artifact), {"nothing": (1,)})


def test_the_command_prints_a_table(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(artifact), "--runs", "2"]) == 0
    table = capsys.readouterr().out
    assert "of the roofline" in table and "gemm_fp32" in table and "memory" in table
    assert main(["profile", str(artifact), "--runs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]


def test_a_place_without_a_model_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err

"""A wheel built from the tree works outside it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_works_outside_the_tree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert "rewriter/report/schema.json" in names
    assert not [name for name in names if name.startswith(("models/", "tests/", "docs/"))]
    code = (
        "import sys; sys.path = [sys.argv[1]] + [p for p in sys.path if 'editable' not in p]\n"
        "import rewriter, passes; from rewriter.core.passes_registry import discover; from rewriter.cli import main\n"
        "assert rewriter.__file__.startswith(sys.argv[1]) and passes.__file__.startswith(sys.argv[1])\n"
        "print(sorted(discover())); sys.exit(main(['missing.onnx']))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(site)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2, run.stdout + run.stderr
    assert "head_pruning" in run.stdout
    assert "optimize: no model at missing.onnx" in run.stderr and "Traceback" not in run.stderr

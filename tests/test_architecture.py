"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "rewriter").rglob("*.py")) + sorted((ROOT / "passes").glob("*.py"))
PRINTERS = {"rewriter/cli.py"}  # and the commands of rewriter/benchmark, which are for us and print tables
LAYERED = {
    "compiling", "profiling",
    "cli", "cli_progress", "api", "inspection", "scanning", "verification", "doctor", "pipeline", "benchmark",
    "search", "torch_graphs",
    "assembly", "rivals", "accuracy", "measurement", "report", "calibration", "runtimes", "attention", "graph", "core",
}  # fmt: skip


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_point_down() -> None:
    contract = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--config", ".importlinter"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert contract.returncode == 0, contract.stdout[-3000:]


def test_every_module_has_a_layer() -> None:
    found = {p.stem if p.is_file() else p.name for p in (ROOT / "rewriter").iterdir() if not p.name.startswith("_")}
    assert found - {"py.typed", "py"} == LAYERED


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_the_command_line_prints_and_reads_the_environment(path: Path) -> None:
    if relative(path) in PRINTERS or relative(path).startswith("rewriter/benchmark/"):
        return
    used = set(calls(path))
    assert not used & {"print", "input", "os.getenv", "os.environ.get", "sys.exit"}, relative(path)


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("[a-z]*.py")), ids=relative)
def test_each_pass_has_one_test_file_and_one_class(path: Path) -> None:
    assert (ROOT / "tests" / "passes" / f"test_{path.name}").exists()
    classes = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")
    ]
    assert len(classes) == 1


def test_help_is_instant() -> None:
    code = (
        "import sys\nfrom rewriter.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'onnxruntime', 'tvm', 'onnx', 'onnx_ir', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_public_names_are_few_and_documented() -> None:
    import rewriter

    assert len(rewriter.__all__) <= 15
    for name in rewriter.__all__:
        assert getattr(rewriter, name).__doc__, name

"""Fingerprints: equal for equal content, in every process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rewriter.graph.onnx import load
from tests.graph.files import TEXT, external, proto_of, written


def test_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = written(tmp_path, proto_of())
    code = "import sys; from rewriter.graph.onnx import load; sys.stdout.write(load(sys.argv[1]).fingerprint())"
    other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert other.stdout == load(path).fingerprint()


def test_fingerprint_sees_every_change(tmp_path: Path) -> None:
    base = load(written(tmp_path, proto_of())).fingerprint()
    seen = {base}
    for old, new in [("{1, 2, 3}", "{1, 2, 3.0000002}"), ("Relu", "Tanh"), ("4.0]", "5.0]"), ("float[N", "float[M")]:
        seen.add(load(written(tmp_path, proto_of(TEXT.replace(old, new)))).fingerprint())
    seen.add(load(written(tmp_path, proto_of(TEXT.replace("t = ", "t2 = ").replace("(t,", "(t2,")))).fingerprint())
    assert len(seen) == 6
    assert load(external(tmp_path)).fingerprint() == base

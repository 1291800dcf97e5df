from __future__ import annotations

from typing import Any

import pytest

from rewriter.report.markdown import cell, markdown, summary

INTERVAL = {"median": 1.5, "low": 1.4, "high": 1.6}


def report(runtime: str = "tvm", **changes: Any) -> dict[str, Any]:
    subject = {"latency_s": INTERVAL, "runtime": runtime, "parameters": 10, "flops": 20}
    rivals = {"original": INTERVAL, "onnxruntime": INTERVAL, "onnxruntime_int8": None}
    nothing = dict.fromkeys(rivals)
    return {
        "best": subject | {"kept_original": False, "plan": []},
        "baseline": subject,
        "speedup": {
            "model.so": rivals if runtime == "tvm" else nothing,
            "model.onnx": nothing if runtime == "tvm" else rivals,
        },
        "metric": None,
        "task": None,
        "sites": [],
        "contributions": [],
        "variants": [],
        "variants_timed": 2,
        "seconds": {"load": 1.0},
        "environment": {"processor": "x"},
        "notes": [],
    } | changes


@pytest.mark.parametrize("runtime", ["tvm", "onnxruntime"])
def test_the_headline_is_about_the_runtime_that_decided(runtime: str) -> None:
    for text in (markdown(report(runtime)), summary(report(runtime))):
        assert "A variant is kept: 1.50x [1.40, 1.60] faster than the original" in text


def test_a_plan_that_could_not_be_timed_is_no_crash() -> None:
    nothing = dict.fromkeys(("original", "onnxruntime", "onnxruntime_int8"))
    text = markdown(report(speedup={"model.so": nothing, "model.onnx": nothing}))
    assert "not timed beside the original" in text
    assert "not measured" in text


def test_names_from_a_hostile_model_stay_text() -> None:
    assert cell("a|b`<script>\n# c") == "a\\|b'&lt;script> # c"

"""Targets: this processor by several names, and clear errors for all others."""

from __future__ import annotations

import json

import pytest

from rewriter.core.errors import OptionError
from rewriter.runtimes.tvm.target import detect, missing_features, tvm_target


def test_every_fact_has_a_source() -> None:
    found = detect("cpu", 2)
    assert found.kind == "llvm" and found.threads == 2 and found.cores >= 1
    facts = {"name", "features", "cores", "mcpu", "vector_floats", "registers", "l1_bytes", "l2_bytes", "l3_bytes"}
    assert facts <= set(found.sources)
    assert found.l1_bytes < found.l2_bytes


@pytest.mark.parametrize("text", ["cpu", "llvm", "native", '{"kind": "llvm"}'])
def test_names_of_this_machine(text: str) -> None:
    assert detect(text) == detect("cpu")


@pytest.mark.parametrize("text", ["llvm -mcpu=x86-64-v3", json.dumps({"kind": "llvm", "mcpu": "x86-64-v3"})])
def test_an_older_instruction_set_leaves_newer_features_out(text: str) -> None:
    found = detect(text)
    assert found.mcpu == "x86-64-v3" and found.sources["mcpu"] == "given"
    assert not any(feature.startswith("avx512") for feature in found.features) and found.vector_floats <= 8


@pytest.mark.parametrize(("text", "message"), [
    ("cuda", "this machine does not have"),
    ("cuda -arch=sm_90", "this machine does not have"),
    ("llvm -mtriple=aarch64-linux-gnu", "another machine"),
    ("llvm mcpu", "cannot read 'mcpu'"),
    ('{"kind": ', "not valid JSON"),
    ("  ", "is empty"),
])  # fmt: skip
def test_other_targets_are_clear_errors(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        detect(text)


def test_threads_are_counted_from_one() -> None:
    with pytest.raises(OptionError, match="0 threads"):
        detect("cpu", 0)


def test_features_of_other_processors_are_missed() -> None:
    assert missing_features(("avx1024",)) == ("avx1024",)
    assert missing_features(detect("cpu").features) == ()


def test_tvm_accepts_the_target() -> None:
    assert tvm_target(detect("cpu")).kind.name == "llvm"

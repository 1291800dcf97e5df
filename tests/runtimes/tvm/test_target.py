"""Targets: this processor by several names, and clear errors for all others."""

from __future__ import annotations

import json

import pytest

from rewriter.core.errors import OptionError
from rewriter.runtimes.tvm import target
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
    ("llvm -mtriple=x86_64-linux-gnu -mcpu=haswell", "another machine"),
    ("llvm -mtriple=riscv64-linux-gnu", "cannot serve riscv64-linux-gnu"),
    ("llvm -mcpu=pentium9", "no processor 'pentium9'"),
    ("llvm -mtriple=aarch64-linux-gnu -mcpu=haswell", "no processor 'haswell' for aarch64"),
    ("llvm -mtriple=aarch64-linux-gnu -mattr=neon", "cannot read attribute 'neon'"),
    ("llvm -mfloat=hard", "unknown option 'mfloat'"),
    ("vulkan", "cannot serve it"),
    ("abacus", "TVM has no target 'abacus'"),
    ("llvm mcpu", "cannot read 'mcpu'"),
    ('{"kind": ', "not valid JSON"),
    ("  ", "is empty"),
])  # fmt: skip
def test_other_targets_are_clear_errors(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        detect(text)


@pytest.mark.parametrize(("text", "message"), [
    ("cuda", "no arch"),
    ("cuda -arch=sm_9999", "sm_9999"),
    ("cuda -arch=gfx900", "gfx900"),
    ("llvm -mtriple=aarch64-linux-gnu -mattr=-neon", "no NEON"),
])  # fmt: skip
def test_what_cannot_be_compiled_for(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        detect(text, away=True)


@pytest.mark.parametrize(("text", "features", "floats", "registers"), [
    ("llvm -mtriple=aarch64-linux-gnu -mattr=+neon", ("asimd",), 4, 32),
    ("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a72", ("asimd",), 4, 32),
    ("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76", ("asimd", "asimdhp", "asimddp"), 4, 32),
    ("llvm -mtriple=x86_64-linux-gnu -mcpu=haswell", ("avx2", "fma"), 8, 16),
    ("llvm -mtriple=x86_64-linux-gnu -mcpu=nehalem", (), 4, 16),
])  # fmt: skip
def test_other_machines_are_described(text: str, features: tuple[str, ...], floats: int, registers: int) -> None:
    found = detect(text, 2, away=True)
    assert found.elsewhere and found.features == features and found.threads == 2
    assert (found.vector_floats, found.registers) == (floats, registers)
    assert tvm_target(found).attrs["mtriple"] == found.triple


def test_a_gpu_is_described() -> None:
    found = detect("cuda -arch=sm_90", away=True)
    assert found.elsewhere and tvm_target(found).attrs["arch"] == "sm_90"


def test_a_processor_with_more_than_this_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_flags", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(OptionError, match=r"avx512f.*this processor lacks"):
        detect("llvm -mcpu=x86-64-v4")


def test_threads_are_counted_from_one() -> None:
    with pytest.raises(OptionError, match="0 threads"):
        detect("cpu", 0)


def test_features_of_other_processors_are_missed() -> None:
    assert missing_features(("avx1024",)) == ("avx1024",)
    assert missing_features(detect("cpu").features) == ()


def test_tvm_accepts_the_target() -> None:
    assert tvm_target(detect("cpu")).kind.name == "llvm"

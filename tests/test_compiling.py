"""``--compile-only``: what is written for a target that is not here, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rewriter.cli import main
from rewriter.core.errors import OptionError
from rewriter.core.options import Options, parse_address

NEON = "llvm -mtriple=aarch64-linux-gnu -mattr=+neon"


def compiled(encoder: Path, folder: Path, *words: str) -> int:
    sizes = ["--shape", "input_ids=1x8", "--shape", "attention_mask=1x8"]
    place = ["-o", str(folder / "out"), "--cache-dir", str(folder / "cache")]
    return main([str(encoder), "--compile-only", "--json", *sizes, *place, *words])


@pytest.mark.parametrize(("emit", "files"), [
    ("artifact", {"model.json", "model.so", "model.weights.safetensors"}),
    ("static-library", {"example.c", "libmodel.a", "model.h", "model.weights.bin"}),
])  # fmt: skip
def test_another_processor_is_built_for(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], emit: str, files: set[str]
) -> None:
    if not shutil.which("aarch64-linux-gnu-gcc"):
        pytest.skip("no AArch64 compiler is installed (apt-get install gcc-aarch64-linux-gnu)")
    assert compiled(encoder, tmp_path, "--target", NEON, "--emit", emit) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compiled_only"] and report["target"]["triple"] == "aarch64-linux-gnu"
    assert set(report["files"]) == files == {file.name for file in (tmp_path / "out").iterdir()} - {"compiled.json"}


@pytest.mark.parametrize(("words", "said"), [
    (["--target", "abacus"], "TVM has no target 'abacus'"),
    (["--target", "vulkan"], "cannot serve"),
    (["--target", "llvm -mtriple=sparc-linux-gnu"], "cannot serve sparc-linux-gnu"),
    (["--target", "llvm -mcpu=pentium9"], "no processor 'pentium9'"),
    (["--target", "cuda -arch=sm_1"], "sm_1"),
    (["--rpc", "127.0.0.1:9190", "--key", "pi"], "--rpc is for timing"),
    (["--emit", "postcard"], "postcard"),
])  # fmt: skip
def test_what_cannot_be_built_is_said(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert compiled(encoder, tmp_path, *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_timing_without_the_device_is_a_clear_error(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in (NEON, "cuda -arch=sm_90"):
        assert main([str(encoder), "--target", target, "--shape", "input_ids=1x8"]) == 2
        assert "--compile-only" in capsys.readouterr().err


@pytest.mark.parametrize("options", [
    {"emit": "static-library"}, {"rpc": "127.0.0.1:9190"}, {"key": "pi"}, {"rpc": "nowhere", "key": "pi"},
])  # fmt: skip
def test_options_that_contradict_each_other(options: dict[str, str]) -> None:
    with pytest.raises(OptionError):
        Options(**options)  # type: ignore[arg-type]


def test_addresses() -> None:
    assert parse_address("192.168.0.7:9190") == ("192.168.0.7", 9190)
    for text in ("host", ":1", "host:0", "host:70000", "host:x"):
        with pytest.raises(OptionError, match="is not an address"):
            parse_address(text)

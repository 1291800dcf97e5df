"""The hardware that decides: facts with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Which processor flag stands for the dot products of a number format: AVX-512 forms on vectors of 16 words.
PRECISION_FEATURES: Mapping[str, str] = {"bf16": "avx512_bf16", "int8": "avx512_vnni"}
# Which flags stand for those of its matrix unit, where the system lets this process use it.
MATRIX_FEATURES: Mapping[str, tuple[str, ...]] = {"bf16": ("amx_tile", "amx_bf16"), "int8": ("amx_tile", "amx_int8")}


@dataclass(frozen=True)
class Target:
    """One machine to run on.

    `kind` is TVM's (``llvm``, ``cuda``); `mcpu` names an instruction set LLVM knows; `features` are the processor's
    own flags; `vector_floats` is how many fp32 lanes one register has; caches in bytes; `threads` is how many the
    artifact will use. `sources` says for each fact where it was read. `triple` is LLVM's name for a machine other than
    this one, empty for this one; `remote` is ``HOST:PORT/KEY`` of the tracker that lends it, empty where there is none.
    """

    kind: str
    name: str
    mcpu: str
    arch: str
    cores: int
    threads: int
    vector_floats: int
    registers: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    features: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    triple: str = ""
    remote: str = ""

    @property
    def elsewhere(self) -> bool:
        """Whether code for it may be unable to run in this process: it is another machine, or a GPU."""
        return bool(self.triple or self.remote) or self.kind != "llvm"

    def multiplies(self, precision: str) -> bool:
        """Whether the processor has instructions that multiply numbers of this format (fp32, bf16, int8)."""
        return precision == "fp32" or PRECISION_FEATURES.get(precision) in self.features

    def has_matrix_unit(self, precision: str) -> bool:
        """Whether kernels may multiply this format on matrix tiles (AMX); their epilogues are of AVX-512.

        Not on a device behind a tracker: nobody asks for permission in the server's process.
        """
        needed = MATRIX_FEATURES.get(precision, ())
        able = self.vector_floats == 16 and not self.remote
        return able and bool(needed) and set(needed) <= set(self.features)

    def key(self) -> dict[str, Any]:
        """What makes measurements on two targets comparable: everything but where the facts were read."""
        key: dict[str, Any] = {
            "kind": self.kind,
            "name": self.name,
            "mcpu": self.mcpu,
            "threads": self.threads,
            "features": list(self.features),
        }
        if self.elsewhere:
            key |= {"triple": self.triple, "remote": self.remote}
        return key

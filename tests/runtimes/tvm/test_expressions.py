"""The fitted functions against float64, over their whole range and beyond."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf, expit

from rewriter.runtimes.tvm.kernels.maps import FUNCTIONS, Map, make_map
from tests.runtimes.tvm.harness import run_kernel

EXACT = {
    "erf": erf,
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": expit,
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "coarse_gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * expit(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
    "identity": lambda x: x,
}


def test_every_function_has_a_reference() -> None:
    assert set(FUNCTIONS) == set(EXACT)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_function_is_accurate_in_fp32(name: str) -> None:
    edges = np.array([0.0, -0.0, 1e-6, -1e-6, 50.0, -50.0, 80.0, -80.0, 1e4 if name != "exp" else 85.0, -1e4])
    x = np.concatenate([np.linspace(-12, 12, 4001), edges]).astype(np.float32)
    (got,) = run_kernel(make_map(Map((len(x),), name)), [x], (len(x),))
    with np.errstate(over="ignore"):
        wanted = EXACT[name](x.astype(np.float64))
    error = np.abs(got - wanted) / np.maximum(1.0, np.abs(wanted))
    bound = 3e-6 if name == "coarse_gelu" else 2e-6
    assert error.max() < bound, f"{name} at {x[error.argmax()]}"

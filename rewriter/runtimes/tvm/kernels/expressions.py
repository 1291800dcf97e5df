"""Transcendental functions as TIR expressions that LLVM vectorises: no call to a maths library, no table from anywhere.

Every coefficient is fitted here, by least squares with weights that push the largest error down (Lawson's iteration).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import log

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf as exact_erf
from scipy.special import erfc as exact_erfc
from tvm.script.ir_builder import tirx as T  # noqa: N812

from rewriter.runtimes.tvm.kernels.emit import Expression, splat

ERF_RANGE = 3.925  # beyond it erf rounds to one in fp32
EXP_LOW = -87.0  # exp below it is denormal or zero
EXP_HIGH = 88.0
EXP_ZERO = -127.0 * log(2.0)  # rounds to 2^-127, whose exponent bits are those of zero
ROUNDING = 1.5 * 2.0**23 + 127.0
GELU_RANGE = 5.5  # beyond it GELU differs from 0 or v by 1e-7
GELU_POWER = 8
TANH_RANGE = 9.02  # beyond it tanh rounds to one in fp32

Coefficients = tuple[float, ...]


def _chebyshev_points(count: int) -> NDArray[np.float64]:
    return (1.0 - np.cos(np.pi * (np.arange(count) + 0.5) / count)) / 2.0


@cache
def exp_coefficients(degree: int = 6) -> Coefficients:
    """Polynomial of exp on [-ln2/2, ln2/2], constant term first; relative error 1e-7 for degree 5 and above."""
    x = (_chebyshev_points(2000) - 0.5) * log(2.0)
    columns = x[:, None] ** np.arange(1, degree + 1)
    target = np.expm1(x)
    weight = np.ones_like(x)
    for _ in range(30):
        scale = weight / np.exp(x)
        solution, *_ = np.linalg.lstsq(columns * scale[:, None], target * scale, rcond=None)
        residual = np.abs(columns @ solution - target) / np.exp(x)
        weight *= np.sqrt(residual / residual.mean() + 0.05)
        weight /= weight.mean()
    return (1.0, *map(float, solution))


def _fit_rational(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]], p: int, q: int
) -> tuple[Coefficients, Coefficients]:
    """x * P(x^2) / Q(x^2) ~ function(x) on [0, 1]: linearised least squares, reweighted by denominator and residual."""
    x = _chebyshev_points(4000)
    y, z = function(x), x * x
    weight, denominator = np.ones_like(x), np.ones_like(x)
    best: tuple[float, Coefficients, Coefficients] = (np.inf, (), ())
    for _ in range(60):
        columns = np.concatenate(
            [x[:, None] * z[:, None] ** np.arange(p + 1), -y[:, None] * z[:, None] ** np.arange(1, q + 1)], 1
        )
        scale = weight / np.abs(denominator)
        solution, *_ = np.linalg.lstsq(columns * scale[:, None], y * scale, rcond=None)
        top, bottom = solution[: p + 1], np.r_[1.0, solution[p + 1 :]]
        denominator = np.polyval(bottom[::-1], z)
        residual = np.abs(x * np.polyval(top[::-1], z) / denominator - y)
        if residual.max() < best[0]:
            best = (float(residual.max()), tuple(map(float, top)), tuple(map(float, bottom)))
        weight *= np.sqrt(residual / residual.mean() + 0.05)
        weight /= weight.mean()
    return best[1], best[2]


@cache
def erf_coefficients() -> tuple[Coefficients, Coefficients]:
    """(P, Q) of erf with x scaled to [0, 1]; error 4e-7 in fp32."""
    return _fit_rational(lambda x: np.asarray(exact_erf(x * ERF_RANGE)), 5, 5)


@cache
def tanh_coefficients() -> tuple[Coefficients, Coefficients]:
    """(P, Q) of tanh with x scaled to [0, 1]."""
    return _fit_rational(lambda x: np.tanh(x * TANH_RANGE), 6, 6)


def horner(coefficients: Coefficients, z: Expression, lanes: int) -> Expression:
    """The polynomial at z, constant term first."""
    value = splat(coefficients[-1], lanes)
    for coefficient in coefficients[-2::-1]:
        value = value * z + splat(coefficient, lanes)
    return value


def clamp(v: Expression, low: float, high: float, lanes: int) -> Expression:
    """v between two constants."""
    return T.max(T.min(v, splat(high, lanes)), splat(low, lanes))


def exp(v: Expression, lanes: int) -> Expression:
    """exp(v) = 2^n exp(r): relative error 2e-7; below -87 it gives about 1e-38 instead of denormals or zero."""
    x = clamp(v, EXP_LOW, EXP_HIGH, lanes)
    n = T.floor(x * splat(1.0 / log(2.0), lanes) + splat(0.5, lanes))
    high = float(np.float32(0.693359375))  # ln 2 in two parts, so that n * high is exact
    r = x - n * splat(high, lanes) - n * splat(log(2.0) - high, lanes)
    return horner(exp_coefficients(), r, lanes) * _power_of_two(n, lanes)


def exp_below_one(v: Expression, lanes: int, degree: int = 5) -> Expression:
    """exp(v) for v <= 0, in two thirds of the operations of `exp`; 0 below -88, NaN for NaN.

    Adding `ROUNDING` leaves n + 127, the exponent bits of 2^n, in the lowest bits of the sum. `degree` 5 gives a
    relative error of 3e-7, 3 of 1e-4.
    """
    suffix = f"x{lanes}" if lanes > 1 else ""
    x = T.max(splat(EXP_ZERO, lanes), v)
    shifted = T.reinterpret(f"int32{suffix}", x * splat(1.0 / log(2.0), lanes) + splat(ROUNDING, lanes))
    # As bits and back, or TVM simplifies the sum and the difference away.
    n = T.reinterpret(f"float32{suffix}", shifted) - splat(ROUNDING, lanes)
    exponent = T.Broadcast(T.int32(23), lanes) if lanes > 1 else T.int32(23)
    power = T.reinterpret(f"float32{suffix}", T.shift_left(shifted, exponent))
    return horner(exp_coefficients(degree), x - n * splat(log(2.0), lanes), lanes) * power


def _power_of_two(n: Expression, lanes: int) -> Expression:
    """2 ** n for a whole number n held as float, built from its exponent bits."""
    suffix = f"x{lanes}" if lanes > 1 else ""

    def whole(value: int) -> Expression:
        return T.Broadcast(T.int32(value), lanes) if lanes > 1 else T.int32(value)

    return T.reinterpret(f"float32{suffix}", T.shift_left(T.Cast(f"int32{suffix}", n) + whole(127), whole(23)))


def _rational(v: Expression, limit: float, fit: tuple[Coefficients, Coefficients], lanes: int) -> Expression:
    x = clamp(v * splat(1.0 / limit, lanes), -1.0, 1.0, lanes)
    z = x * x
    return x * horner(fit[0], z, lanes) / horner(fit[1], z, lanes)


def erf(v: Expression, lanes: int) -> Expression:
    """The error function, absolute error 4e-7."""
    return _rational(v, ERF_RANGE, erf_coefficients(), lanes)


def tanh(v: Expression, lanes: int) -> Expression:
    """The hyperbolic tangent, absolute error 5e-7."""
    return _rational(v, TANH_RANGE, tanh_coefficients(), lanes)


def sigmoid(v: Expression, lanes: int) -> Expression:
    """1 / (1 + exp(-v))."""
    return splat(1.0, lanes) / (splat(1.0, lanes) + exp(-v, lanes))


@cache
def gelu_root_coefficients(degree: int) -> Coefficients:
    """Polynomial whose `GELU_POWER`-th power is erfc(a / sqrt 2) / 2 on [0, `GELU_RANGE`], constant term first.

    The root of a function that falls by eight orders of magnitude hardly bends, so few terms serve: GELU comes out with
    an error of 4e-7 for `degree` 7 and 2e-6 for 5.
    """
    a = _chebyshev_points(4000) * GELU_RANGE
    target = (exact_erfc(a / 2**0.5) / 2) ** (1.0 / GELU_POWER)
    start, unit = target[0], GELU_RANGE ** np.arange(1, degree + 1)
    columns, slope = a[:, None] ** np.arange(1, degree + 1) / unit, a * GELU_POWER * target ** (GELU_POWER - 1) + 1e-12
    weight, best = np.ones_like(a), (np.inf, np.zeros(degree))
    for _ in range(100):
        scale = weight * slope
        solution, *_ = np.linalg.lstsq(columns * scale[:, None], (target - start) * scale, rcond=None)
        residual = a * np.abs((start + columns @ solution) ** GELU_POWER - target**GELU_POWER)
        if residual.max() < best[0]:
            best = (float(residual.max()), solution / unit)
        weight *= np.sqrt(residual / residual.mean() + 0.05)
        weight /= weight.mean()
    return (float(0.5 ** (1.0 / GELU_POWER)), *map(float, best[1]))


def _gelu(v: Expression, lanes: int, degree: int) -> Expression:
    """v Phi(v), written as max(v, 0) - a Phi(-a) with a = min(|v|, range), whose last factor is a power.

    This form has no division, loses no digits for negative v, and tends to 0 there instead of growing with |v|.
    """
    a = T.min(T.fabs(v), splat(GELU_RANGE, lanes))
    tail = horner(gelu_root_coefficients(degree), a, lanes)
    for _ in range(GELU_POWER.bit_length() - 1):
        tail = tail * tail
    return T.max(v, splat(0.0, lanes)) - a * tail


def gelu(v: Expression, lanes: int) -> Expression:
    """0.5 v (1 + erf(v / sqrt 2)), absolute error 5e-7."""
    return _gelu(v, lanes, 7)


def coarse_gelu(v: Expression, lanes: int) -> Expression:
    """GELU to 2e-6: for results that are rounded to 8 or 16 bits next."""
    return _gelu(v, lanes, 5)


def gelu_tanh(v: Expression, lanes: int) -> Expression:
    """GELU by its tanh approximation, as the sigmoid it equals: v * sigmoid(2 sqrt(2/pi) (v + 0.044715 v^3))."""
    inner = v * (splat(1.0, lanes) + splat(0.044715, lanes) * v * v)
    return v * sigmoid(inner * splat(2.0 * (2.0 / np.pi) ** 0.5, lanes), lanes)


ACTIVATIONS: dict[str, Callable[[Expression, int], Expression]] = {
    "": lambda v, lanes: v,
    "identity": lambda v, lanes: v,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda v, lanes: v * sigmoid(v * splat(1.702, lanes), lanes),
    "relu": lambda v, lanes: T.max(v, splat(0.0, lanes)),
    "silu": lambda v, lanes: v * sigmoid(v, lanes),
    "tanh": tanh,
}

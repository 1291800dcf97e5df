"""Noise on every weight: default or pruned weights make checks vacuous (zero biases, dead branches, tiny logits)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph
from rewriter.graph.tensors import TORCH_DTYPES

UNUSUAL = 1e3  # mask constants and the like stay as they are


def borrowed(graph: OnnxGraph, constants: Mapping[str, torch.Tensor]) -> Interpreter:
    """A float64 interpreter that takes weights of the same name from another one."""
    interpreter = Interpreter(graph, dtype=torch.float64)
    interpreter.constants.update({n: t for n, t in constants.items() if n in interpreter.constants})
    return interpreter


def shaken(graph: OnnxGraph, seed: int = 0) -> Interpreter:
    """A float64 interpreter whose float weights carry noise: matrices 1.5 / sqrt(fan-in), vectors 0.2."""
    interpreter = Interpreter(graph, dtype=torch.float64)
    rng = np.random.default_rng(seed)
    for name, tensor in interpreter.constants.items():
        if tensor.is_floating_point() and tensor.numel() >= 2:
            kind = graph.model.graph.initializers[name].dtype
            # rounded to what the model can store, so that sites hold the very same numbers
            stored = TORCH_DTYPES.get(kind, torch.float32) if kind is not None else torch.float32
            interpreter.constants[name] = _shake(tensor, rng).to(stored).to(torch.float64)
    return interpreter


def _shake(tensor: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    size = 1.5 / np.sqrt(tensor.shape[0]) if tensor.ndim > 1 else 0.2
    noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32)).to(tensor.dtype) * size
    moved = tensor + noise
    if bool((tensor > 0).all()):  # variances and tables of sizes stay positive
        moved = moved.abs() + 1e-3
    return torch.where(torch.isfinite(tensor) & (tensor.abs() < UNUSUAL), moved, tensor)

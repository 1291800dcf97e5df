"""How much a loss reacts to every head and hidden unit: squared gradients of masks, summed over batches.

A mask of one before a row block of the output projection scales that block, so its gradient is the inner product of
the block with its own gradient: no masks are put into the graph. Source: Kwon et al. 2022, who sum over mini-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rewriter.attention.lower import lower
from rewriter.calibration.walk import feature_name
from rewriter.core.errors import ModelError
from rewriter.core.site import AttentionSite, FeedForwardSite, Site
from rewriter.graph.interpreter import Interpreter
from rewriter.graph.onnx import OnnxGraph

Feeds = Mapping[str, np.ndarray]
Loss = Callable[[Mapping[str, Tensor], int], Tensor]


def fisher(
    graph: OnnxGraph, sites: Sequence[Site], batches: Iterable[Feeds], loss: Loss
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Per site the diagonal (H,) or (F,), and the matrix (H, H) or (F, F) of mask gradients within that site.

    `loss(outputs, batch)` is a scalar of the model's outputs by name on the batch of that number. Raises `ModelError`
    for a site whose output weights are not a constant of the lowered graph.
    """
    lowered = lower(graph, sites)
    interpreter = Interpreter(lowered, requires_grad=True)
    names = {site.id: _output_weight(lowered, site) for site in sites}
    gradients: dict[str, list[np.ndarray]] = {site.id: [] for site in sites}
    with torch.inference_mode(False), torch.enable_grad():
        for number, feeds in enumerate(batches):
            outputs = interpreter.run(feeds)
            loss(outputs, number).backward()
            for site in sites:
                gradients[site.id].append(_of_masks(interpreter.constants[names[site.id]], site))
            for tensor in interpreter.constants.values():
                tensor.grad = None
    stacked = {name: np.stack(rows) for name, rows in gradients.items()}
    return (
        {name: (rows**2).sum(0) for name, rows in stacked.items()},
        {name: rows.T @ rows for name, rows in stacked.items()},
    )


def units_of(site: Site) -> int:
    """How many heads or hidden units a mask of this site has."""
    if isinstance(site, FeedForwardSite):
        return site.width
    return site.heads if isinstance(site, AttentionSite) else 0


def _of_masks(weight: Tensor, site: Site) -> np.ndarray:
    assert weight.grad is not None
    products_RC = (weight.detach().double() * weight.grad.double()).reshape(units_of(site), -1)
    return np.asarray(products_RC.sum(1).numpy())


def _output_weight(lowered: OnnxGraph, site: Site) -> str:
    """The constant that multiplies a site's features."""
    wanted = feature_name(site)
    for node in lowered.topological():
        read = [value.name for value in node.inputs if value is not None]
        if read[:1] == [wanted] and len(read) > 1 and lowered.constant(str(read[1])) is not None:
            return str(read[1])
    raise ModelError(f"no constant multiplies the features of {site.id}", "Leave this site out")

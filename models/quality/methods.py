"""Everything that is compared, by name: a function from a share of the operations to rewritten sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from models.quality.checkpoint import Checkpoint
from models.quality.ours import ALONE, Ours
from rewriter.rivals.budget import Reduced
from rewriter.rivals.fisher import fisher
from rewriter.rivals.late_drop import late_drop
from rewriter.rivals.magnitude import magnitude
from rewriter.rivals.mask_search import mask_search
from rewriter.rivals.plain_svd import plain_svd
from rewriter.runtimes.tvm.target import detect

Method = Callable[[float], Reduced | None]

MIX = "our best mix"
BASELINES = ("uniform magnitude", "plain SVD", "Kwon et al. 2022", "late attention dropped")


def methods(checkpoint: Checkpoint) -> dict[str, Method]:
    """The mix first, then each pass alone, then the baselines. Nothing is computed before it is asked for."""
    ours = Ours(checkpoint, detect("cpu", 1))
    by_id = {site.id: site for site in checkpoint.sites}
    tokens = checkpoint.tokens
    found: dict[str, Method] = {MIX: ours.mix}
    found |= {name: _alone(ours, name) for name in ALONE}
    found["uniform magnitude"] = lambda share: magnitude(by_id, share, tokens)
    found["plain SVD"] = lambda share: plain_svd(by_id, share, tokens)
    found["Kwon et al. 2022"] = _kwon(checkpoint, by_id)
    found["late attention dropped"] = lambda share: late_drop(by_id, share, tokens)
    return found


def _alone(ours: Ours, name: str) -> Method:
    return lambda share: ours.alone(name, share)


def _kwon(checkpoint: Checkpoint, by_id: Mapping[str, object]) -> Method:
    facts: list[tuple[dict[str, object], dict[str, object]]] = []

    def at(share: float) -> Reduced:
        if not facts:
            facts.append(fisher(checkpoint.graph, checkpoint.sites, checkpoint.labelled, checkpoint.loss))  # type: ignore[arg-type]
        return mask_search(by_id, *facts[0], share, checkpoint.tokens)  # type: ignore[arg-type]

    return at

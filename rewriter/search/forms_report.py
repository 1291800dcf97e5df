"""What a report says of forms of attention: those compared in ONNX Runtime, and what each artifact computes in."""

from __future__ import annotations

from typing import Any

from rewriter.core.forms import DECOMPOSED, FORMS, FUSED_SDPA, picked
from rewriter.core.option import Option
from rewriter.core.site import AttentionSite, Site
from rewriter.graph.onnx import OnnxGraph
from rewriter.search.forms import TriedForm
from rewriter.search.session import Session

_MICROSOFT = "com.microsoft"


def forms_entry(session: Session, variant: str) -> dict[str, Any] | None:
    """The forms tried for what is kept; where that is the original, those tried for the exact variant."""
    choice = session.forms.get(variant) or next(iter(session.forms.values()), None)
    if choice is None:
        return None
    tried = [
        {
            "option": str(Option.of(FUSED_SDPA, form=one.form)),
            "sites": list(one.sites),
            "latency_s": None if one.latency_s is None else one.latency_s.as_dict(),
            "ratio": one.ratio,
            "outcome": _outcome(one),
        }
        for one in choice.tried
    ]
    return {"tried": tried, "ratio": None if choice.ratio is None else choice.ratio.as_dict(), "kept": choice.kept}


def _outcome(one: TriedForm) -> str:
    if one.why_not:
        return one.why_not
    if one.chosen:
        return "fastest"
    return "the usual form" if one.form == DECOMPOSED else "another is as fast or faster"


def forms_of(site: Site | None) -> dict[str, str]:
    """The form of one attention in each artifact, empty for what is no attention any more."""
    if not isinstance(site, AttentionSite):
        return {}
    return {"model.so": picked(site.forms, "tvm"), "model.onnx": picked(site.forms, "onnxruntime")}


def priced_by_tvm(option: Option) -> bool:
    """Whether an option is one of the search's own: forms of other runtimes are chosen after it."""
    return option.name != FUSED_SDPA or option["form"] in FORMS["tvm"]


def written_otherwise(original: OnnxGraph, written: OnnxGraph) -> list[str]:
    """Notes on what a written model asks of its runtime that the original did not."""
    notes = []
    if written.opset != original.opset:
        notes.append(
            f"model.onnx is written at opset {written.opset} (the model has {original.opset}) for its Attention "
            "operators, which are faster; --passes without fused_sdpa keeps the opset"
        )
    own = {node.op_type for node in original.model.graph.all_nodes() if node.domain == _MICROSOFT}
    new = sorted({n.op_type for n in written.model.graph.all_nodes() if n.domain == _MICROSOFT} - own)
    if new:
        notes.append(
            f"model.onnx holds operators of ONNX Runtime ({', '.join(new)}), which are faster there; other runtimes "
            "may lack them; --passes without fused_sdpa avoids them"
        )
    return notes

"""The forms in which a runtime can compute an attention: one kernel, one operator, or written out step by step.

A form never changes what is computed. Sites list those that were chosen, one for each runtime that was asked; every
runtime takes the first of them that it has, or the form it takes by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FUSED_SDPA = "fused_sdpa"  # the pass whose options name a form
DECOMPOSED = "decomposed"
ATTENTION = "attention"  # the `Attention` of ONNX, from opset 23 on
MULTI_HEAD = "multi_head_attention"  # com.microsoft
PACKED = "packed_attention"  # com.microsoft `Attention`, which holds the three projections as well
GROUP_QUERY = "group_query_attention"  # com.microsoft
FLASH = "flash"
SDPA = "sdpa"

# By runtime, its own choice first.
FORMS: Mapping[str, tuple[str, ...]] = {
    "tvm": (FLASH, DECOMPOSED),
    "onnxruntime": (DECOMPOSED, ATTENTION, MULTI_HEAD, PACKED, GROUP_QUERY),
    "torch": (SDPA, DECOMPOSED),
}
EVERY_FORM = tuple(dict.fromkeys(form for known in FORMS.values() for form in known))
ATTENTION_OPSET = 23


def picked(chosen: Sequence[str], runtime: str) -> str:
    """The form in which a runtime computes an attention for which these were chosen."""
    known = FORMS[runtime]
    return next((form for form in chosen if form in known), known[0])

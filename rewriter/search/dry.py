"""``--dry-run``: what would be tried, without compiling, timing or writing anything."""

from __future__ import annotations

from itertools import chain
from typing import Any

from rewriter.core.option import Option
from rewriter.search.candidates import all_candidates, exact_options
from rewriter.search.forms import enumerated
from rewriter.search.session import Session


def foretell(session: Session) -> dict[str, Any]:
    """Per site the exact options and the calibrated combinations that would be priced, as text."""
    exact = exact_options(session.recognition, session.selection, session.target)
    effort = session.options.effort
    found = all_candidates(session.recognition, session.selection, session.target, effort) if session.splits else {}
    sites = [
        {
            "id": site.id,
            "state": site.state.value,
            "exact": [str(option) for option in exact.get(site.id, ())],
            "forms": {
                runtime: [str(option) for option in enumerated(session, site, runtime)]
                for runtime in ("tvm", "onnxruntime")
            },
            "combinations": [" ".join(map(str, options)) or "unchanged" for options in found.get(site.id, ())],
        }
        for site in session.recognition.sites
    ]
    return {"dry_run": True, "sites": sites, "notes": list(session.notes)}


def dry_summary(found: dict[str, Any]) -> str:
    """A line per site."""
    lines = ["", "Nothing was compiled, timed or written. This would be tried:"]
    for site in found["sites"]:
        count = len(site["combinations"])
        exact = ", ".join(option.partition("@")[0] for option in site["exact"]) or "no exact rewrite"
        calibrated = f"{count - 1} calibrated combinations" if count > 1 else "no calibrated rewrite"
        lines.append(f"  {site['id']} ({site['state']}): {exact}; {calibrated}{_forms(site)}")
    return "\n".join([*lines, *(f"  note: {note}" for note in found["notes"])])


def _forms(site: dict[str, Any]) -> str:
    forms = [Option.parse(text) for text in dict.fromkeys(chain.from_iterable(site.get("forms", {}).values()))]
    return "; forms " + ", ".join(str(option["form"]) for option in forms) if forms else ""

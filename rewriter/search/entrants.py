"""Who takes part in the finals: variants built for engines, under names that say both."""

from __future__ import annotations

from pathlib import Path

from rewriter.core.errors import UserError
from rewriter.core.forms import DECOMPOSED
from rewriter.measurement.bench import Subject, save_feeds
from rewriter.runtimes.standard import AS_CHOSEN, to_standard
from rewriter.search.caches import converted
from rewriter.search.engines import Engine
from rewriter.search.selection import PRECISION
from rewriter.search.session import ONNXRUNTIME, Session
from rewriter.search.variant import Variant

ORIGINAL = "original"
RIVAL, RIVAL_INT8 = "onnxruntime", "onnxruntime_int8"
_RIVALS = {"onnxruntime": RIVAL, "onnxruntime-int8": RIVAL_INT8}


def _form(runtime: str) -> str:
    """Forms were chosen for ONNX Runtime; other readers of standard operators get attentions written out."""
    return AS_CHOSEN if runtime == ONNXRUNTIME else DECOMPOSED


def entry_name(variant: str, engine: str) -> str:
    """The name of a variant's entry in an engine that is not TVM."""
    rival = _RIVALS.get(engine) if variant == ORIGINAL else None
    return rival or f"{variant}@{engine}"


class Entrants:
    """Subjects by entry as they are built; what cannot be built leaves a note.

    `originals` holds the engines by the names of their entries of the original.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.subjects: dict[str, Subject] = {}
        self.originals: dict[str, Engine] = {}
        self.notes: list[str] = []
        self._feeds = save_feeds(session.workload.feeds, session.folder / "feeds")

    def enter(self, name: str, runtime: str, variant: Variant, reads: str = "composites") -> bool:
        """Build a variant for a runtime; whether that worked."""
        try:
            graph = variant.graph if reads == "composites" else to_standard(variant.graph, _form(runtime))
            if variant.name == ORIGINAL and reads == "standard":
                graph = self.session.graph
            artifact = self.session.build(graph, name.replace("@", "-").replace(" ", "-"), runtime)
        except UserError as problem:
            self.notes.append(f"{name} could not be built and takes no part: {problem}")
            return False
        self.subjects[name] = Subject(name, runtime, artifact, self._own_feeds(variant))
        return True

    def enter_in(self, engine: Engine, variant: Variant) -> bool:
        """Build a variant for an engine that is not TVM, once; False also where the two do not go together.

        What rounds is given graphs that do not round yet, and no caches of other sizes than its samples have.
        """
        name = entry_name(variant.name, engine.key)
        if name in self.subjects:
            return True
        rounded = any(option.name == PRECISION for option in variant.plan.options)
        if engine.rounds and (rounded or variant.caches):
            return False
        entered = self.enter(name, engine.runtime, variant, engine.reads)
        if entered and variant.name == ORIGINAL:
            self.originals[name] = engine
        return entered

    def drop(self, name: str, why: str) -> None:
        """Take an entry out again."""
        self.subjects.pop(name, None)
        self.notes.append(why)

    def _own_feeds(self, variant: Variant) -> tuple[Path, ...]:
        """The inputs, with caches of the variant's own sizes where it changed them."""
        if not variant.caches:
            return self._feeds
        feeds = [converted(one, variant.caches) for one in self.session.workload.feeds]
        return save_feeds(feeds, self.session.folder / f"feeds-{variant.name}")

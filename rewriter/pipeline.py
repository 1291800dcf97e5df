"""The flow: load, recognise, exact variant, search, finals, proof, artifacts. One noun in, one noun out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.core.errors import OutputError
from rewriter.core.options import Options
from rewriter.core.progress import Listener, Progress, Silent
from rewriter.report.markdown import summary
from rewriter.report.output import check_output, writing
from rewriter.search.decision import Outcome, decide_between, exact_only, replay, with_data
from rewriter.search.dry import dry_summary, foretell
from rewriter.search.lengths import Served, serve_lengths
from rewriter.search.lengths_race import race_lengths
from rewriter.search.opening import open_session
from rewriter.search.publish import publish
from rewriter.search.session import Session, default_cache, scratch

# Guesses in seconds, only for saying how long is left.
_STAGES_S = {"load": 2.0, "recognise": 15.0, "exact": 25.0, "write": 5.0}
_REPLAY_S = {"load": 2.0, "recognise": 15.0, "finals": 40.0, "write": 5.0}
_SEARCH_S = {"reference": 15.0, "statistics": 20.0, "costs": 60.0, "scale": 40.0, "assembly": 100.0}
_PROOF_S = {"finals": 50.0, "proof": 60.0, "lengths": 40.0, "requests": 30.0}


@dataclass(frozen=True)
class Result:
    """What a run found: the content of report.json, where the artifacts lie, and whether it was cut short."""

    report: dict[str, Any]
    folder: Path | None
    interrupted: bool = False

    @property
    def kept_original(self) -> bool:
        """Whether nothing was both faster and good enough."""
        return bool(self.report.get("best", {}).get("kept_original"))

    @property
    def summary(self) -> str:
        """A few lines for people."""
        return dry_summary(self.report) if self.report.get("dry_run") else summary(self.report)

    def save(self, folder: str | Path) -> Path:
        """Copy the artifacts to another folder. Raises `OutputError` if there are none, or the place is taken."""
        if self.folder is None:
            raise OutputError("a dry run has nothing to save", "Run without dry_run")
        place = Path(folder)
        check_output(place)
        with writing(place) as fresh:
            shutil.copytree(self.folder, fresh, dirs_exist_ok=True)
        return place


def optimize(model: Path, options: Options, listener: Listener | None = None) -> Result:
    """Run everything. Raises `UserError` for bad input; after an interruption the best so far is written."""
    progress = Progress(listener or Silent())
    folder = options.output or Path(f"{model.stem}-optimized")
    if not options.dry_run:
        check_output(folder)
    progress.expect(_expected(options))
    with (
        scratch(options.cache_dir or default_cache()) as place,
        _logged(place / "optimize.log") as log,
        open_session(model, options, progress, place) as session,
    ):
        if options.dry_run:
            return Result(foretell(session), None)
        session.log = log
        outcome = _outcome(session)
        outcome, served = _served(session, outcome)
        return Result(publish(session, outcome, folder, served), folder, outcome.interrupted)


def _served(session: Session, outcome: Outcome) -> tuple[Outcome, Served | None]:
    """What was built for the lengths of requests; whoever interrupts that gets the result without."""
    if outcome.interrupted:
        return outcome, None
    try:
        served = serve_lengths(session, outcome)
    except KeyboardInterrupt:
        session.notes.append("interrupted while sizes were chosen: model.so has the one that was optimised for")
        return outcome.cut_short(), None
    try:
        return outcome, None if served is None else race_lengths(session, outcome, served)
    except KeyboardInterrupt:
        return outcome.cut_short(), served


def _outcome(session: Session) -> Outcome:
    """From the exact variant on there is something to write, whatever happens."""
    if session.options.plan is not None:
        return replay(session, session.options.plan)
    outcome = exact_only(session)
    if session.splits is None:
        return outcome
    try:
        return decide_between(session, outcome, with_data(session, outcome))
    except KeyboardInterrupt:
        return outcome.cut_short()


def _expected(options: Options) -> dict[str, float]:
    if options.plan is not None:
        return _REPLAY_S
    return _STAGES_S | (_SEARCH_S | _PROOF_S if options.data is not None else {})


@contextmanager
def _logged(path: Path) -> Iterator[Path]:
    """Everything that is logged during a run goes to a file."""
    logger = logging.getLogger("rewriter")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield path
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()

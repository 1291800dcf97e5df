"""``python -m rewriter.benchmark works``: every work of the catalogue against its peers, resumable, as Markdown.

Records are kept as they are made; a run that was stopped goes on with the works that have none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rewriter.benchmark.work_race import WorkRaces
from rewriter.benchmark.work_table import table
from rewriter.benchmark.works import WORKS
from rewriter.core.errors import OptionError


def main(arguments: list[str]) -> int:
    """Race what was asked for and print the table of all records there are. Raises `UserError`."""
    parsed = _parsed(arguments)
    works = [work for work in WORKS if not parsed.work or work.name.startswith(tuple(parsed.work))]
    if not works:
        raise OptionError(f"no work is called {parsed.work[0]!r}", "--list names them")
    if parsed.list:
        sys.stdout.write("".join(f"{work.name}\n" for work in works))
        return 0
    threads = _threads(parsed.threads)
    parsed.results.mkdir(parents=True, exist_ok=True)
    races = WorkRaces(parsed.models, parsed.results, parsed.budget, _say)
    for work in [] if parsed.table else works:
        if parsed.build:
            races.build(work, threads)
        else:
            races.run(work, threads, parsed.again)
    found = [(work, record) for work in works for count in threads if (record := races.record(work, count))]
    sys.stdout.write(table(found, races.code) + "\n")
    return 0


def _parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rewriter.benchmark works", description=__doc__)
    parser.add_argument("--work", action="append", default=[], metavar="NAME", help="only works whose name begins so")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, by commas (default 1,2)")
    parser.add_argument("--models", type=Path, default=Path("build"), help="folder with minilm/, decoder/, vit/")
    parser.add_argument("--results", type=Path, default=Path("build/bench"), help="where records are kept")
    parser.add_argument("--budget", type=float, default=12.0, help="seconds of racing per work and number of threads")
    parser.add_argument("--again", action="store_true", help="race works that have a record already")
    parser.add_argument("--build", action="store_true", help="only build what would be raced")
    parser.add_argument("--list", action="store_true", help="only name the works")
    parser.add_argument("--table", action="store_true", help="only draw the table of the records there are")
    return parser.parse_args(arguments)


def _threads(text: str) -> tuple[int, ...]:
    counts = text.split(",")
    if not all(count.isdigit() and int(count) for count in counts):
        raise OptionError(f"--threads {text!r} is no list of numbers", "Write it like --threads 1,2")
    return tuple(int(count) for count in counts)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()

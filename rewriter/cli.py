"""The command line: the only place that prints, parses arguments, reads the environment, or exits.

Heavy packages are imported inside the commands, so that `optimize --help` stays instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rewriter.core.errors import ExitCode, OptionError, UserError
from rewriter.core.options import Options, parse_duration_s, parse_shape

_COMMANDS = ("inspect", "scan", "profile", "verify", "doctor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `optimize`; returns the exit code (see `rewriter.core.errors.ExitCode`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _quiet_libraries()
    try:
        if words and words[0] in _COMMANDS:
            return _command_parsers()[words[0]](words[1:])
        return _optimize(words)
    except UserError as error:
        print(f"optimize: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("optimize: interrupted before anything could be written.", file=sys.stderr)
        return int(ExitCode.INTERRUPTED)
    except OSError as error:
        print(f"optimize: {_os_error(error)}", file=sys.stderr)
        return int(ExitCode.BAD_INPUT)
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug becomes one sentence and a file
        return _internal_error(error)


def _os_error(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    advice = "Free some room and run again; finished measurements are kept" if error.errno == 28 else "Check the path"
    return f"the system refused: {error.strerror or error}{where}. {advice}."


def _internal_error(error: BaseException) -> int:
    path = Path(f"optimize-crash-{os.getpid()}.txt")
    text = "".join(traceback.format_exception(error))
    try:
        path.write_text(text)
        where = str(path)
    except OSError:
        # The disk may be what is wrong.
        path.unlink(missing_ok=True)
        print(text, file=sys.stderr)
        where = "the lines above"
    print(f"optimize: internal error: {type(error).__name__}: {error}. Please report it with {where}.", file=sys.stderr)
    return int(ExitCode.INTERNAL)


def _quiet_libraries() -> None:
    logging.getLogger("rewriter").setLevel(logging.INFO)
    for name in ("onnx_ir", "onnxscript", "tvm"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _optimize(words: Sequence[str]) -> int:
    parser = _optimize_parser()
    if not words:
        parser.print_usage(sys.stderr)
        print("optimize: name a model: optimize model.onnx --data data.npz -o folder", file=sys.stderr)
        return int(ExitCode.BAD_INPUT)
    parsed = parser.parse_args(_with_config(parser, words))
    options = _options(parsed)
    if options.compile_only:
        return _compile_only(parsed, options)
    from rewriter.cli_progress import ProgressLines
    from rewriter.pipeline import optimize

    with ProgressLines(sys.stderr) as listener:
        result = optimize(parsed.model, options, listener=listener)
    if parsed.json:
        print(json.dumps(result.report, indent=2))
    else:
        print(result.summary)
    if result.interrupted:
        return int(ExitCode.INTERRUPTED)
    if parsed.fail_if_not_faster and result.kept_original:
        return int(ExitCode.ANSWER_IS_NO)
    return int(ExitCode.DONE)


def _compile_only(parsed: argparse.Namespace, options: Options) -> int:
    from rewriter.cli_progress import ProgressLines
    from rewriter.compiling import compile_only

    with ProgressLines(sys.stderr) as listener:
        compiled = compile_only(parsed.model, options, listener)
    print(json.dumps(compiled.report, indent=2) if parsed.json else compiled.summary)
    return int(ExitCode.DONE)


def _optimize_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="optimize",
        description="Make a Transformer faster on this machine, and prove that it still does its job.",
        epilog="Also: optimize inspect MODEL | scan MODEL | profile DIR | verify DIR --against MODEL | doctor. "
        "Exit codes: 0 done, 1 internal error, 2 bad input, 3 not faster (with --fail-if-not-faster), 130 interrupted.",
    )
    parser.add_argument("model", type=Path, help="an ONNX file, or a folder with model.onnx")
    for option in dataclasses.fields(Options):
        _add_flag(parser, option)
    parser.add_argument("--config", type=Path, help="a JSON file with the same options by name")
    parser.add_argument("--json", action="store_true", help="print report.json instead of a summary")
    parser.add_argument("--fail-if-not-faster", action="store_true", help="exit with 3 when the original was kept")
    return parser


class _Parser(argparse.ArgumentParser):
    """Usage errors are bad input like any other: one sentence and exit code 2."""

    def error(self, message: str) -> Any:
        raise OptionError(message, f"See {self.prog} --help")


def _add_flag(parser: argparse.ArgumentParser, option: dataclasses.Field[Any]) -> None:
    metadata = option.metadata
    flags = [metadata["flag"]] if "flag" in metadata else ["--" + option.name.replace("_", "-")]
    flags += [metadata["long"]] if "long" in metadata else []
    arguments: dict[str, Any] = {"dest": option.name, "help": metadata["help"], "default": None}
    if str(option.type) == "bool":
        parser.add_argument(*flags, action="store_const", const=True, **arguments)
        return
    if option.name == "shapes":
        parser.add_argument(*flags, action="append", metavar="NAME=SIZES", **arguments)
        return
    if "choices" in metadata:
        parser.add_argument(*flags, choices=metadata["choices"], **arguments)
        return
    parser.add_argument(*flags, metavar=option.name.removesuffix("_s").upper(), **arguments)


def _with_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Options of --config first, so that the command line overrides them."""
    known = argparse.ArgumentParser(add_help=False)
    known.add_argument("--config", type=Path)
    path = known.parse_known_args(list(words))[0].config
    if path is None:
        return list(words)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read --config {path}: {error}", "Give a JSON object of options") from None
    if not isinstance(content, dict):
        raise OptionError(f"--config {path} is not a JSON object", 'Write {"max-drop": "1%", "effort": "quick"}')
    front: list[str] = []
    for name, value in content.items():
        flag = "-o" if name == "output" else "--" + str(name).replace("_", "-")
        for item in value if isinstance(value, list) else [value]:
            front += [flag] if item is True else [flag, str(item)]
    return [*front, *words]


def _options(parsed: argparse.Namespace) -> Options:
    values: dict[str, Any] = {}
    for option in dataclasses.fields(Options):
        text = getattr(parsed, option.name)
        if text is not None:
            values[option.name] = _convert(option, text)
    return Options(**values)


def _convert(option: dataclasses.Field[Any], text: Any) -> Any:
    if option.name == "shapes":
        return dict(parse_shape(item) for item in text)
    if option.name == "max_time_s":
        return parse_duration_s(text)
    if "parse" in option.metadata:
        return option.metadata["parse"](text)
    if "Path" in str(option.type):
        return Path(text)
    if str(option.type) in ("int", "int | None"):
        return _whole_number(option.name, text)
    return text


def _whole_number(name: str, text: str) -> int:
    if not text.lstrip("-").isdigit() or (name == "threads" and int(text) < 1):
        raise OptionError(f"--{name} {text!r} is not a whole number{' above zero' if name == 'threads' else ''}")
    return int(text)


def _command_parsers() -> dict[str, Callable[[Sequence[str]], int]]:
    return {"inspect": _inspect, "scan": _scan, "profile": _profile, "verify": _verify, "doctor": _doctor}


def _inspect(words: Sequence[str]) -> int:
    parser = _Parser(
        prog="optimize inspect", description="What is in a model: its attentions and what can be rewritten."
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parsed = parser.parse_args(list(words))
    from rewriter.inspection import inspect
    from rewriter.report.inspection_page import inspection_page

    found = inspect(parsed.model)
    print(json.dumps(found, indent=2) if parsed.json else inspection_page(found))
    return int(ExitCode.DONE)


def _scan(words: Sequence[str]) -> int:
    parser = _Parser(
        prog="optimize scan", description="Where the time goes, and what each class of rewrite could gain."
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--shape", action="append", default=[], metavar="NAME=SIZES")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parsed = parser.parse_args(list(words))
    from rewriter.report.tables import scan_table
    from rewriter.scanning import scan

    options = Options(
        target=parsed.target,
        shapes=dict(parse_shape(item) for item in parsed.shape),
        threads=_whole_number("threads", parsed.threads),
    )
    found = scan(parsed.model, options)
    print(json.dumps(found, indent=2) if parsed.json else scan_table(found))
    return int(ExitCode.DONE)


def _profile(words: Sequence[str]) -> int:
    parser = _Parser(
        prog="optimize profile", description="Which kernels take the time, and how far each is from what is possible."
    )
    parser.add_argument("path", type=Path, help="a folder that optimize wrote, or a model, which is compiled first")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--shape", action="append", default=[], metavar="NAME=SIZES")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--runs", default="20")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parsed = parser.parse_args(list(words))
    from rewriter.profiling import profile
    from rewriter.report.tables import profile_table

    options = Options(
        target=parsed.target,
        shapes=dict(parse_shape(item) for item in parsed.shape),
        threads=_whole_number("threads", parsed.threads),
    )
    found = profile(parsed.path, options, max(1, _whole_number("runs", parsed.runs)))
    print(json.dumps(found, indent=2) if parsed.json else profile_table(found))
    return int(ExitCode.DONE)


def _verify(words: Sequence[str]) -> int:
    parser = _Parser(
        prog="optimize verify", description="Compare a folder that optimize wrote with the original model."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, required=True, metavar="MODEL")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parsed = parser.parse_args(list(words))
    from rewriter.report.tables import verification_table
    from rewriter.verification import verify

    found = verify(parsed.folder, parsed.against, parsed.data)
    print(json.dumps(found, indent=2) if parsed.json else verification_table(found))
    return int(ExitCode.DONE if found["ok"] else ExitCode.ANSWER_IS_NO)


def _doctor(words: Sequence[str]) -> int:
    parser = _Parser(prog="optimize doctor", description="Is everything here that the optimizer needs?")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parsed = parser.parse_args(list(words))
    from rewriter.doctor import examine
    from rewriter.report.tables import doctor_table
    from rewriter.search.session import default_cache

    found = examine(default_cache())
    print(json.dumps(found, indent=2) if parsed.json else doctor_table(found))
    return int(ExitCode.DONE if found["ok"] else ExitCode.BAD_INPUT)


if __name__ == "__main__":
    sys.exit(main())

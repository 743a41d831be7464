"""The command line: parse, call one function of `commands`, print what it returns.

Exit codes: 0 done, 1 the work failed (a check did not hold), 2 the input or the call is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from .cli_logs import logs_keywords
from .cli_options import add_up, build_parser, chosen_options, log_choices
from .cli_tuning import tune_keywords
from .errors import GemmifyError
from .export import check_destination
from .report import Progress, emit

INTERRUPTED = 130


def _execute(command: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Call the verb's work with the arguments that it takes."""
    result: dict[str, Any]
    if args.verb == "list":
        result = command.execute()
    elif args.verb == "inspect":
        result = command.execute(args.model, dict(args.shape or []) or None)
    elif args.verb == "explain":
        result = command.execute(args.model, args.layer, chosen_options(args) | {"threads": args.threads})
    elif args.verb == "plan":
        result = command.execute(args.model, args.output, chosen_options(args) | {"threads": args.threads})
    elif args.verb == "compile":
        with Progress() as progress:
            options = chosen_options(args) | {"threads": args.threads}
            result = command.execute(args.model, args.output, options, progress)
    elif args.verb == "run":
        options = chosen_options(args)
        keywords = {"seed": args.seed, "output": args.output, "repeat": args.repeat, "threads": args.threads}
        result = command.execute(args.model, args.input, options=options, **keywords)
    elif args.verb == "verify":
        keywords = {
            "seed": args.seed,
            "reference": args.reference,
            "tolerance": args.tolerance,
            "threads": args.threads,
        }
        result = command.execute(args.model, args.library, options=chosen_options(args), **keywords)
    elif args.verb == "logs":
        result = command.execute(args.action, **logs_keywords(args))
    elif args.verb == "tune":
        result = command.execute(args.model, **tune_keywords(args))
    elif args.verb == "report":
        keywords = {"shapes": dict(args.shape or []) or None, "limits": not args.no_bounds}
        result = command.execute(args.log, args.model, args.output, **keywords)
    else:
        names = (
            "layer",
            "lowering",
            "quick",
            "peers",
            "target",
            "threads",
            "repeat",
            "picture",
            "max_error",
            "tuning_minutes",
            "bundle",
            "imported",
            "minutes",
            "dtype",
        )
        keywords = {name: getattr(args, name) for name in names} | {"shapes": dict(args.shape or []) or None}
        keywords |= log_choices(args)
        if args.lowering:
            # A suite takes several keys, and is measured with each of them.
            several = all(isinstance(value, str) for value in args.lowering) and args.suite is not None
            keywords["lowering"] = ",".join(args.lowering) if several else add_up(args.lowering)
        result = command.execute(args.model, args.suite, **keywords)
    return result


def _check_streams() -> None:
    """GemmifyError where the standard output is closed: before minutes of work, not after. A closed standard error is
    replaced, so that no file of ours takes its descriptor."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = sys.stderr  # this process prints nothing more on it
        raise GemmifyError("the standard output is closed; send it to a file, or to /dev/null")


def _parse(words: list[str]) -> argparse.Namespace:
    with _printing():  # --help and --version print here, and end the program
        return build_parser().parse_args(words)


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """Flush the standard output at the end of the block, whatever ends it; GemmifyError where it cannot be written."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        _mute()
        raise GemmifyError(
            f"cannot write to the standard output: {err.strerror or err}; free space or use a pipe"
        ) from err


def _mute() -> None:
    """Let what is still to be written vanish: the interpreter would complain about it at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if threading.current_thread() is threading.main_thread():
        # A killed compilation cleans up as an interrupted one does.
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        _check_streams()
        args = _parse(words)
        if getattr(args, "json", None) not in (None, "-"):
            check_destination(args.json)  # before minutes of work, not after
        command = importlib.import_module(f".commands.{args.verb}", __package__)
        result = _execute(command, args)
        with _printing():
            emit(result, args.json, command.show_markdown if getattr(args, "markdown", False) else command.show)
        if hasattr(command, "check"):
            command.check(result)
        return 0
    except BrokenPipeError:
        # The reader of a pipe has seen enough; the interpreter must not complain about it at exit either.
        _mute()
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug)
    except GemmifyError as err:
        return _fail(str(err), err.exit_code, debug)
    except Exception as err:
        said = (str(err).strip().splitlines() or [""])[-1]
        hint = "" if debug else "; this is a fault of gemmify: run again with --debug for the traceback"
        return _fail(f"{type(err).__name__}: {said}{hint}", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):  # a full standard error: the exit code still tells
        print("gemmify: error: " + " ".join(message.split()), file=sys.stderr)
    return code

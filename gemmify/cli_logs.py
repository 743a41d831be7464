"""What `gemmify logs` takes."""

from __future__ import annotations

import argparse
from typing import Any

DEFAULT = "tuning_logs"
_PATH = f"log files, or folders of them (default: {DEFAULT})"


def logs_options(logs: argparse.ArgumentParser, parser_class: type[argparse.ArgumentParser], model: str) -> None:
    """Add the actions of `gemmify logs` to its parser; `model` is the help of a MODEL."""
    actions = logs.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=parser_class)

    def action(name: str, summary: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=summary, description=summary)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        made.add_argument("--json", metavar="FILE", help='write the result as JSON too ("-": on the standard output)')
        return made

    check = action("check", "read every line; exit code 1 where one is damaged")
    check.add_argument("paths", nargs="*", metavar="PATH", help=_PATH)
    check.add_argument("--repair", action="store_true", help="move what is damaged to FILE.damaged")

    stats = action("stats", "count records by outcome, machine, version and lowering")
    stats.add_argument("paths", nargs="*", metavar="PATH", help=_PATH)

    best = action("best", "what is best for each task, against its default")
    best.add_argument("model", nargs="?", metavar="MODEL", help=f"the layers of this network only; {model}")
    best.add_argument("--task", metavar="TEXT", help="tasks whose title holds this, e.g. '3x3' or '-> 512'")
    best.add_argument("--logs", action="append", metavar="PATH", help=f"{_PATH}; add up")

    merge = action("merge", "write the records of several logs into one file: each once, by time")
    merge.add_argument("paths", nargs="+", metavar="PATH", help="log files, or folders of them")
    merge.add_argument(
        "-o", "--output", required=True, metavar="FILE.jsonl", help="may be one of the logs that it reads"
    )
    merge.add_argument(
        "--top", type=int, metavar="N", help="keep of each task the default, the N fastest trials and the latest finals"
    )

    import_ = action("import", "add what a bundle measured on another machine")
    import_.add_argument("results", metavar="results.jsonl", help="what run.py of the bundle wrote")
    import_.add_argument("--logs", default=DEFAULT, metavar="DIR", help=f"where the log is kept (default: {DEFAULT})")


def logs_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `commands.logs.execute`, beside the action."""
    return {name: value for name, value in vars(args).items() if name not in ("verb", "action", "json", "debug")}

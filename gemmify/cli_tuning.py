"""What `gemmify tune` takes."""

from __future__ import annotations

import argparse
from typing import Any

from .durations import parse_duration
from .errors import InputError

DEFAULT_BUDGET = "15m"


def duration(text: str) -> float:
    """`parse_duration` for the command line."""
    try:
        return parse_duration(text)
    except InputError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def tune_options(parser: argparse.ArgumentParser, names: Any, positive: Any) -> None:
    """Add the options of `tune` beside those that it shares with `compile`; `names` and `positive` read a list of
    names and a whole number."""
    add = parser.add_argument
    add("--budget", type=duration, default=DEFAULT_BUDGET, metavar="TIME", help="20m, 90s, 1h; default 15m, all of it")
    add("--trials", type=positive, metavar="N", help="at most N trials a layer in this run")
    add("--layer", action="append", default=[], metavar="NAME", help="these layers only; a name or a pattern; add up")
    add("--lowerings", type=names, metavar="KEY,...", help="only these; default: every one that applies")
    add("--logs", default="tuning_logs", metavar="DIR", help="where the log is kept (default: tuning_logs)")
    add("--from-nothing", action="store_true", help="take nothing from any log as a start")
    add("--seed", type=int, default=0, help="of the search and of the inputs")
    add("--tracker", metavar="HOST:PORT", help="measure on the devices of a TVM RPC tracker")
    add("--key", metavar="KEY", help="of the devices at the tracker")
    add("--workers", type=positive, metavar="N", help="devices to use at once (default 1)")
    add("--bundle", metavar="OUT.tar", help="measure nothing: pack candidates for a machine that cannot be reached")
    add("--dtype", metavar="DTYPE", help="convert networks of float32 to float16 or bfloat16, as compile does")
    add("--quiet", action="store_true", help="print the result only")


def tune_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `tuning.tune.tune` that the user gave."""
    same = (
        "target",
        "budget",
        "trials",
        "lowerings",
        "logs",
        "seed",
        "tracker",
        "key",
        "workers",
        "bundle",
        "quiet",
        "dtype",
    )
    found = {name: getattr(args, name) for name in (*same, "threads", "from_nothing", "max_workspace", "max_error")}
    found["layers"] = tuple(args.layer)
    found["shapes"] = dict(args.shape) if args.shape else None
    return {name: value for name, value in found.items() if value is not None}

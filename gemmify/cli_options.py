"""What the command line takes: the parser of every verb, and its arguments as keywords of what does the work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .accuracy import DEFAULT_MAX_ERROR, parse_error
from .cli_logs import logs_options
from .cli_tuning import tune_options
from .errors import InputError
from .sizes import parse_size

_PEERS = "onnxruntime, openvino, torch, metaschedule (TVM's own tuner)"
_MODEL = "an ONNX file, a .pt2 file, or a name from the zoo (see `gemmify list`)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse drops the error of a full disk


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, sizes = text.rpartition("=")
    try:
        shape = tuple(int(s) for s in sizes.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not equals or not name or not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SIZES, e.g. data=1,3,224,224")
    return name, shape


def _lowering(text: str) -> str | dict[str, str]:
    if "=" not in text:
        return text
    chosen: dict[str, str] = {}
    for pair in text.split(","):
        name, equals, key = pair.rpartition("=")
        if not equals or not name or not key:
            raise argparse.ArgumentTypeError(f"{pair!r} is not LAYER=KEY; write KEY, or LAYER=KEY,LAYER=KEY")
        if chosen.setdefault(name, key) != key:
            raise argparse.ArgumentTypeError(f"layer {name} is given both {chosen[name]} and {key}; leave one out")
    return chosen


def _bench_lowering(text: str) -> str | dict[str, str]:
    return _lowering(text) if "=" in text else ",".join(_names(text))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME,NAME,...")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def size(text: str) -> int:
    try:
        return parse_size(text)
    except InputError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def error_bound(text: str) -> float:
    try:
        return parse_error(text)
    except InputError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def add_up(given: Sequence[str | dict[str, str]]) -> str | dict[str, str]:
    """Several --lowering as one; "*" holds the key that goes with LAYER=KEYs. InputError where two contradict."""
    found: dict[str, str] = {}
    for value in given:
        for layer, key in ({"*": value} if isinstance(value, str) else value).items():
            if found.setdefault(layer, key) != key:
                whose = "every layer" if layer == "*" else f"layer {layer}"
                raise InputError(f"--lowering gives {whose} both {found[layer]} and {key}; leave one out")
    return found["*"] if set(found) == {"*"} else found


def _max_error_option(parser: argparse.ArgumentParser) -> None:
    said = f"expected error of a layer at most, relative to its largest output (default {DEFAULT_MAX_ERROR:g})"
    parser.add_argument("--max-error", type=error_bound, metavar="X", help=said)


_DTYPE = "convert a network of float32 to float16 or bfloat16, inputs and outputs too"


def _log_options(parser: argparse.ArgumentParser) -> None:
    logs = "tuning logs, a folder or a .jsonl file (default: tuning_logs, then the shipped ones); several add up"
    parser.add_argument("--logs", action="append", metavar="DIR", help=logs)
    parser.add_argument("--no-logs", action="store_true", help="use no tuning log: the model of cost decides")
    parser.add_argument("--frozen", action="store_true", help="fail where no tuning record covers a layer")


def log_choices(args: argparse.Namespace) -> dict[str, Any]:
    """`logs` and `frozen` of `gemmify.compile` as the user gave them; InputError where they contradict."""
    if args.logs and args.no_logs:
        raise InputError(f"both --logs {args.logs[0]} and --no-logs were given; leave one out")
    logs = False if args.no_logs else args.logs
    given = {"logs": logs, "frozen": args.frozen or None}
    return {name: value for name, value in given.items() if value is not None}


def _compile_options(parser: argparse.ArgumentParser, dump: bool = True) -> None:
    target = '"llvm" is this machine; else e.g. "llvm -mcpu=x86-64-v3", "cuda -arch=sm_90", "cuda -arch=sm_80,sm_90"'
    parser.add_argument("--target", help=target)
    lowering = "of every layer, or of the named ones; default: auto; several add up"
    parser.add_argument("--lowering", type=_lowering, action="append", metavar="KEY|LAYER=KEY,...", help=lowering)
    parser.add_argument("--strict", action="store_true", help="fail where the lowering does not fit a layer")
    parser.add_argument("--shape", type=_shape, action="append", metavar="INPUT=SIZES", help="fix an input's shape")
    parser.add_argument("--dtype", metavar="DTYPE", help=_DTYPE)
    parser.add_argument(
        "--max-workspace", type=size, metavar="BYTES", help="scratch memory of a layer at most, e.g. 65536 or 1MiB"
    )
    _max_error_option(parser)
    parser.add_argument("--plan", metavar="FILE", help="a plan, as `gemmify plan` writes it: layer -> lowering")
    _log_options(parser)
    if dump:
        graph = "of a GPU: repeat a recorded graph of launches at each run"
        parser.add_argument("--cuda-graph", action="store_true", help=graph)
        parser.add_argument("--dump", metavar="DIR", help="write the module after each stage there")


def _bench_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="*", metavar="MODEL", help=_MODEL)
    parser.add_argument("--suite", metavar="NAME", help="instead of models: layers, gemm, lowerings or gpu")
    parser.add_argument("--layer", metavar="NAME", help="of the suite, this name or pattern, e.g. 'vgg16:*'")
    parser.add_argument("--quick", action="store_true", help="of the suite, few shapes and few runs")
    parser.add_argument("--target", help="default: this machine")
    parser.add_argument("--peers", type=_names, default=(), metavar="NAME,...", help=_PEERS)
    minutes = "wall time that the peer metaschedule tunes the model for (default: 15)"
    parser.add_argument("--tuning-minutes", type=float, metavar="N", help=minutes)
    parser.add_argument("--repeat", type=_positive, metavar="N", help="timed runs (default: 40, of a suite 15)")
    parser.add_argument("--shape", type=_shape, action="append", metavar="INPUT=SIZES", help="fix an input's shape")
    lowering = "default: auto for models; for a suite plain (pointwise, depthwise, dense, else implicit-gemm) or all"
    parser.add_argument(
        "--lowering", type=_bench_lowering, action="append", metavar="KEY,...|LAYER=KEY,...", help=lowering
    )
    parser.add_argument("--dtype", metavar="DTYPE", help=_DTYPE)
    _max_error_option(parser)
    _log_options(parser)
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    bundle = "of the suite gpu: write a tar to be run where the GPU is, with run.py; needs no GPU"
    parser.add_argument("--bundle", metavar="OUT.tar", help=bundle)
    parser.add_argument("--import", dest="imported", metavar="FILE", help="show what run.py of a bundle wrote")
    minutes = "of the suite gpu: wall time of building and measuring (default: 8)"
    parser.add_argument("--minutes", type=float, metavar="N", help=minutes)
    picture = "of the suite lowerings, time against workspace; needs the extra `report`"
    parser.add_argument("--picture", metavar="FILE.svg|.png", help=picture)


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `gemmify.compile` that the user gave."""
    options = {
        "target": args.target,
        "lowering": add_up(args.lowering) if args.lowering else None,
        "strict": args.strict or None,
        "shapes": dict(args.shape) if args.shape else None,
        "dtype": args.dtype,
        "max_workspace": args.max_workspace,
        "max_error": args.max_error,
        "plan": args.plan,
        "cuda_graph": getattr(args, "cuda_graph", None) or None,
        "dump_dir": getattr(args, "dump", None),
    }
    return {name: value for name, value in options.items() if value is not None} | log_choices(args)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="gemmify", description="Compile a network: every layer becomes the GEMM that suits it.")
    parser.add_argument("--version", action="version", version=f"gemmify {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, summary: str, *, tabular: bool = True, threads: bool = True) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=summary, description=summary)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if tabular:
            made.add_argument(
                "--json", metavar="FILE", help='write the result as JSON too ("-": on the standard output)'
            )
        if threads:
            made.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: physical cores)")
        return made

    list_ = verb("list", "the lowerings and the networks of the zoo", threads=False)
    list_.add_argument("--markdown", action="store_true", help="print the lowerings as a Markdown table")

    inspect = verb("inspect", "the layers of a model, or of a compiled library", threads=False)
    inspect.add_argument("model", metavar="MODEL|LIB", help=_MODEL + ", or a library")
    inspect.add_argument("--shape", type=_shape, action="append", metavar="INPUT=SIZES", help="fix an input's shape")

    explain = verb("explain", "for each layer every lowering: chosen, or why not; compiles nothing")
    explain.add_argument("model", metavar="MODEL", help=_MODEL)
    explain.add_argument("--layer", metavar="NAME", help="this layer only")
    _compile_options(explain, dump=False)

    plan = verb("plan", "choose the lowering of each layer and write it as a plan; compiles nothing")
    plan.add_argument("model", metavar="MODEL", help=_MODEL)
    plan.add_argument("-o", "--output", metavar="PLAN.json", help="default: the model's name with .plan.json")
    _compile_options(plan, dump=False)

    compile_ = verb("compile", "write a shared library")
    compile_.add_argument("model", metavar="MODEL", help=_MODEL)
    compile_.add_argument("-o", "--output", metavar="OUT.so", help="default: the model's name with .so")
    _compile_options(compile_)

    run = verb("run", "run a library, or a model that is compiled first")
    run.add_argument("model", metavar="LIB|MODEL", help="a library, " + _MODEL)
    run.add_argument(
        "--input", action="append", default=[], metavar="NAME=X.npy|NAME=random|X.npz|random", help="default: random"
    )
    run.add_argument("--seed", type=int, default=0, help="of random inputs")
    run.add_argument("--output", metavar="OUT.npz", help="write the outputs")
    run.add_argument("--repeat", type=_positive, default=1, metavar="N", help="time N runs")
    _compile_options(run)

    verify = verb("verify", "compare with ONNX Runtime or a float64 reference")
    verify.add_argument("model", metavar="MODEL", help=_MODEL)
    verify.add_argument("library", nargs="?", metavar="LIB", help="a library made from it; else it is compiled")
    verify.add_argument("--seed", type=int, default=0, help="of the random inputs")
    verify.add_argument("--reference", default="auto", help="auto, onnxruntime or float64")
    verify.add_argument(
        "--tolerance", type=float, help="of the largest absolute output (default 1e-4, 4e-3 where a tensor is float16)"
    )
    _compile_options(verify)

    tune = verb("tune", "measure lowerings and schedules of every layer; `compile` uses what was found")
    tune.add_argument("model", nargs="+", metavar="MODEL", help=_MODEL)
    tune.add_argument("--target", help="default: this machine; another one with --tracker or --bundle")
    tune.add_argument("--shape", type=_shape, action="append", metavar="INPUT=SIZES", help="fix an input's shape")
    tune.add_argument("--max-workspace", type=size, metavar="BYTES", help="scratch memory of a layer at most")
    _max_error_option(tune)
    tune_options(tune, _names, _positive)

    report = verb("report", "write one offline HTML page of what tuning found", threads=False)
    report.add_argument("log", nargs="*", metavar="LOG", help="folders or .jsonl files (default: tuning_logs)")
    report.add_argument("--model", metavar="MODEL", help="its layers only, each as often as it has them: " + _MODEL)
    report.add_argument("--shape", type=_shape, action="append", metavar="INPUT=SIZES", help="fix an input's shape")
    report.add_argument("-o", "--output", metavar="REPORT.html", help="default: report.html")
    report.add_argument("--no-bounds", action="store_true", help="do not measure this machine's peak for the bounds")

    logs = verb("logs", "look into tuning logs, check, repair and merge them", tabular=False, threads=False)
    logs_options(logs, _Parser, _MODEL)

    bench = verb("bench", "time layers against the machine's limits, or networks against other engines")
    _bench_options(bench)
    return parser

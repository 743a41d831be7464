"""gemmify compiles a network by rewriting every convolution and fully connected layer into the GEMM that suits it.

    import gemmify
    m = gemmify.compile("resnet50.onnx", target="llvm", lowering="auto")
    m.run({"data": x})            # a list of numpy arrays, in the model's output order
    m.export("resnet50.so")
    gemmify.load("resnet50.so").run({"data": x})

Importing this package imports neither TVM nor onnx: each function brings in what it needs when it is called, so that a
program that only runs a library loads TVM's small runtime and nothing of the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import CheckError, GemmifyError, GemmifyWarning, IncompatibleError, InputError, UnsupportedError

if TYPE_CHECKING:
    from os import PathLike

    from lowering import ConvProblem, DenseProblem, Lowering, Problem

    from .conformance import Conformance
    from .gradients import ConvGradients
    from .runtime import Model

__version__ = "0.1.0"

__all__ = [
    "CheckError",
    "GemmifyError",
    "GemmifyWarning",
    "IncompatibleError",
    "InputError",
    "Model",
    "UnsupportedError",
    "__version__",
    "check_lowering",
    "compile",
    "conv_gradients",
    "load",
    "tune",
]


def compile(
    model: Any,
    *,
    target: Any = "llvm",
    lowering: Any = "auto",
    strict: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    plan: Any = None,
    threads: int | None = None,
    max_workspace: int | str | None = None,
    max_error: float | str | None = None,
    logs: Any = None,
    frozen: bool = False,
    cuda_graph: bool = False,
    progress: Callable[[str, float], None] | None = None,
    dump_dir: str | PathLike[str] | None = None,
) -> Model:
    """Compile `model` (a file, a zoo name, or a module) and return it ready to run.

    `lowering` is "auto", one key for every layer, or `{layer name: key}` ("*" names all others); with `strict` a layer
    that the key does not fit is an error instead of taking another one. `shapes` fixes the input shapes, `dtype`
    ("float16" or "bfloat16") converts a network of float32 to half precision, its inputs and outputs included,
    `threads` is the number of CPU threads that the code is made for and runs with (default: the physical cores this
    process may use), `max_workspace` bounds the scratch memory of a layer (bytes, or text such as "64KiB"),
    `max_error` the expected error of a layer relative to its largest output (default 1e-3),
    `logs` is where tuning records lie, a folder or several (default: ./tuning_logs, then what the package ships; False:
    nowhere); with `frozen` a layer that no record covers is an error. `plan` is a plan or its file: a layer that it
    names is compiled as it says, whatever the logs say. `target` is "llvm" (this machine), "llvm -mcpu=x86-64-v3",
    "cuda -arch=sm_90" (several architectures with commas; with " -tf32" float32 layers may round their operands), or a
    dict of TVM's; code for a GPU is compiled without one. `cuda_graph`: a run repeats a recorded graph of launches.
    `progress(stage, seconds)` is told each stage.
    Raises InputError or UnsupportedError for a wrong call or model, GemmifyError where the work fails.
    """
    from .runtime import compile_to_model

    return compile_to_model(
        model,
        threads=threads,
        target=target,
        lowering=lowering,
        strict=strict,
        shapes=shapes,
        dtype=dtype,
        plan=plan,
        max_workspace=max_workspace,
        max_error=max_error,
        logs=logs,
        frozen=frozen,
        cuda_graph=cuda_graph,
        progress=progress,
        dump_dir=dump_dir,
    )


def check_lowering(
    lowering: Lowering, problems: Sequence[Problem] | None = None, *, target: Any = "llvm", count: int = 24
) -> Conformance:
    """Compile `lowering` for random layers (or for `problems`), and hold numbers and bytes against what it promises.

    For a lowering from outside the package, before or after `lowering.register`. Raises CheckError that names what
    fails; see `gemmify.conformance.check_lowering`.
    """
    from .threads import import_tvm

    import_tvm(compiler=True)
    from .conformance import check_lowering as check

    return check(lowering, problems, target=target, count=count)


def conv_gradients(
    problem: ConvProblem | DenseProblem,
    lowering: str | Mapping[str, str] = "implicit-gemm",
    target: Any = "llvm",
    threads: int | None = None,
) -> ConvGradients:
    """Compile the gradients of a layer by its input and by its weight, as functions of numpy arrays, channels last.

        g = gemmify.conv_gradients(lowering.conv2d(64, 56, 56, 128, 3))     # C, H, W, M, K
        dI = g.input(dO, W)       # (N, H, W, C) from (N, Ho, Wo, M) and (M, K, K, C)
        dW = g.weight(dO, I)      # (M, K, K, C) from (N, Ho, Wo, M) and (N, H, W, C)

    `lowering` is "implicit-gemm" or "im2col", or one for each: `{"input": key, "weight": key}`. Raises InputError for a
    wrong key, for arrays of another shape or dtype, and for a dtype other than float32 and float64.
    """
    from .threads import import_tvm

    import_tvm(compiler=True)
    from .gradients import conv_gradients as compile_gradients

    return compile_gradients(problem, lowering, target, threads)


def load(path: str | PathLike[str], threads: int | None = None, cuda_graph: bool | None = None) -> Model:
    """Load an exported library; `threads` defaults to the physical cores that this process may use, `cuda_graph` to
    what it was compiled with.

    Needs TVM's runtime only. Raises InputError where the file is missing or is not a library of gemmify's, and
    IncompatibleError, before any of its code runs, where this machine cannot run it.
    """
    from .runtime import load as load_library

    return load_library(path, threads, cuda_graph)


def tune(
    model: Any,
    *,
    target: Any = "llvm",
    budget: float | str | None = "15m",
    logs: str | PathLike[str] = "tuning_logs",
    trials: int | None = None,
    layers: Sequence[str] = (),
    lowerings: Sequence[str] | None = None,
    threads: int | None = None,
    max_workspace: int | str | None = None,
    max_error: float | str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    from_nothing: bool = False,
    tracker: str | None = None,
    key: str | None = None,
    workers: int | None = None,
    bundle: str | PathLike[str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure lowerings and schedules of the layers of `model` (or of several, in a list), and append what was found to
    the log in the folder `logs`, where `compile` finds it. Needs the extra `tune`.

    It ends after `budget` (seconds, or text such as "20m"; it is the whole run's, with compiling and the finals), after
    `trials` trials a layer, or where nothing is left to gain; what earlier runs found on this machine is not measured
    again, unless with `from_nothing`. `layers` are names or patterns (default: all), `lowerings` keys (default: all
    that apply), `max_workspace` and `max_error` bound the search as they bound `compile`, `shapes` and `dtype` are as
    for `compile`, `seed` decides what is drawn. `tracker` ("HOST:PORT") and `key` measure on `workers` devices of a TVM
    RPC tracker. `bundle` measures nothing: it writes a tar file of candidates to run elsewhere, whose results `gemmify
    logs import` takes. Progress goes to the standard error unless `quiet`.

    Returns a dict ready for JSON: "layers" (a row for each different layer: count, default, tuned and bound in seconds,
    ratio, choice), "networks" (untuned and tuned seconds), "trials", "seconds", "summary" and more. Raises InputError
    for a wrong call, GemmifyError where measuring fails; on KeyboardInterrupt what was measured is in the log.
    """
    from .threads import import_tvm

    import_tvm(compiler=True)
    from .tuning.tune import tune as run

    return run(
        list(model) if isinstance(model, list | tuple) else [model],
        target=target,
        budget=budget,
        logs=logs,
        trials=trials,
        layers=layers,
        lowerings=lowerings,
        threads=threads,
        max_workspace=max_workspace,
        max_error=max_error,
        shapes=shapes,
        dtype=dtype,
        seed=seed,
        from_nothing=from_nothing,
        tracker=tracker,
        key=key,
        workers=workers,
        bundle=bundle,
        quiet=quiet,
    )


def __getattr__(name: str) -> Any:
    if name == "Model":
        from .runtime import Model

        return Model
    raise AttributeError(f"module 'gemmify' has no attribute {name!r}")

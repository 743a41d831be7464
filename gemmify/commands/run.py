"""`gemmify run LIB|MODEL`: the outputs in numbers, and the time."""

from __future__ import annotations

import statistics
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import report
from ..errors import InputError
from ..export import check_destination, write_file
from ..host import is_library
from ..manifest import TensorSpec
from ..runtime import Model, load, random_inputs


def execute(
    model: str,
    inputs: Sequence[str],
    *,
    seed: int = 0,
    output: str | None = None,
    repeat: int = 1,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a library, or a model that is compiled first, and describe its outputs.

    `inputs` are `name=file.npy`, `file.npy` (a model of one input), `file.npz`, `name=random`, or "random" (the
    default: every input that no other names). `output`
    takes an .npz of all outputs. Returns {model, threads, device, outputs: [{name, shape, dtype, min, max, mean,
    argmax}], seconds: [...], median_seconds}.
    """
    if output:
        check_destination(output)
    network = open_model(model, threads, options)
    arrays = read_inputs(inputs, network.inputs, seed)
    results = network.run(arrays)
    seconds = network.time(arrays, repeat=repeat, warmup=1 if repeat > 1 else 0)
    names = [spec.name for spec in network.outputs]
    if output:
        write_npz(output, dict(zip(names, results, strict=True)))
    return {
        "model": model,
        "threads": network.threads,
        "device": network.device,
        "outputs": [describe(name, array) for name, array in zip(names, results, strict=True)],
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
    }


def open_model(model: str, threads: int | None = None, options: Mapping[str, Any] | None = None) -> Model:
    """Load `model` where it is a library, else compile it; IncompatibleError before that work where the target's code
    cannot run here."""
    options = dict(options or {})
    if is_library(Path(model)):
        graph = options.pop("cuda_graph", None)
        if options:
            raise InputError(f"{model} is compiled already; leave out {', '.join(sorted(options))}, or give the model")
        return load(model, threads, graph)
    from .. import compile as compile_model

    require_device(options.get("target"))
    return compile_model(model, threads=threads, **options)


def require_device(target: Any) -> None:
    """IncompatibleError where `target`, as a user writes it, is a GPU's, and no GPU of this machine runs its code."""
    if target is None or not str(target).lstrip().startswith("cuda"):
        return
    from ..threads import import_tvm

    import_tvm(compiler=True)
    from ..cuda.device import require_archs
    from ..manifest import target_archs
    from ..pipeline import resolve_target

    require_archs(target_archs(resolve_target(target)), "this code")


def read_inputs(inputs: Sequence[str], specs: Sequence[TensorSpec], seed: int) -> dict[str, np.ndarray]:
    """The arrays that the `--input` arguments name, or random ones; InputError for an unusable file or name."""
    given = [text for text in inputs if text != "random"]
    drawn = random_inputs(specs, seed)
    arrays: dict[str, np.ndarray] = dict(drawn) if len(given) < len(inputs) or not inputs else {}
    for text in given:
        # A name may hold "=", and a path too; a file of that whole name wins.
        name, equals, path = ("", "", text) if Path(text).is_file() else text.rpartition("=")
        if not path or (equals and not name):
            raise InputError(f"--input {text!r} lacks a name or a file; write NAME=FILE.npy, NAME=random or FILE.npz")
        if equals and path == "random":
            if name not in drawn:
                raise InputError(f"unknown input {name}; the model takes {', '.join(map(str, specs)) or 'none'}")
            arrays[name] = drawn[name]
            continue
        content = _read(Path(path))
        if isinstance(content, dict):
            arrays.update(content)
        elif equals:
            arrays[name] = content
        elif len(specs) == 1:
            arrays[specs[0].name] = content
        else:
            wanted = ", ".join(s.name for s in specs)
            raise InputError(
                f"--input {text} names no input, and the model takes several ({wanted}); write NAME={text}"
            )
    return arrays


def _read(path: Path) -> Any:
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return {name: content[name] for name in content.files}
    except FileNotFoundError as err:
        raise InputError(f"there is no file {path}; give --input NAME=FILE.npy, FILE.npz or random") from err
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as err:
        raise InputError(f"cannot read {path} as a numpy file: {err}; write it with numpy.save or numpy.savez") from err


def write_npz(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """`arrays` as an .npz at `path`, complete or not at all; any output name is fine (numpy.savez refuses "file")."""

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(name + ".npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)

    write_file(path, write)


def describe(name: str, array: np.ndarray) -> dict[str, Any]:
    """Name, shape, dtype, min, max, mean and flat argmax of an output."""
    row: dict[str, Any] = {"name": name, "shape": list(array.shape), "dtype": str(array.dtype)}
    if array.size:
        wide = array.astype(np.float64)
        row.update(min=float(wide.min()), max=float(wide.max()), mean=float(wide.mean()), argmax=int(wide.argmax()))
    return row


def show(result: dict[str, Any]) -> None:
    for row in result["outputs"]:
        numbers = ""
        if "min" in row:
            numbers = f"  min {row['min']:.6g}  max {row['max']:.6g}  mean {row['mean']:.6g}  argmax {row['argmax']}"
        print(f"{row['name']}  {'x'.join(map(str, row['shape'])) or 'scalar'} {row['dtype']}{numbers}")
    seconds = result["seconds"]
    times = f"{report.duration(result['median_seconds'])}"
    if len(seconds) > 1:
        times = f"median {times}, best {report.duration(min(seconds))} of {len(seconds)}"
    print(f"time {times} on {result['device']}")

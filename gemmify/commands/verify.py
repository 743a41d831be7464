"""`gemmify verify MODEL [LIB]`: does the compiled network compute what the model says?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import report
from ..errors import CheckError, InputError
from ..runtime import random_inputs
from ..threads import check_threads
from ..verify import check_same_model, compare, computes_in_half, onnx_model, reference_outputs
from .run import open_model


def execute(
    model: str,
    library: str | None = None,
    *,
    seed: int = 0,
    reference: str = "auto",
    tolerance: float | None = None,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare `library` (or `model` compiled with `options`) with an independent engine on seeded random inputs.

    Returns {model, made_from (by the library's own word), reference, seed, holds, outputs: [{name, relative_error,
    max_abs_error, ..., holds}]}.
    """
    if library is not None and options:
        raise InputError(f"{library} is compiled already; give either a library or {', '.join(sorted(options))}")
    if threads is not None:
        check_threads(threads)
    network = open_model(library or model, threads, options)
    if library is not None:
        check_same_model(model, network.manifest, library)
    inputs = random_inputs(network.inputs, seed)
    names = [spec.name for spec in network.outputs]
    want, engine = reference_outputs(model, _as_declared(model, inputs), names, reference)
    rows = compare(names, network.run(inputs), want, tolerance, computes_in_half(model, network.manifest))
    holds = all(row["holds"] for row in rows)
    made_from = network.manifest.model
    return {
        "model": model,
        "made_from": made_from,
        "reference": engine,
        "seed": seed,
        "holds": holds,
        "outputs": rows,
    }


def _as_declared(model: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a network that was converted to half precision in the dtypes that the model itself takes."""
    narrow = {name for name, array in inputs.items() if array.dtype.itemsize == 2 and array.dtype.kind not in "iub"}
    source = onnx_model(model) if narrow else None
    if source is None:
        return dict(inputs)
    import onnx

    wide = {i.name for i in source.graph.input if i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return {name: a.astype("float32") if name in narrow & wide else a for name, a in inputs.items()}


def check(result: dict[str, Any]) -> None:
    """CheckError where an output of `result` does not hold."""
    failed = [row for row in result["outputs"] if not row["holds"]]
    if failed:
        what = "; ".join(f"{row['name']}: {row['why']}" for row in failed)
        if result["made_from"] != Path(result["model"]).stem:
            what += f"; the library says that it was made from {result['made_from']}"
        raise CheckError(f"{result['model']} does not agree with {result['reference']} (seed {result['seed']}): {what}")


def show(result: dict[str, Any]) -> None:
    columns: tuple[report.Column, ...] = (
        ("output", "name", report.text),
        ("relative error", "relative_error", lambda v: "" if v is None else f"{v:.3g}"),
        ("allowed", "tolerance", lambda v: f"{v:.3g}"),
        ("largest value", "max_abs_reference", lambda v: "" if v is None else f"{v:.6g}"),
        ("holds", "holds", lambda v: "yes" if v else "NO"),
    )
    report.table(f"{result['model']} against {result['reference']}", columns, result["outputs"])

"""`gemmify inspect MODEL|LIB`: the layers that are matrix multiplications, and where the arithmetic is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import report
from ..host import is_library
from ..manifest import archs_of, read_manifest

if TYPE_CHECKING:
    from lowering.graph import LayerSite


def execute(model: str, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """{model, inputs, outputs, layers, macs}; a library adds its target, CPU features, memory and versions.

    Each layer: name, op, problem, gemm [m, n, k] (of one group), count (groups), macs, share of all MACs.
    """
    result = _of_library(Path(model)) if is_library(Path(model)) else _of_model(model, shapes)
    total = sum(layer["macs"] for layer in result["layers"])
    for layer in result["layers"]:
        layer["share"] = layer["macs"] / total if total else 0.0
    return result | {"macs": total}


def _of_library(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    data = asdict(manifest)
    return data | {"layers": [dict(layer) for layer in manifest.layers]}


def _of_model(model: str, shapes: Mapping[str, Sequence[int]] | None) -> dict[str, Any]:
    from ..threads import import_tvm

    import_tvm(compiler=True)
    from lowering.graph.epilogue import describe_layer

    from ..frontend import import_model
    from ..lower import layer_functions
    from ..pipeline import lowering_graph

    imported = import_model(model, shapes)
    sites = [describe_layer(func) for func in layer_functions(lowering_graph(imported.mod)).values()]
    return {
        "model": imported.name,
        "inputs": [asdict(spec) for spec in imported.inputs],
        "outputs": [asdict(spec) for spec in imported.outputs],
        "layers": [_describe(site) for site in sites if site is not None],
    }


def _describe(site: LayerSite) -> dict[str, Any]:
    from lowering import DenseProblem, TransposedConvProblem

    problem = site.problem
    row = {"name": site.name, "op": problem.op, "problem": asdict(problem), "macs": problem.macs}
    if isinstance(problem, DenseProblem):
        return row | {"gemm": [problem.n, problem.m, problem.c], "count": 1}
    if isinstance(problem, TransposedConvProblem):
        gemm = [problem.n * problem.in_pixels, problem.taps * problem.m_group, problem.c_group]
    else:
        gemm = [problem.n * problem.pixels, problem.m_group, problem.taps * problem.c_group]
    return row | {"gemm": gemm, "count": problem.groups}


def show(result: dict[str, Any]) -> None:
    columns: list[report.Column] = [
        ("layer", "name", report.text),
        ("op", "op", report.text),
        ("problem", "problem", report.problem_text),
        ("GEMM m x n x k", "gemm", report.gemm),
        ("count", "count", report.text),
        ("MACs", "macs", report.count),
        ("share", "share", report.share),
    ]
    if any("lowering" in layer for layer in result["layers"]):
        columns.append(("lowering", "lowering", report.text))
        columns.append(("workspace", "workspace_bytes", report.size))
    report.table(
        f"{result['model']}: {len(result['layers'])} layers, {report.count(result['macs'])} MACs",
        columns,
        result["layers"],
    )
    for kind in ("inputs", "outputs"):
        specs = [f"{s['name']} {'x'.join(map(str, s['shape']))} {s['dtype']}" for s in result[kind]]
        print(f"{kind}: {', '.join(specs)}")
    if "memory" in result:
        report.memory_line(result["memory"])
        gpu = [f"a GPU ({', '.join(archs)})"] if (archs := archs_of(result["target"])) else []
        features = " ".join([*gpu, *result["cpu_features"]]) or "none"
        print(f"made by gemmify {result['gemmify']} with TVM {result['tvm']} for {result['triple']}; needs: {features}")

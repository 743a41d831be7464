"""`gemmify plan MODEL`: the lowering of each layer as a file, to edit and to compile with; compiles nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import report
from ..errors import InputError
from ..export import check_destination


def execute(model: str, output: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Plan `model` with the keyword `options` of `pipeline.plan_model`, and write the plan.

    `output` is MODEL's stem + .plan.json where it is not given. Returns {output, model, plan, layers, tuning}.
    """
    from ..threads import check_threads, import_tvm

    if output == "-":
        raise InputError("-o takes the name of a file; --json - prints the plan on the standard output")
    place = check_destination(output or Path(model).stem + ".plan.json")
    if options.get("threads") is not None:
        check_threads(options["threads"])
    import_tvm(compiler=True)
    from ..pipeline import plan_model

    planned = plan_model(model, **options)
    planned.plan.save(place)
    return {
        "output": str(place),
        "model": planned.model,
        "plan": planned.plan.to_dict(),
        "layers": planned.layers,
        "tuning": planned.tuning,
    }


def show(result: dict[str, Any]) -> None:
    report.layers_table(result["layers"])
    report.coverage_line(result["tuning"])
    print(f"wrote {result['output']}; edit it, and compile with --plan {result['output']}")

"""torch.export programs -> Relax. PyTorch is optional: without it, the error says which extra brings it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm

from gemmify.errors import InputError, UnsupportedError
from gemmify.frontend.load import first_line
from gemmify.frontend.relax_module import fold


def load_pt2(path: Path) -> Any:
    """Load a `.pt2` file that torch.export.save wrote. Raises InputError without PyTorch, or for another file."""
    try:
        import torch
    except ImportError:
        message = f"reading {path} needs PyTorch, which is not installed: pip install 'gemmify[torch]'"
        raise InputError(message) from None
    try:
        return torch.export.load(str(path))
    except Exception as error:  # torch raises RuntimeError, KeyError, zipfile errors ...
        raise InputError(f"{path} is not a program that torch.export.save wrote: {first_line(error)}") from None


def is_exported_program(model: Any) -> bool:
    """Whether `model` is a torch.export.ExportedProgram, found out without importing PyTorch."""
    return any(c.__name__ == "ExportedProgram" and c.__module__.startswith("torch.") for c in type(model).__mro__)


def from_program(program: Any) -> tvm.IRModule:
    """Import a program; its parameters become constants.

    Raises InputError for a program exported in training mode, UnsupportedError for operators without a converter.
    """
    from tvm.relax.frontend.torch import from_exported_program

    _check(program)
    try:
        mod = from_exported_program(program, keep_params_as_input=False, unwrap_unit_return_tuple=True)
    except Exception as error:  # the importer asserts, or raises NotImplementedError or TVM's errors
        raise UnsupportedError(f"the PyTorch program cannot be imported: {first_line(error)}") from None
    return fold(mod)


def _check(program: Any) -> None:
    """Refuses what TVM's importer would read as something else: dropout at work, state that changes, a divisor."""
    mutated = {**program.graph_signature.buffers_to_mutate, **program.graph_signature.user_inputs_to_mutate}
    if mutated:
        raise InputError(
            f"the PyTorch program changes {', '.join(map(str, mutated.values()))} as it runs, and a compiled network "
            "keeps no state: call model.eval() before torch.export.export"
        )
    for node in program.graph.nodes:
        op = str(node.target)
        if "dropout" in op and _argument(node, 2, "train"):
            raise InputError(
                f"{op} (node {node.name!r}) is exported in training mode, and its result is random: "
                "call model.eval() before torch.export.export"
            )
        if op.startswith("aten.batch_norm") and _argument(node, 5, "training") and _argument(node, 3, "running_mean"):
            raise InputError(
                f"{op} (node {node.name!r}) is exported in training mode, and takes its statistics from the batch: "
                "call model.eval() before torch.export.export"
            )
        if op.startswith("aten.avg_pool") and _argument(node, 6, "divisor_override") is not None:
            raise UnsupportedError(
                f"{op} (node {node.name!r}) with divisor_override is not supported; scale its result"
            )


def _argument(node: Any, position: int, name: str) -> Any:
    """An argument of a call node, however it was passed; None where it was left out."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)

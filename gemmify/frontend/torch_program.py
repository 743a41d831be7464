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
    """Import a program; its parameters become constants. Raises UnsupportedError for operators without a converter."""
    from tvm.relax.frontend.torch import from_exported_program

    try:
        mod = from_exported_program(program, keep_params_as_input=False, unwrap_unit_return_tuple=True)
    except Exception as error:  # the importer asserts, or raises NotImplementedError or TVM's errors
        raise UnsupportedError(f"the PyTorch program cannot be imported: {first_line(error)}") from None
    return fold(mod)

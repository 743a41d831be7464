"""The device code of a compilation: compiled when the rest is, so that errors come then; an export finds it made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .packing import TEXT, device_modules
from .resources import KernelResources
from .toolchain import compile_cuda


def cuda_text(module: Any) -> str:
    """The CUDA text among the imports of `module`, "" where all is machine code."""
    return "\n".join(device.code.decode() for device in device_modules(module) if device.format == TEXT)


def compile_imports(module: Any, archs: Sequence[str]) -> tuple[KernelResources, ...]:
    """Compile the CUDA text among the imports of `module` (tvm.runtime.Module) for `archs`; returns what each kernel
    takes on each of them. Nothing for what is machine code already: TVM asked `callback` for it. Raises GemmifyError
    as `compile_cuda`."""
    found: list[KernelResources] = []
    for device in device_modules(module):
        if device.format == TEXT:
            found += compile_cuda(device.code.decode(), tuple(archs)).resources
    return tuple(found)

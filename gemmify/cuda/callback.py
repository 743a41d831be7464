"""TVM's hook for CUDA text, in a process with a CUDA runtime: the same compiler and options as where there is none.

Importing this module registers it, once; whoever has another compiler (a test's emulator) registers that afterwards.
"""

from __future__ import annotations

import tvm
import tvm_ffi

from schedules.cuda.target import archs_of

from .archs import arch_name
from .device import gpu_here
from .toolchain import compile_cuda


@tvm_ffi.register_global_func("tvm_callback_cuda_compile", override=True)
def compile_text(text: str) -> bytes:
    """The fatbin of `text` for the target of the enclosing build, or for the GPU that is here where none is known."""
    target = tvm.target.Target.current(allow_none=True)
    if target is not None and str(target.kind) == "cuda":
        archs = archs_of(target)
    else:
        here = gpu_here()
        assert here is not None, "TVM asks for CUDA code outside a target, on a machine without a GPU"
        archs = (arch_name(here.capability),)
    return compile_cuda(str(text), archs).image

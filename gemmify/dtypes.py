"""Which dtypes a layer may be stored in on a machine, and what to say of the others."""

from __future__ import annotations

from schedules import AnyMachine, Gpu

from .errors import UnsupportedError

COMPILED = ("float16", "float32", "float64")
"""What layers are compiled in: float16 is storage, its arithmetic float32 (`lowering.precision`)."""


def refusal(dtype: str, machine: AnyMachine) -> str | None:
    """Why no layer is compiled in `dtype` for `machine`, with what to do about it; None where one is."""
    if isinstance(machine, Gpu):
        return _gpu_refusal(dtype, machine)
    if dtype not in COMPILED:
        compiled = f"{', '.join(COMPILED[:-1])} and {COMPILED[-1]}"
        gpu = ", or compile for a GPU" if dtype == "bfloat16" else ""
        return f"for a CPU this version compiles {compiled} layers; {_CONVERT}{gpu}"
    if dtype == "float16" and not machine.converts_float16:
        name = machine.mcpu or f"generic {machine.arch}"
        return (
            f"the target's CPU, {name}, has no instructions that convert float16 (F16C or AVX512-FP16 on x86, Zfhmin "
            f"on RISC-V); name a CPU that has them, e.g. llvm -mcpu=x86-64-v3, or {_CONVERT}"
        )
    return None


def _gpu_refusal(dtype: str, gpu: Gpu) -> str | None:
    """A GPU stores and multiplies the halves as they are, bfloat16 from compute capability 8.0 on."""
    if dtype == "bfloat16" and not gpu.bfloat16:
        major, minor = gpu.capability
        return (
            f"a GPU needs compute capability 8.0 for bfloat16 and sm_{major}{minor} has {major}.{minor}; compile for "
            f"sm_80 or later, or {_CONVERT} or float16"
        )
    if dtype not in (*COMPILED, "bfloat16"):
        return f"on a GPU layers are compiled in {', '.join(COMPILED)} and bfloat16; {_CONVERT}"
    return None


_CONVERT = "convert the model's weights and inputs to float32"


def require_dtype(what: str, dtype: str, machine: AnyMachine) -> None:
    """Raises UnsupportedError where layers of `dtype` are not compiled for `machine`; `what` is the layer in words."""
    if (reason := refusal(dtype, machine)) is not None:
        raise UnsupportedError(f"{what} computes in {dtype}, but {reason}")

"""Which dtypes a layer may be stored in on a machine, and what to say of the others."""

from __future__ import annotations

from schedules import Machine

from .errors import UnsupportedError

COMPILED = ("float16", "float32", "float64")
"""What layers are compiled in: float16 is storage, its arithmetic float32 (`lowering.precision`)."""


def refusal(dtype: str, machine: Machine) -> str | None:
    """Why no layer is compiled in `dtype` for `machine`, with what to do about it; None where one is."""
    if dtype not in COMPILED:
        return f"this version compiles {', '.join(COMPILED[:-1])} and {COMPILED[-1]} layers; {_CONVERT}"
    if dtype == "float16" and not machine.converts_float16:
        name = machine.mcpu or f"generic {machine.arch}"
        return (
            f"the target's CPU, {name}, has no instructions that convert float16 (F16C or AVX512-FP16 on x86, Zfhmin "
            f"on RISC-V); name a CPU that has them, e.g. llvm -mcpu=x86-64-v3, or {_CONVERT}"
        )
    return None


_CONVERT = "convert the model's weights and inputs to float32"


def require_dtype(what: str, dtype: str, machine: Machine) -> None:
    """Raises UnsupportedError where layers of `dtype` are not compiled for `machine`; `what` is the layer in words."""
    if (reason := refusal(dtype, machine)) is not None:
        raise UnsupportedError(f"{what} computes in {dtype}, but {reason}")

"""The epilogue of a layer: what happens to each output element while it is still in a register."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tvm import te, tirx

from .base import Epilogue, dtype_of
from .precision import cast

PER_CHANNEL = ("bias", "scale")
ELEMENTWISE = ("add", "mul")


@dataclass(frozen=True)
class EpilogueOp:
    """One step of an epilogue: what it does, the operand that it reads (an index, or None), its constants.

    | kind | value | operand, params |
    | --- | --- | --- |
    | bias, scale | `v + b[m]`, `v s[m]` | one element an output channel |
    | add, mul | `v + t`, `v t` | a tensor of the output's shape |
    | relu, clip, leaky_relu | `max(v, 0)`, `min(max(v, lo), hi)`, `v if v > 0 else a v` | -, (lo, hi), (a,) |
    | sigmoid, tanh, silu | `1/(1+exp(-v))`, `tanh(v)`, `v sigmoid(v)` | - |
    | hardsigmoid, hardswish | `min(max(a v + b, 0), 1)`, `v hardsigmoid(v)` | (a, b) |
    """

    kind: str
    operand: int | None = None
    params: tuple[float, ...] = ()


def _clip(v: Any, low: float, high: float) -> Any:
    return tirx.min(tirx.max(v, tirx.const(low, dtype_of(v))), tirx.const(high, dtype_of(v)))


def _sigmoid(v: Any) -> Any:
    one = tirx.const(1, dtype_of(v))
    return one / (one + tirx.exp(-v))


def _hardsigmoid(v: Any, a: float, b: float) -> Any:
    return _clip(v * tirx.const(a, dtype_of(v)) + tirx.const(b, dtype_of(v)), 0.0, 1.0)


UNARY: dict[str, Callable[..., Any]] = {
    "relu": lambda v: tirx.max(v, tirx.const(0, dtype_of(v))),
    "clip": _clip,
    "leaky_relu": lambda v, a: tirx.Select(v > 0, v, v * tirx.const(a, dtype_of(v))),
    "sigmoid": _sigmoid,
    "tanh": tirx.tanh,
    "silu": lambda v: v * _sigmoid(v),
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda v, a=1 / 6, b=0.5: v * _hardsigmoid(v, a, b),
}
KINDS = (*PER_CHANNEL, *ELEMENTWISE, *UNARY)


def make_epilogue(
    ops: Sequence[EpilogueOp], operands: Sequence[te.Tensor], layout: Literal["NHWC", "NCHW"] = "NHWC"
) -> Epilogue:
    """The function that applies `ops` in order; `operands` are placeholders in the lowering's own output layout."""

    def apply(value: Any, index: tuple[Any, ...]) -> Any:
        channel = index[1] if layout == "NCHW" else index[-1]
        for op in ops:
            if op.operand is None:
                value = UNARY[op.kind](value, *op.params)
                continue
            tensor = operands[op.operand]
            operand = cast(tensor(channel) if op.kind in PER_CHANNEL else tensor(*index), dtype_of(value))
            value = value + operand if op.kind in ("bias", "add") else value * operand
        return value

    return apply

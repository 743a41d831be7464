"""Convolutions as implicit GEMMs for the tests of schedules/cuda: the function, its operands, the result in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from tvm import te, tirx

from lowering.base import Tile
from lowering.tile_gemm import tile_gemm
from schedules.cuda.device import Gpu, gpu_of
from schedules.machine import Machine
from schedules.target import host_target

NUMPY = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Conv:
    """A convolution over (n, h, w, c), its kernel r x r; `ops` names the steps of its epilogue in order."""

    n: int = 1
    h: int = 5
    w: int = 6
    c: int = 8
    m: int = 16
    r: int = 3
    stride: int = 1
    pad: int = 1
    dilation: int = 1
    groups: int = 1
    dtype: str = "float32"
    ops: tuple[str, ...] = ("bias", "relu")

    @property
    def out(self) -> tuple[int, int]:
        reach = (self.r - 1) * self.dilation + 1
        first, second = ((size + 2 * self.pad - reach) // self.stride + 1 for size in (self.h, self.w))
        return first, second


def conv_func(p: Conv) -> Any:
    """The implicit GEMM of `p` as an unscheduled PrimFunc: data, packed weights, operands of the epilogue, output."""
    wide = "float64" if p.dtype == "float64" else "float32"
    ho, wo = p.out
    c, m = p.c // p.groups, p.m // p.groups
    data = te.placeholder((p.n, p.h, p.w, p.c), p.dtype, name="data")
    packed = te.placeholder((p.groups, m, p.r, p.r, c), p.dtype, name="packed")
    bias = te.placeholder((p.m,), p.dtype, name="bias")
    other = te.placeholder((p.n, ho, wo, p.m), p.dtype, name="other")

    def read_a(at: Any, x: Any, g: Any, n: Any, k: Any) -> Any:
        row, column = (o * p.stride + tap * p.dilation - p.pad for o, tap in zip((at[1], x), k[:2], strict=True))
        value = data(at[0], row, column, g * c + k[2]).astype(wide)
        inside = tirx.all(row >= 0, row < p.h, column >= 0, column < p.w)
        return tirx.if_then_else(inside, value, tirx.const(0, wide)) if p.pad else value

    def epilogue(value: Any, index: Any) -> Any:
        for op in p.ops:
            if op == "bias":
                value = value + bias(index[-1]).astype(wide)
            elif op == "add":
                value = value + other(*index).astype(wide)
            elif op == "relu":
                value = tirx.max(value, tirx.const(0, wide))
            else:
                value = value / (tirx.const(1, wide) + tirx.exp(-value))
        return value.astype(p.dtype)

    out = tile_gemm(
        outer=(p.n, ho),
        inner=wo,
        n=m,
        k_extents=(p.r, p.r, c),
        groups=p.groups,
        read_a=read_a,
        read_b=lambda at, g, panel, j, k: packed(g, panel + j, *k).astype(wide),
        tile=Tile(1, 1),
        epilogue=epilogue,
    )
    operands = [*([bias] if "bias" in p.ops else []), *([other] if "add" in p.ops else [])]
    return te.create_prim_func([data, packed, *operands, out])


def conv_arrays(p: Conv, seed: int = 3) -> list[np.ndarray]:
    """Random operands in the order of `conv_func`."""
    random = np.random.default_rng(seed)
    shapes = [(p.n, p.h, p.w, p.c), (p.groups, p.m // p.groups, p.r, p.r, p.c // p.groups)]
    shapes += [(p.m,)] if "bias" in p.ops else []
    shapes += [(p.n, *p.out, p.m)] if "add" in p.ops else []
    return [random.standard_normal(shape).astype(NUMPY[p.dtype]) for shape in shapes]


def conv_reference(p: Conv, arrays: list[np.ndarray]) -> np.ndarray:
    """The same in float64, (n, ho, wo, m)."""
    data, packed, *operands = (array.astype(np.float64) for array in arrays)
    (ho, wo), c, m = p.out, p.c // p.groups, p.m // p.groups
    padded = np.pad(data, ((0, 0), (p.pad, p.pad), (p.pad, p.pad), (0, 0)))
    result = np.zeros((p.n, ho, wo, p.m))
    for g in range(p.groups):
        for y in range(p.r):
            for x in range(p.r):
                top, left = y * p.dilation, x * p.dilation
                window = padded[:, top : top + (ho - 1) * p.stride + 1 : p.stride]
                window = window[:, :, left : left + (wo - 1) * p.stride + 1 : p.stride, g * c : (g + 1) * c]
                result[..., g * m : (g + 1) * m] += window @ packed[g, :, y, x].T
    rest = iter(operands)
    for op in p.ops:
        if op in ("bias", "add"):
            result = result + next(rest)
        else:
            result = np.maximum(result, 0) if op == "relu" else result / (1 + np.exp(-result))
    return result


def gpu_for(arch: str) -> Gpu:
    """The typical board of an architecture."""
    return gpu_of((arch,), Machine.from_target(host_target()))

"""GEMM kernels of schedules/cuda/gemm.py against float64: every core, odd sizes, groups, batches, epilogues, split-K.

Outputs and scratch begin as NaN on the emulator, where each kernel runs in two orders of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conv_gemm import Conv, conv_arrays, conv_func, conv_reference, gpu_for

from schedules import knob_space
from schedules.cuda.gemm import SCRATCH_ATTR, TF32_ATTR, gemm_kernel

ROUNDING = {"float32": 2e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 1.6e-2}
TF32_ROUNDING = 2e-3


def check(run_kernel: Callable[..., Any], p: Conv, arch: str, knobs: dict[str, Any], tf32: bool = False) -> Any:
    """Run `p` with `knobs` and compare; the scheduled function."""
    func = conv_func(p)
    made = gemm_kernel(func.with_attr(TF32_ATTR, 1) if tf32 else func, gpu_for(arch), knobs)
    assert made is not None
    arrays = conv_arrays(p)
    outputs = [None] * (len(made.params) - len(arrays))
    got = run_kernel(made, *arrays, *outputs, arch=arch)[-1].astype(np.float64).reshape(p.n, *p.out, p.m)
    want = conv_reference(p, arrays)
    rounding = TF32_ROUNDING if tf32 else ROUNDING[p.dtype]
    assert np.isfinite(got).all(), f"{np.isnan(got).sum()} elements were not written"
    assert np.abs(got - want).max() <= rounding * max(1.0, np.abs(want).max())
    return made


SIMT = "simt-64x64x16-2x2"
MMA = "mma-64x64x32-2x2"
WGMMA = "wgmma-64x64x64-4x1"
CASES: dict[str, tuple[Conv, str, dict[str, Any]]] = {
    # every dimension of one block and more: 1, 7, 33, 65, 127
    "one element of m": (Conv(h=1, w=1, c=33, m=127, r=1, pad=0), "sm_80", {"tile": SIMT}),
    "odd everywhere": (Conv(n=2, h=7, w=5, c=7, m=33, ops=("bias", "add", "silu")), "sm_80", {"tile": SIMT}),
    "more than a tile": (Conv(n=3, h=5, w=9, c=4, m=65, r=1, pad=0), "sm_90", {"tile": "simt-128x32x16-4x1"}),
    "first layer": (Conv(h=9, w=9, c=3, m=16, r=5, stride=2, pad=2), "sm_80", {}),
    "stride, dilation": (Conv(h=9, w=8, c=6, m=20, stride=2, dilation=2, pad=2, ops=()), "sm_80", {}),
    "groups": (Conv(c=16, m=24, groups=2, ops=("bias",)), "sm_80", {}),
    "split": (Conv(c=24, m=20, ops=("bias", "add")), "sm_80", {"tile": SIMT, "split_k": 3}),
    "split, groups, raster": (
        Conv(c=32, m=144, groups=2), "sm_90", {"tile": "simt-16x32x32-1x1", "split_k": 4, "raster": 2, "stages": 2}
    ),
    "without cp.async": (Conv(c=12, m=20, ops=("add", "relu")), "sm_75", {"tile": SIMT}),
    "double": (Conv(c=5, m=18, dtype="float64", ops=("bias", "silu")), "sm_80", {}),
    "halves": (Conv(c=24, m=65, dtype="float16", ops=("bias", "add", "relu")), "sm_80", {"tile": MMA}),
    "halves, first layer": (Conv(h=4, w=4, c=3, m=24, r=3, dtype="float16"), "sm_80", {"tile": "mma-32x32x32-2x1"}),
    "odd halves, default plan": (Conv(n=3, h=9, w=11, c=13, m=17, r=1, pad=0, dtype="float16"), "sm_90", {}),
    "halves, Turing": (Conv(c=16, m=24, dtype="float16"), "sm_75", {"tile": MMA}),
    "bfloat16, split": (Conv(c=48, m=40, dtype="bfloat16"), "sm_80", {"tile": MMA, "split_k": 2}),
    "warp group": (Conv(n=2, c=16, m=72, dtype="float16", ops=("bias", "add")), "sm_90", {"tile": WGMMA}),
    "warp group, split": (Conv(c=32, m=40, dtype="bfloat16"), "sm_90", {"tile": WGMMA, "split_k": 2}),
}  # fmt: skip


SLOW = ("more than a tile", "stride, dilation", "groups", "without cp.async", "bfloat16, split", "warp group, split")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [], id=name) for name in CASES]
)
def test_a_gemm_equals_float64(run_kernel: Callable[..., Any], case: str) -> None:
    p, arch, knobs = CASES[case]
    made = check(run_kernel, p, arch, knobs)
    assert (SCRATCH_ATTR in made.attrs) == ("split_k" in knobs)


def test_tf32_on_request_only(run_kernel: Callable[..., Any]) -> None:
    p = Conv(c=16, m=24)
    made = check(run_kernel, p, "sm_80", {"tile": "mma-64x64x16-2x2"}, tf32=True)
    assert "tf32" in made.script()
    with pytest.raises(ValueError, match="the knob tile must be simt"):
        gemm_kernel(conv_func(p), gpu_for("sm_80"), {"tile": "mma-64x64x16-2x2"})


def test_a_sum_of_parts_is_the_same_every_time(run_kernel: Callable[..., Any]) -> None:
    p = Conv(c=24, m=20)
    made = gemm_kernel(conv_func(p), gpu_for("sm_80"), {"tile": SIMT, "split_k": 3})
    assert made is not None
    arrays = conv_arrays(p)
    # run_kernel compares the bits of all orders itself
    run_kernel(made, *arrays, None, None, arch="sm_80", orders=(0, 1, 2, 3))


def test_every_value_of_the_space_is_taken() -> None:
    """Values go together: each alone, and the last of all."""
    func, gpu = conv_func(Conv(n=4, h=14, w=14, c=64, m=96, dtype="float16")), gpu_for("sm_90")
    space = knob_space(func, gpu)
    assert set(space) == {"tile", "stages", "split_k", "raster"}
    assert {str(value).split("-")[0] for value in space["tile"]} == {"mma", "wgmma"}
    for name, values in space.items():
        for value in values:
            assert gemm_kernel(func, gpu, {name: value}) is not None
    assert gemm_kernel(func, gpu, {name: values[-1] for name, values in space.items()}) is not None
    wgmma = next(value for value in space["tile"] if str(value).startswith("wgmma"))
    for stages in space["stages"]:
        assert gemm_kernel(func, gpu, {"tile": wgmma, "stages": stages}) is not None


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"tile": "simt-60x64x16-2x2"}, "bm a multiple of 32"),
        ({"tile": "simt-0x64x16-2x2"}, "no extent of it may be 0"),
        ({"tile": "wgmma-64x64x64-4x1"}, "must be simt"),
        ({"tile": 7}, "must be simt"),
        ({"tile": "simt-16x32x64-1x1"}, "pieces, which must divide its 32 threads"),
        ({"stages": 0}, "the knob stages must be a whole number of at least 1, found 0"),
        ({"split_k": "2"}, "the knob split_k must be a whole number"),
        ({"raster": True}, "the knob raster must be a whole number"),
    ],
)
def test_knobs_that_cannot_be_had(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gemm_kernel(conv_func(Conv(c=3)), gpu_for("sm_80"), knobs)


def test_what_is_no_gemm_is_left_to_others() -> None:
    assert gemm_kernel(conv_func(Conv(c=16, m=16, groups=16)), gpu_for("sm_80"), {}) is None

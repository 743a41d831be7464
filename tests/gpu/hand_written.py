"""Kernels of hand-written CUDA text, to test the emulator with."""

from __future__ import annotations

from typing import Any

import emulator
import numpy as np
from emulator.launch import launch

N = 256
INPUT = np.random.default_rng(7).standard_normal(N).astype("float32")
POISON = np.full(N, -1, "float32")


SHIFT = "  s[t] = in[t];\n{between}\n  out[t] = s[(t + 32) % 256];"


def kernel(body: str, parameters: str = "const float* in, float* out") -> str:
    """CUDA text of one kernel; `t` is the thread, `s` dynamic shared memory of floats."""
    head = f'extern "C" __global__ void __launch_bounds__(256) kernel({parameters}) {{\n'
    return f"{head}  extern __shared__ float s[];\n  int t = threadIdx.x;\n{body}\n}}\n"


def both_orders(text: str, *arrays: np.ndarray, **options: Any) -> list[np.ndarray]:
    """The last array after the kernel, in each of the two orders of threads."""
    results = []
    for order in (0, 1):
        emulator.set_order(order)
        results.append(launch(text, 1, N, *arrays, **options)[-1])
    return results

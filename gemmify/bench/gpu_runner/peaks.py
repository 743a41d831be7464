"""The GPU's limits as PyTorch reaches them: multiply-adds of a large matrix product, and bytes a second of memory."""

from __future__ import annotations

from typing import Any

from .box import Box
from .peers import captured, set_precision
from .timing import Contestant, in_turns

SIZE = 8192
COPIED = 1 << 31  # bytes, far more than any cache
_DTYPES = {"float32": "float32", "tf32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


def matrix_peak(box: Box, precision: str, seed: int, share: float = 1.0) -> dict[str, Any]:
    """TFLOP/s of PyTorch's product of two square matrices of SIZE rows of random numbers."""
    torch = box.torch
    if torch is None:
        return {"skipped": box.why_no_torch}
    set_precision(torch, precision)
    generator = torch.Generator("cuda").manual_seed(seed % 2**31)
    shape, dtype = (SIZE, SIZE), getattr(torch, _DTYPES[precision])
    a, b = (torch.rand(shape, generator=generator, device="cuda").sub_(0.5).to(dtype) for _ in range(2))
    out = torch.empty(shape, dtype=dtype, device="cuda")
    contestant = captured(box, lambda: torch.mm(a, b.t(), out=out), lambda seconds: 1)
    times = _run(box, contestant, share)
    return {"times": times, "tflops": 2 * SIZE**3 / times["median"] / 1e12}


def bandwidth(box: Box, kind: str, share: float = 1.0) -> dict[str, Any]:
    """GB/s of reading (a sum), or of copying (bytes read and written), far more than the caches hold."""
    torch = box.torch
    if torch is None:
        return {"skipped": box.why_no_torch}
    source = torch.zeros(COPIED // 4, dtype=torch.float32, device="cuda")
    if kind == "read":
        contestant, moved = captured(box, lambda: torch.sum(source), lambda seconds: 1), COPIED
    else:
        target = torch.empty_like(source)
        contestant, moved = captured(box, lambda: target.copy_(source), lambda seconds: 1), 2 * COPIED
    times = _run(box, contestant, share)
    return {"times": times, "gbytes": moved / times["median"] / 1e9}


def _run(box: Box, contestant: Contestant, share: float) -> dict[str, Any]:
    try:
        return in_turns(box.cuda, {"torch": contestant}, 2 * share)["torch"]
    finally:
        contestant.close()
        box.torch.cuda.empty_cache()

"""Emptying the caches before a cold sample, with every thread that will run the layer.

One kernel does it: each thread loads a share of a buffer, one sum a cache line. On a buffer larger than the private
caches it drives out what they hold; on the tensors of `Candidate.recent` it brings those back, divided among the
threads as the layers before would have left them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm.script import tirx as T

LINE_BYTES = 64
FLUSH_BYTES = 128 << 20
"""More than any private cache holds, and about what a network's weights take. On resnet50 (102 MB of weights), 2 cores
with 2 MiB of L2 each, the layers' cold times sum to 0.79, 0.84, 0.91, 0.94, 1.03 of its profile for 4, 16, 64, 128, 256
MiB, their warm times to 0.71 to 0.77."""


def compile_touch(target: tvm.target.Target, threads: int) -> Any:
    """The kernel `(lines, out)` that reads an int32 buffer `(threads, n, 16)` and writes `(threads, 16)` sums.

    Integers, because the bytes of any tensor pass through it, and what looks like a subnormal float is slow to add.
    """

    @T.prim_func
    def main(d: T.handle, o: T.handle) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        count = T.int64()
        data = T.match_buffer(d, (threads, count, 16), "int32")
        out = T.match_buffer(o, (threads, 16), "int32")
        for thread in T.parallel(threads):
            acc = T.alloc_buffer((16,), "int32", scope="local")
            for lane in T.vectorized(16):
                acc[lane] = T.int32(0)
            for line in range(count):
                for lane in T.vectorized(16):
                    acc[lane] = acc[lane] + data[thread, line, lane]
            for lane in T.vectorized(16):
                out[thread, lane] = acc[lane]

    return tvm.compile(main, target=target)["main"]


def flush_buffer(threads: int, size: int = FLUSH_BYTES) -> np.ndarray:
    """A buffer to stream through. It is filled: pages that were never written are all one page of zeros."""
    lines = max(1, size // LINE_BYTES // threads)
    memory = np.full(threads * lines * LINE_BYTES + LINE_BYTES, 1, "uint8")
    start = -memory.ctypes.data % LINE_BYTES
    return memory[start : start + threads * lines * LINE_BYTES].view("int32").reshape(threads, lines, 16)


class Flusher:
    """Calls the touch kernel on the flush buffer and on a tensor."""

    def __init__(self, touch: Callable[..., Any], buffer: np.ndarray) -> None:
        self._touch, self._threads = touch, buffer.shape[0]
        self._buffer = tvm.runtime.from_dlpack(buffer)
        self._out = tvm.runtime.tensor(np.zeros((self._threads, 16), "int32"))

    def flush(self) -> None:
        """Read the whole buffer with all threads."""
        self._touch(self._buffer, self._out)

    def reader(self, memory: np.ndarray) -> Callable[[], None]:
        """A function that reads the lines of a contiguous array, an equal share with each thread."""
        lines = memory.nbytes // LINE_BYTES // self._threads
        if lines == 0:
            return lambda: None
        words = memory.reshape(-1).view("uint8")[: lines * self._threads * LINE_BYTES].view("int32")
        shared = tvm.runtime.from_dlpack(words.reshape(self._threads, lines, 16))
        return lambda: self._touch(shared, self._out)

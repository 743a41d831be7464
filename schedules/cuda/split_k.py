"""Split-K: blocks that have a part of the reduction each write partial sums, and a second kernel adds them up.

    partial[s][b][m][n] = sum over the k of part s
    out[index(b, m, n)] = value(partial[0] + partial[1] + ..., b, m, n)

The parts are added in order, so that the result is the same every time.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import Var

from .affine import decompose
from .block_tiles import Plan
from .contraction import Contraction, Result
from .epilogue import Store, sum_of_axes
from .names import copy_vector, named, repeat, when

THREADS = 256


def partial_result(found: Contraction, scratch: Var, part: Var) -> Result:
    """The result of the first kernel: the sum itself, where `part` is the number of the part."""
    batch, m, n = (sum_of_axes(axes, {a.var: a.var for a in axes}) for axes in (found.batch, found.m, found.n))
    index = ((part * found.size("batch") + batch) * found.size("m") + m) * found.size("n") + n
    return Result(scratch, index, found.result.acc, found.result.acc)


def emit_sum(found: Contraction, plan: Plan, scratch: Var, views: dict[Var, Var]) -> None:
    """The second kernel: a thread adds the parts of one vector of C and stores its result."""
    batch, m, n = (found.size(letter) for letter in ("batch", "m", "n"))
    known: dict[Var, Any] = {}
    width = Store(found, found.result, known, views).width
    vectors = batch * m * (n // width)
    with (
        T.launch_thread("blockIdx.x", ceil(vectors / THREADS)) as block,
        T.launch_thread("threadIdx.x", THREADS) as thread,
    ):
        at = named("at", block * THREADS + thread)
        with when(at < vectors if vectors % THREADS else None):
            which, row, column = decompose(at, [batch, m, n // width], lambda value: named("of", value))
            values = decompose(which, [axis.extent for axis in found.batch], lambda value: named("of", value))
            known.update({axis.var: value for axis, value in zip(found.batch, values, strict=True)})
            sums = T.alloc_buffer((width,), found.dtype, scope="local")
            part = T.alloc_buffer((width,), found.dtype, scope="local")
            copy_vector(sums, 0, scratch, at * width, width)
            with T.serial(1, plan.split) as s:
                copy_vector(part, 0, scratch, at * width + s * (batch * m * n), width)
                with repeat(width) as lane:
                    T.buffer_store(sums, sums[lane] + part[lane], [lane])
            store = Store(found, found.result, known, views)
            store.run(row, column * width, [sums[lane] for lane in range(width)], (False, False))

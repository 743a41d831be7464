"""A plain kernel around one compute core of schedules/cuda: C = A B^T with whole tiles, for tests of the core alone.

It has what the contract of schedules/cuda/core.py asks of a skeleton and nothing else: copies by cp.async into `stages`
stages, one barrier a stage, the accumulators written straight to memory.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from schedules.cuda import intrinsics
from schedules.cuda.core import BlockTile, Core

CHUNK_BYTES = 16
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class _Copies:
    """The copies of one operand's tile, rows x bk, by all threads of the block."""

    def __init__(self, core: Core, source, rows: int, first_row, shared, first: int) -> None:
        self.core, self.source, self.rows, self.first_row = core, source, rows, first_row
        self.shared, self.first, self.stage_elements = shared, first, rows * core.tile.bk

    def stage(self, number):
        """The element at which a stage of this operand starts."""
        return self.first + number * self.stage_elements

    def copy(self, thread, step, stage) -> None:
        tile, chunk = self.core.tile, CHUNK_BYTES // BYTES[self.core.operand]
        row_chunks = tile.bk // chunk
        for first in range(0, self.rows * row_chunks, tile.threads):
            index = thread + first
            row, column = index // row_chunks, index % row_chunks
            to = self.shared[self.stage(stage) + self.core.place(row, column)]
            source = self.source[self.first_row + row, step * tile.bk + column * chunk]
            call = intrinsics.cp_async(16, T.address_of(to), T.address_of(source), 1)
            if first + tile.threads <= self.rows * row_chunks:
                T.evaluate(call)
            else:
                with T.If(index < self.rows * row_chunks), T.Then():
                    T.evaluate(call)


def core_kernel(core_class: type[Core], tile: BlockTile, operand: str, blocks: tuple[int, int], steps: int):
    """PrimFunc of A[m, k], B[n, k] -> C[m, n] float32, m = blocks[0] x bm, n = blocks[1] x bn, k = steps x bk."""
    core = core_class(tile, operand, "float32")
    m, n, k = blocks[0] * tile.bm, blocks[1] * tile.bn, steps * tile.bk
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        a = T.arg("A", T.buffer((m, k), operand))
        b = T.arg("B", T.buffer((n, k), operand))
        c = T.arg("C", T.buffer((m, n), "float32"))
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        block_m = T.launch_thread("blockIdx.x", blocks[0])
        block_n = T.launch_thread("blockIdx.y", blocks[1])
        thread = T.launch_thread("threadIdx.x", tile.threads)
        with block_m as x, block_n as y, thread as tx:
            _body(core, a, b, c, x, y, tx, steps)
    return builder.get()


def _body(core: Core, a, b, c, x, y, thread, steps: int) -> None:
    tile = core.tile
    elements = tile.stages * tile.bm * tile.bk, tile.stages * tile.bn * tile.bk
    shared = T.alloc_buffer((sum(elements),), core.operand, scope="shared.dyn", align=core.alignment)
    intrinsics.keep_size(shared, sum(elements))
    copies = (
        _Copies(core, a, tile.bm, x * tile.bm, shared, 0),
        _Copies(core, b, tile.bn, y * tile.bn, shared, elements[0]),
    )
    core.begin(thread)
    ahead = tile.stages - 1 - core.in_flight
    assert ahead >= 1
    for step in range(ahead):
        if step < steps:
            for operand in copies:
                operand.copy(thread, step, step)
        T.evaluate(intrinsics.cp_async_commit())
    with T.serial(steps) as step:
        T.evaluate(intrinsics.cp_async_wait(ahead - 1))
        core.filled()
        T.evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared.dyn"))
        with T.If(step + ahead < steps), T.Then():
            for operand in copies:
                operand.copy(thread, step + ahead, (step + ahead) % tile.stages)
        T.evaluate(intrinsics.cp_async_commit())
        stage = T.Bind(step % tile.stages)
        core.multiply(shared, copies[0].stage(stage), shared, copies[1].stage(stage))
        core.settle()
    core.finish()

    def store(row, column, values) -> None:
        for i, value in enumerate(values):
            T.buffer_store(c, value, [x * tile.bm + row, y * tile.bn + column + i])

    core.visit(store)

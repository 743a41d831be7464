"""Tensor cores of a warp group: wgmma.mma_async of sm_90, both operands straight from shared memory.

Four warps multiply 64 rows by up to 256 columns with one instruction, which reads both operands through descriptors:
a stage's rows are 128 bytes long (64 halves, 32 of TF32) and lie in the hardware's 128-byte swizzle. The warp groups of
a block divide its rows (warps_m = 4 x groups) and may divide its columns (warps_n). The multiplications of one stage
are a group, and one group stays in flight: while the tensor cores work, the threads already copy, wait and meet for the
next stage.

TF32: the hardware cuts the lower 13 bits of an operand off, it does not round them as mma.py does.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from . import intrinsics
from .core import BlockTile, Core, Visit
from .device import MAX_REGISTERS, MAX_THREADS, Gpu
from .mma import OPERANDS, chunk_elements, refuses_types, swizzled

GROUP_WARPS, GROUP_THREADS = 4, 128
"""A warp group."""
ROWS = 64
"""Rows of C that one instruction covers."""
MAX_COLUMNS = 256
ROW_BYTES = 128
"""What a row of a stage takes: the width of the swizzle."""
_STEP_BYTES = 32
_OVERHEAD = 40  # registers of addresses, descriptors, loop counters and copies beside the accumulators


class WgmmaCore(Core):
    """wgmma with (bm / (warps_m / 4)) x (bn / warps_n) of C for every warp group."""

    alignment = 1024
    in_flight = 1

    @staticmethod
    def refuses(tile: BlockTile, operand: str, accumulator: str, gpu: Gpu) -> str | None:
        """Needs sm_90 alone, 128 bytes a row, whole warp groups of 64 rows and 8 to 256 columns, and the registers."""
        reason = refuses_types(operand, accumulator, gpu)
        if reason is not None:
            return reason
        if not gpu.warp_group:
            return f"warp groups need sm_90 alone, got {', '.join(gpu.archs)}"
        if tile.bk * OPERANDS[operand] != ROW_BYTES:
            return f"warp groups need stages of {ROW_BYTES} bytes a row, got bk = {tile.bk} of {operand}"
        if tile.warps_m % GROUP_WARPS or tile.bm % (tile.warps_m // GROUP_WARPS * ROWS):
            return f"warp groups need 4 warps for every multiple of {ROWS} rows, got {tile.warps_m} for {tile.bm} rows"
        columns = tile.bn // tile.warps_n
        if tile.bn % (tile.warps_n * 8) or columns > MAX_COLUMNS:
            return f"a warp group needs a multiple of 8 columns up to {MAX_COLUMNS}, got {tile.bn} for {tile.warps_n}"
        if tile.threads > MAX_THREADS:
            return f"a block has at most {MAX_THREADS} threads, got {tile.threads}"
        if WgmmaCore.registers(tile) > MAX_REGISTERS:
            return f"a thread has at most {MAX_REGISTERS} registers, got about {WgmmaCore.registers(tile)}"
        return None

    @staticmethod
    def registers(tile: BlockTile) -> int:
        """The accumulators and the addresses: operands take none."""
        return tile.bm * tile.bn // tile.threads + _OVERHEAD

    def __init__(self, tile: BlockTile, operand: str, accumulator: str) -> None:
        super().__init__(tile, operand, accumulator)
        self.chunk = chunk_elements(operand)
        self.row_chunks = tile.bk // self.chunk
        self.groups_n = tile.warps_n
        self.tiles_m = tile.bm // (tile.warps_m // GROUP_WARPS) // ROWS
        self.columns = tile.bn // tile.warps_n
        self.tile_registers = self.columns // 2

    def place(self, row: Any, chunk: Any) -> Any:
        return swizzled(row, chunk, self.row_chunks) * self.chunk

    def begin(self, thread: Any) -> None:
        self.thread = thread
        held = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(held, thread // GROUP_THREADS, [0])
        T.evaluate(intrinsics.uniform(T.address_of(held[0])))
        group = held[0]
        self.group_row = T.Bind(group // self.groups_n * (self.tiles_m * ROWS))
        self.group_column = T.Bind(group % self.groups_n * self.columns)
        self.c = T.alloc_buffer((self.tiles_m * self.tile_registers,), "float32", scope="local")
        for i in range(self.tiles_m * self.tile_registers):
            T.buffer_store(self.c, T.float32(0), [i])

    def filled(self) -> None:
        T.evaluate(intrinsics.fence_proxy_async())

    def multiply(self, a: Any, a_offset: Any, b: Any, b_offset: Any) -> None:
        bk, size = self.tile.bk, OPERANDS[self.operand]
        step_k = _STEP_BYTES // size
        from_a = T.Bind(a_offset + self.group_row * bk)
        from_b = T.Bind(b_offset + self.group_column * bk)
        T.evaluate(intrinsics.wgmma_fence())
        for k in range(0, bk, step_k):
            for i in range(self.tiles_m):
                # One address for all: the descriptor is then made once a stage, and an addition gives the others.
                c, row, column = (T.address_of(e) for e in (self.c[i * self.tile_registers], a[from_a], b[from_b]))
                at_a, at_b = (i * ROWS * bk + k) * size, k * size
                T.evaluate(intrinsics.wgmma(self.operand, self.columns, c, row, at_a, column, at_b))
        T.evaluate(intrinsics.wgmma_commit())

    def settle(self) -> None:
        T.evaluate(intrinsics.wgmma_wait(self.in_flight))

    def finish(self) -> None:
        T.evaluate(intrinsics.wgmma_wait(0))
        T.evaluate(intrinsics.hold(self.tiles_m * self.tile_registers, T.address_of(self.c[0])))

    def visit(self, visit: Visit) -> None:
        lane = T.Bind(self.thread % 32)
        row = T.Bind(self.group_row + self.thread // 32 % GROUP_WARPS * 16 + lane // 4)
        column = T.Bind(self.group_column + lane % 4 * 2)
        for i in range(self.tiles_m):
            for j in range(self.columns // 8):
                for h in range(2):
                    first = i * self.tile_registers + 4 * j + 2 * h
                    visit(row + (i * ROWS + 8 * h), column + j * 8, [self.c[first], self.c[first + 1]])

"""The core of the CUDA cores: multiply-adds on a register tile of `tm x tn` elements a thread.

A warp's lanes are laid 4 x 8 over its part of C. A lane has rows and columns in runs of 4:

    lane_m = lane % 2 + 2 (lane / 16)               lane_n = lane / 2 % 8
    row(i) = 4 lane_m + 16 (i / 4) + i % 4          i < tm
    column(j) = 4 lane_n + 32 (j / 4) + j % 4       j < tn

Both operands lie along k, so that one 128-bit read gives a row's next `chunk` steps (4 of float32): tm + tn reads for
tm tn chunk multiply-adds, as in the form that lies along m. A read of 128 bits is answered in 4 parts, but in 2 where
lane and lane ^ 1, or lane and lane ^ 2, ask for the same: neighbours share a column, lanes 2 apart share a row.

After every 4 rows of a stage one chunk stays empty. The lanes that are answered together read at most 8 rows, 4 apart,
whose chunks then lie in 8 different groups of 4 banks; the 8 chunks that 8 threads copy together do so as well.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .core import BlockTile, Core, Visit
from .device import MAX_REGISTERS, Gpu
from .names import copy_vector, named, repeat

LANES_M, LANES_N, RUN = 4, 8, 4
CHUNK = {"float32": 4, "float64": 2}
"""Elements of 16 bytes."""
_SPARE = 56
"""Registers for addresses, counters and reads ahead, as ptxas takes them; every 16 of `bk` are 8 more."""


def thread_tile(tile: BlockTile) -> tuple[int, int]:
    """Rows and columns of C that one thread holds."""
    return tile.bm // (tile.warps_m * LANES_M), tile.bn // (tile.warps_n * LANES_N)


class SimtCore(Core):
    """C += A B^T by the multiply-adds of float32 or float64."""

    run = RUN

    @staticmethod
    def refuses(tile: BlockTile, operand: str, accumulator: str, gpu: Gpu) -> str | None:
        if operand not in CHUNK or accumulator != operand:
            return f"needs float32 or float64 for operands and sums, got {operand} and {accumulator}"
        step_m, step_n = tile.warps_m * LANES_M * RUN, tile.warps_n * LANES_N * RUN
        if tile.bm % step_m or tile.bn % step_n:
            return f"needs bm a multiple of {step_m} and bn one of {step_n}, got {tile.bm} x {tile.bn}"
        if tile.bk % CHUNK[operand]:
            return f"needs bk a multiple of {CHUNK[operand]}, got {tile.bk}"
        if _registers(tile, operand) > MAX_REGISTERS:
            return f"needs {_registers(tile, operand)} registers a thread, there are {MAX_REGISTERS}"
        return None

    @staticmethod
    def registers(tile: BlockTile) -> int:
        return _registers(tile, "float32")

    @property
    def chunk(self) -> int:
        """Elements of 16 bytes."""
        return CHUNK[self.operand]

    def place(self, row: Any, chunk: Any) -> Any:
        per_row = self.tile.bk // self.chunk
        return (row * per_row + chunk + row // RUN) * self.chunk

    def stage_elements(self, rows: int) -> int:
        return rows * self.tile.bk + -(-rows // RUN) * self.chunk

    def begin(self, thread: Any) -> None:
        tile, (self.tm, self.tn) = self.tile, thread_tile(self.tile)
        warp, lane = tirx.floordiv(thread, 32), tirx.floormod(thread, 32)
        warp_m, warp_n = tirx.floormod(warp, tile.warps_m), tirx.floordiv(warp, tile.warps_m)
        lane_m = tirx.floormod(lane, 2) + tirx.floordiv(lane, 2 * LANES_N) * 2
        lane_n = tirx.floormod(tirx.floordiv(lane, 2), LANES_N)
        first_row = warp_m * (tile.bm // tile.warps_m) + lane_m * RUN
        first_column = warp_n * (tile.bn // tile.warps_n) + lane_n * RUN
        self.first_row, self.first_column = named("first_row", first_row), named("first_column", first_column)
        self.sums = T.alloc_buffer((self.tm * self.tn,), self.accumulator, scope="local")
        self.of_a = T.alloc_buffer((self.chunk,), self.operand, scope="local")
        self.of_b = T.alloc_buffer((self.tn * self.chunk,), self.operand, scope="local")
        with repeat(self.tm * self.tn) as i:
            T.buffer_store(self.sums, tirx.const(0, self.accumulator), [i])

    def row(self, i: Any) -> Any:
        """Row `i` of the thread, relative to the block."""
        return self.first_row + i // RUN * (RUN * LANES_M) + i % RUN

    def column(self, j: Any) -> Any:
        """Column `j` of the thread, relative to the block."""
        return self.first_column + j // RUN * (RUN * LANES_N) + j % RUN

    def multiply(self, a: Any, a_offset: Any, b: Any, b_offset: Any) -> None:
        chunk = self.chunk
        with repeat(self.tile.bk // chunk) as c:
            with repeat(self.tn) as j:
                copy_vector(self.of_b, j * chunk, b, b_offset + self._place(self.column, j, c), chunk)
            with repeat(self.tm) as i:
                copy_vector(self.of_a, 0, a, a_offset + self._place(self.row, i, c), chunk)
                with repeat(chunk) as e, repeat(self.tn) as j:
                    at = i * self.tn + j
                    T.buffer_store(self.sums, self.sums[at] + self.of_a[e] * self.of_b[j * chunk + e], [at])

    def _place(self, where: Any, index: Any, chunk: Any) -> Any:
        """`place` of a thread's row or column, written so that the thread's part is one sum and the rest constants."""
        step = RUN * (LANES_M if where == self.row else LANES_N)
        first = self.first_row if where == self.row else self.first_column
        per_row = self.tile.bk // self.chunk
        runs, within = tirx.floordiv(index, RUN), tirx.floormod(index, RUN)
        fixed = runs * (step * per_row + step // RUN) + within * per_row + chunk
        return self.place(first, 0) + fixed * self.chunk

    def visit(self, visit: Visit) -> None:
        for i in range(self.tm):
            for j in range(0, self.tn, RUN):
                visit(self.row(i), self.column(j), [self.sums[i * self.tn + j + e] for e in range(RUN)])


def _registers(tile: BlockTile, operand: str) -> int:
    tm, tn = thread_tile(tile)
    words = 16 // CHUNK[operand] // 4
    return (tm * tn + (tm + tn) * CHUNK[operand]) * words + _SPARE + tile.bk // 16 * 8

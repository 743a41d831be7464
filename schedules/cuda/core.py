"""How a block multiplies: the contract between the GEMM's skeleton (gemm.py) and its compute cores.

The skeleton owns the grid, the copies of both operands to shared memory, the pipeline of stages, split-K and the
epilogue. A core owns what happens on one stage in shared memory, and knows which thread holds which element of C:

    A stage [bm][bk], B stage [bn][bk], both with k contiguous, in 16-byte chunks of `chunk` elements; the chunk `c` of
    row `r` lies at element `core.place(r, c)` of its operand's stage buffer.
    C += A B^T in registers of `accumulator`.

Cores: simt.py (multiply-adds of the CUDA cores), mma.py (mma.sync of the tensor cores), wgmma.py (sm_90's warp groups).
Buffers that only device functions touch (both stages, by cp.async) need `intrinsics.keep_size`, or TVM cuts their end.
All code is emitted with TVMScript's builder inside the skeleton's frames: `tvm.script.ir_builder.tirx` as T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .device import Gpu

Visit = Callable[[Any, Any, list[Any]], None]
"""`visit(row, column, values)`: `values` are consecutive columns of one row of the block's C, as scalars; `row` and
`column` are expressions of the thread, relative to the block's tile."""


@dataclass(frozen=True)
class BlockTile:
    """A block computes `bm x bn` of C, `bk` of the reduction a stage; its warps are laid `warps_m x warps_n`."""

    bm: int
    bn: int
    bk: int
    warps_m: int
    warps_n: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n


class Core(ABC):
    """A compute core for one `BlockTile`; made once a kernel, its methods emit TIR.

    `operand` is the dtype in shared memory ("float32", "float16", "bfloat16"), `accumulator` that of C ("float32",
    "float64" ...). `refuses` is asked before anything is made.
    """

    alignment: int = 128
    """Every stage buffer of both operands starts at a multiple of this many bytes of shared memory."""
    run: int = 2
    """How many consecutive columns of a row `visit` gives at once."""
    in_flight: int = 0
    """How many of the last calls of `multiply` may still read their stages after `settle`: the skeleton overwrites the
    stage of call i only after `settle` of call i + in_flight has returned in every thread, and one more barrier."""

    def __init__(self, tile: BlockTile, operand: str, accumulator: str) -> None:
        self.tile, self.operand, self.accumulator = tile, operand, accumulator

    @staticmethod
    @abstractmethod
    def refuses(tile: BlockTile, operand: str, accumulator: str, gpu: Gpu) -> str | None:
        """Why this core cannot be made for `tile` on `gpu`, in one clause, or None."""

    @staticmethod
    @abstractmethod
    def registers(tile: BlockTile) -> int:
        """An estimate of the registers that a thread needs, to prune the space before anything is compiled."""

    @abstractmethod
    def place(self, row: Any, chunk: Any) -> Any:
        """Element offset, within an operand's stage buffer, of 16-byte chunk `chunk` of row `row`; a permutation of the
        chunks of the stage chosen so that neither the copies nor the reads meet in one bank."""

    def stage_elements(self, rows: int) -> int:
        """Elements that a stage of an operand of `rows` rows takes; more than `rows * bk` where `place` leaves gaps."""
        return rows * self.tile.bk

    @abstractmethod
    def begin(self, thread: Any) -> None:
        """Allocate the accumulators and set them to 0. `thread` is threadIdx.x in 0 .. tile.threads - 1."""

    def filled(self) -> None:  # noqa: B027
        """Emit what a thread must do when its copies into a stage have arrived, before the barrier that shows them."""

    @abstractmethod
    def multiply(self, a: Any, a_offset: Any, b: Any, b_offset: Any) -> None:
        """Emit C += A B^T for one stage. `a`, `b` are flat buffers in shared memory, the stage starts at the given
        element offsets; every thread of the block has passed a barrier after the stage was filled."""

    def settle(self) -> None:  # noqa: B027
        """Emit what must follow `multiply` once the next copies have been started: all but the last `in_flight` calls
        have then read their stages. Where in_flight > 0 the skeleton starts copies between the two."""

    def finish(self) -> None:  # noqa: B027
        """Emit what must follow the last `multiply` before accumulators are read (wait for asynchronous work)."""

    @abstractmethod
    def visit(self, visit: Visit) -> None:
        """Emit `visit(row, column, values)` for every run of accumulators that this thread holds, fully unrolled."""

"""Tensor cores of a warp: mma.sync on fragments that ldmatrix reads.

Every warp owns a rectangle of the block's C. One step of the reduction is 32 bytes of every row: 16 deep for float16
and bfloat16, 8 for TF32, and the two are the same code, because a matrix of ldmatrix is 8 rows of 16 bytes whatever
they mean. In every step a warp reads rows x 32 bytes of A and columns x 32 bytes of B and multiplies all pairs of 16
rows and 8 columns; while one step is multiplied the next one's fragments are read.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from . import intrinsics
from .core import BlockTile, Core, Visit
from .device import MAX_REGISTERS, MAX_THREADS, WARP, Gpu

OPERANDS = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of an operand of the tensor cores; float32 is rounded to TF32."""
ROWS, COLUMNS = 16, 8
"""What one instruction covers of C."""
_CHUNK_BYTES = 16
_LINE = 8  # chunks that lie side by side in all banks of shared memory
_STEP_CHUNKS = 2
_OVERHEAD = 40  # registers of addresses, loop counters and copies, as ptxas counts them
_LEAST = 96  # small warp tiles: the copies' addresses then take more than the product does


def swizzled(row: Any, chunk: Any, row_chunks: int) -> Any:
    """Chunk number, in a stage of rows of `row_chunks` (a power of two) 16-byte chunks, of chunk `chunk` of row `row`.

    Rows that would start in the same bank have their chunks permuted by XOR, so that the same chunk of 8 consecutive
    rows (what ldmatrix reads at a time) lies in 8 different groups of banks; 128 bytes that belong together stay
    together, so that a copy of whole rows has no conflicts either. Rows of 128 bytes give the hardware's swizzle.
    """
    return row * row_chunks + (chunk ^ row_key(row, row_chunks))


def row_key(row: Any, row_chunks: int) -> Any:
    """What the chunks of row `row` are XORed with; the same for rows that are 8 apart."""
    rows_a_line = max(1, _LINE // row_chunks)
    return row // rows_a_line % min(row_chunks, _LINE)


def chunk_elements(operand: str) -> int:
    """Elements of `operand` in 16 bytes."""
    return _CHUNK_BYTES // OPERANDS[operand]


def refuses_types(operand: str, accumulator: str, gpu: Gpu) -> str | None:
    """Why the tensor cores of `gpu` do not multiply `operand` into `accumulator`, or None."""
    if operand not in OPERANDS:
        return f"tensor cores need operands of {', '.join(OPERANDS)}, got {operand}"
    if accumulator != "float32":
        return f"tensor cores sum in float32 here, got {accumulator}"
    if operand != "float16" and not gpu.bfloat16:
        major, minor = gpu.capability
        return f"tensor cores take {operand} from sm_80 on, got sm_{major}{minor}"
    return None


class MmaCore(Core):
    """mma.sync with a warp tile of (bm / warps_m) x (bn / warps_n)."""

    @staticmethod
    def refuses(tile: BlockTile, operand: str, accumulator: str, gpu: Gpu) -> str | None:
        """Needs warp tiles of whole instructions, rows of a power of two of 32 bytes and registers enough."""
        reason = refuses_types(operand, accumulator, gpu)
        if reason is not None:
            return reason
        row_bytes = tile.bk * OPERANDS[operand]
        if row_bytes < _STEP_CHUNKS * _CHUNK_BYTES or row_bytes & (row_bytes - 1):
            return f"a stage's rows must be a power of two of at least 32 bytes, got bk = {tile.bk} of {operand}"
        if tile.bm % (tile.warps_m * ROWS) or tile.bn % (tile.warps_n * COLUMNS):
            return (
                f"warp tiles must be multiples of {ROWS} x {COLUMNS}, "
                f"got {tile.bm} x {tile.bn} for {tile.warps_m} x {tile.warps_n} warps"
            )
        if tile.threads > MAX_THREADS:
            return f"a block has at most {MAX_THREADS} threads, got {tile.threads}"
        if MmaCore.registers(tile) > MAX_REGISTERS:
            return f"a thread has at most {MAX_REGISTERS} registers, got about {MmaCore.registers(tile)}"
        return None

    @staticmethod
    def registers(tile: BlockTile) -> int:
        """Accumulators, fragments and the addresses. ptxas shares most registers of the two steps of fragments."""
        rows, columns = tile.bm // tile.warps_m, tile.bn // tile.warps_n
        fragments = rows // ROWS * 4 + columns // COLUMNS * 2
        return max(_LEAST, rows * columns // WARP + fragments + _OVERHEAD)

    def __init__(self, tile: BlockTile, operand: str, accumulator: str) -> None:
        super().__init__(tile, operand, accumulator)
        self.chunk = chunk_elements(operand)
        self.row_chunks = tile.bk // self.chunk
        self.tiles_m = tile.bm // tile.warps_m // ROWS
        self.tiles_n = tile.bn // tile.warps_n // COLUMNS
        self.steps = self.row_chunks // _STEP_CHUNKS

    def place(self, row: Any, chunk: Any) -> Any:
        return swizzled(row, chunk, self.row_chunks) * self.chunk

    def begin(self, thread: Any) -> None:
        self._lanes(thread)
        count = self.tiles_m * self.tiles_n * 4
        self.c = T.alloc_buffer((count,), "float32", scope="local")
        self.fragments_a = T.alloc_buffer((2 * self.tiles_m * 4,), "uint32", scope="local")
        self.fragments_b = T.alloc_buffer((2 * self.tiles_n * 2,), "uint32", scope="local")
        intrinsics.keep_size(self.fragments_a, 2 * self.tiles_m * 4)
        intrinsics.keep_size(self.fragments_b, 2 * self.tiles_n * 2)
        for i in range(count):
            T.buffer_store(self.c, T.float32(0), [i])

    def _lanes(self, thread: Any) -> None:
        """The parts of this lane's addresses that no loop changes.

        The matrices of an A fragment are rows 0 .. 7 and 8 .. 15 of chunk 0, then of chunk 1, so lanes 0 .. 15 name the
        rows of chunk 0; those of two B fragments are chunk 0 and 1 of columns 0 .. 7, then of columns 8 .. 15.
        """
        lane = T.Bind(thread % WARP)
        warp = T.Bind(thread // WARP)
        self.lane = lane
        self.warp_row = T.Bind(warp // self.tile.warps_n * (self.tiles_m * ROWS))
        self.warp_column = T.Bind(warp % self.tile.warps_n * (self.tiles_n * COLUMNS))
        key = row_key(lane % 8, self.row_chunks)
        row, column = self.warp_row + lane % ROWS, self.warp_column + lane % 8
        # An odd last fragment of B is read by lanes 0 .. 15 alone (x2): the others' rows do not matter to it.
        self.row_a, self.key_a = T.Bind(row * self.tile.bk), T.Bind((key ^ (lane // ROWS)) * self.chunk)
        self.row_b, self.key_b = T.Bind(column * self.tile.bk), T.Bind((key ^ (lane // 8 % 2)) * self.chunk)
        self.pair_b = T.Bind(lane // 16 * (COLUMNS * self.tile.bk))

    def multiply(self, a: Any, a_offset: Any, b: Any, b_offset: Any) -> None:
        from_a, from_b = T.Bind(a_offset + self.row_a), T.Bind(b_offset + self.row_b)
        self._read(0, a, from_a, b, from_b)
        for step in range(self.steps):
            if step + 1 < self.steps:
                self._read(step + 1, a, from_a, b, from_b)
            self._multiply_step(step % 2)

    def _read(self, step: int, a: Any, from_a: Any, b: Any, from_b: Any) -> None:
        """Read the fragments of `step` into its half of the registers."""
        half, first = step % 2, _STEP_CHUNKS * step * self.chunk
        bk, registers = self.tile.bk, []
        chunk_a, chunk_b = (self.key_a ^ first, self.key_b ^ first) if first else (self.key_a, self.key_b)
        for i in range(self.tiles_m):
            register = (half * self.tiles_m + i) * 4
            row = a[from_a + chunk_a + i * ROWS * bk]
            T.evaluate(intrinsics.ldmatrix(4, T.address_of(self.fragments_a[register]), T.address_of(row)))
            registers += [self.fragments_a[register + e] for e in range(4)]
        for j in range(0, self.tiles_n, 2):
            register, pair = (half * self.tiles_n + j) * 2, j + 1 < self.tiles_n
            offset = from_b + chunk_b + j * COLUMNS * bk
            row = b[offset + self.pair_b] if pair else b[offset]
            count = 4 if pair else 2
            T.evaluate(intrinsics.ldmatrix(count, T.address_of(self.fragments_b[register]), T.address_of(row)))
            registers += [self.fragments_b[register + e] for e in range(count)]
        if self.operand == "float32":
            for value in registers:
                T.evaluate(intrinsics.round_tf32(T.address_of(value)))

    def _multiply_step(self, half: int) -> None:
        """All pairs of fragments; every other row of them backwards, so that one operand stays where it was."""
        for i in range(self.tiles_m):
            columns = range(self.tiles_n) if i % 2 == 0 else reversed(range(self.tiles_n))
            for j in columns:
                c = self.c[(i * self.tiles_n + j) * 4]
                a = self.fragments_a[(half * self.tiles_m + i) * 4]
                b = self.fragments_b[(half * self.tiles_n + j) * 2]
                T.evaluate(intrinsics.mma(self.operand, *(T.address_of(register) for register in (c, a, b))))

    def visit(self, visit: Visit) -> None:
        row = T.Bind(self.warp_row + self.lane // 4)
        column = T.Bind(self.warp_column + self.lane % 4 * 2)
        for i in range(self.tiles_m):
            for j in range(self.tiles_n):
                first = (i * self.tiles_n + j) * 4
                for h in range(2):
                    values = [self.c[first + 2 * h], self.c[first + 2 * h + 1]]
                    visit(row + (i * ROWS + 8 * h), column + j * COLUMNS, values)

"""A GEMM in a kernel of its own: grid, pipeline of stages in shared memory, a core that multiplies, the epilogue.

    for every block of `threads`: (column tile in its group, row tile, group, batch, part of k) = blockIdx.x
        copy stages 0 .. ahead - 1 of A and B
        for step in the stages of k:
            wait until stage `step` is there; barrier
            start copying stage `step + ahead`
            C += A B^T                                         (the core: simt.py, mma.py, wgmma.py)
        store the epilogue of C                                (epilogue.py), or partial sums (split_k.py)

`ahead` is the number of stages less the one that is multiplied, and less those that a core still reads. All indices are
of 32 bits: the driver refuses tensors of 2^31 elements and more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc, Var

from .affine import decompose
from .block_tiles import Plan
from .contraction import Contraction, Result, contraction_of
from .core import Core
from .device import REGISTERS_PER_SM, Gpu
from .epilogue import Store, emit_epilogue, staged_elements, straight
from .gemm_choice import choose, core_of
from .intrinsics import cp_async_commit, cp_async_wait
from .loads import ELEMENT, Loader, copy_cost
from .names import named, repeat, shared_memory, when
from .split_k import emit_sum, partial_result

SCRATCH_ATTR = "gemmify.scratch"
TF32_ATTR = "gemmify.tf32"


def gemm_kernel(func: PrimFunc, gpu: Gpu, knobs: Mapping[str, int | str] | None = None) -> PrimFunc | None:
    """The function as a GEMM of the GPU, or None where it is none, or one of a single row and column a batch.

    `func` has the block that is annotated `gemmify.axes` and at most one that reads it. Partial sums of a split
    reduction become an output parameter before the last one, counted by the attribute `gemmify.scratch`. ValueError for
    knobs that this GEMM cannot have.
    """
    found = contraction_of(func)
    if isinstance(found, str) or not worth(found):
        return None
    tf32 = bool(func.attrs and TF32_ATTR in func.attrs and int(func.attrs[TF32_ATTR]))
    plan, core_type = choose(found, gpu, dict(knobs or {}), tf32)
    return emit(func, found, plan, core_of(core_type, plan.tile, found), gpu)


def worth(found: Contraction) -> bool:
    """Whether rows of A meet more than one column: a product of single columns reuses nothing."""
    return found.size("n") > 1 and found.size("k") >= 1


@dataclass(frozen=True)
class Shared:
    """Where the stages lie in the block's shared memory, in elements of the operands, and how many bytes it has."""

    a_stage: int
    b_stage: int
    b_start: int
    size: int

    @staticmethod
    def of(core: Core, staged: bool) -> Shared:
        element = ELEMENT[core.operand]
        step = core.alignment // element

        def aligned(elements: int) -> int:
            return -(-elements // step) * step

        a, b = (aligned(core.stage_elements(rows)) for rows in (core.tile.bm, core.tile.bn))
        start = core.tile.stages * a
        size = (start + core.tile.stages * b) * element
        if staged:
            size = max(size, staged_elements(core) * ELEMENT[core.accumulator])
        return Shared(a, b, start, size)


def emit(func: PrimFunc, found: Contraction, plan: Plan, core: Core, gpu: Gpu) -> PrimFunc:
    """The scheduled function."""
    split = plan.split > 1
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(_name(func))
        params = _params(func, found, plan)
        scratch = params[len(func.params) - 1] if split else None
        views = {view: _flat(params[_place(func, real, split)]) for real, view in _real(found)}
        out = _flat(params[-1])
        views_of = {**views, found.result.buffer: out}
        if scratch is None:
            emit_kernel(found, plan, core, gpu, found.result, views_of)
        else:
            partial = partial_result(found, scratch, SPLIT)
            emit_kernel(found, plan, core, gpu, partial, {**views_of, scratch: scratch})
            emit_sum(found, plan, scratch, views_of)
    made = builder.get()
    for key, value in (dict(func.attrs) if func.attrs else {}).items():
        made = made.with_attr(str(key), value)
    return made.with_attr(SCRATCH_ATTR, 1) if split else made


def _name(func: PrimFunc) -> str:
    return str(func.attrs["global_symbol"]) if func.attrs and "global_symbol" in func.attrs else "main"


def _params(func: PrimFunc, found: Contraction, plan: Plan) -> list[Var]:
    """Parameters of the new function, those of the old one with the scratch before the last."""
    params = [(p.name, [int(extent) for extent in p.shape], str(p.dtype)) for p in func.params]
    if plan.split > 1:
        size = plan.split * found.size("batch") * found.size("m") * found.size("n")
        params.insert(len(params) - 1, ("partial", [size], found.dtype))
    return [T.arg(name, T.buffer(shape, dtype, layout=None)) for name, shape, dtype in params]


def _place(func: PrimFunc, real: Var, split: bool) -> int:
    at = next(i for i, param in enumerate(func.params) if param.same_as(real))
    return at + 1 if split and at == len(func.params) - 1 else at


def _real(found: Contraction) -> list[tuple[Var, Var]]:
    return list(found.views.views.items())


def _flat(param: Var) -> Var:
    size = 1
    for extent in param.shape:
        size *= int(extent)
    return T.decl_buffer((size,), str(param.dtype), data=param.data, layout=None)


def emit_kernel(found: Contraction, plan: Plan, core: Core, gpu: Gpu, result: Result, views: dict[Var, Var]) -> None:
    """One launch: the product, its result stored as `result` says."""
    tile = plan.tile
    tiles_m, tiles_n = ceil(found.size("m") / tile.bm), ceil(found.size("n") / tile.bn)
    blocks = tiles_m * tiles_n * found.size("batch") * plan.split
    resident = resident_blocks(core, copy_cost(found, tile, gpu)[0], gpu)
    with (
        T.launch_thread("blockIdx.x", blocks) as block,
        T.launch_thread("threadIdx.x", tile.threads) as thread,
        T.attr(tirx.const(0, "int32"), RESIDENT_ATTR, resident),
    ):
        row, column, batch, part = _block(block, plan, tiles_m, tiles_n, found)
        known = {axis.var: value for axis, value in zip(found.batch, batch, strict=True)}
        if plan.split > 1:
            known[SPLIT] = part
        store = Store(found, result, known, views)
        staged = not straight(core, store)
        shared = Shared.of(core, staged)
        memory = shared_memory(shared.size // ELEMENT[core.operand], core.operand, core.alignment)
        _multiply(found, plan, core, gpu, (row, column, part, thread), (known, views), (memory, shared))
        if staged:
            T.evaluate(T.tvm_storage_sync("shared.dyn"))
        sums = None
        if staged:
            elements = shared.size // ELEMENT[core.accumulator]
            sums = T.decl_buffer((elements,), core.accumulator, data=memory.data, scope="shared.dyn", layout=None)
        emit_epilogue(core, store, row, column, thread, sums)


RESIDENT_ATTR = "tirx.launch_bounds_min_blocks_per_sm"


def resident_blocks(core: Core, extra: int, gpu: Gpu) -> int:
    """Blocks of a multiprocessor that the compiler leaves registers for, `extra` of a thread for the copies: without
    it, it takes all that there are."""
    per_thread = -(-(core.registers(core.tile) + extra) // 8) * 8
    most = min(REGISTERS_PER_SM // (core.tile.threads * per_thread), gpu.threads_per_sm // core.tile.threads)
    return max(1, most)


SPLIT = Var("part", "int32")
"""Which part of the reduction a block has, in the index of its partial sums."""


def _block(block: Any, plan: Plan, tiles_m: int, tiles_n: int, found: Contraction) -> tuple[Any, Any, list[Any], Any]:
    """First row and first column of the block, its batch axes and its part of k.

    The blocks that run at a time are neighbours: `raster` column tiles, then the next row tile, so that they share rows
    and columns in the L2."""
    width = plan.raster if tiles_n % plan.raster == 0 else 1
    outer = [plan.split, *(axis.extent for axis in found.batch), tiles_n // width, tiles_m, width]
    part, *rest = decompose(block, outer, lambda value: named("block", value))
    *batch, group, at_m, within = rest
    column = named("first_n", (group * width + within) * plan.tile.bn)
    return named("first_m", at_m * plan.tile.bm), column, batch, part


def _multiply(
    found: Contraction,
    plan: Plan,
    core: Core,
    gpu: Gpu,
    at: tuple[Any, Any, Any, Any],
    names: tuple[dict[Var, Any], dict[Var, Var]],
    memory: tuple[Var, Shared],
) -> None:
    """The pipeline over the stages of k; at its end every stage has been multiplied in this thread."""
    row, column, part, thread = at
    buffer, shared = memory
    tile = plan.tile
    steps = ceil(ceil(found.size("k") / tile.bk) / plan.split)
    every = ceil(found.size("k") / tile.bk)
    first = named("first_step", part * steps) if plan.split > 1 else 0
    count: Any = steps
    if plan.split > 1 and every % steps:
        count = named("steps", tirx.min(tirx.const(steps, "int32"), every - first))
    a, b = Loader("a", found, core, gpu), Loader("b", found, core, gpu)
    batch = {var: value for var, value in names[0].items() if not var.same_as(SPLIT)}
    a.prepare(thread, row, batch, names[1], buffer)
    b.prepare(thread, column, batch, names[1], buffer)
    core.begin(thread)
    ahead = tile.stages - 1 - core.in_flight
    assert ahead >= 1, "a plan has enough stages for its core"
    lands = a.pieces.way != "async" or b.pieces.way != "async"

    def fetch(step: Any, slot: Any) -> None:
        a.fetch(first + step, slot * shared.a_stage)
        b.fetch(first + step, slot * shared.b_stage + shared.b_start)

    def land(slot: Any) -> None:
        a.land(slot * shared.a_stage)
        b.land(slot * shared.b_stage + shared.b_start)

    def commit() -> None:
        if gpu.async_copy:
            T.evaluate(cp_async_commit())

    with repeat(ahead) as step:
        with when(None if isinstance(count, int) and ahead <= count else step < count):
            fetch(step, step)
            land(step)
        commit()
    # The stage that is multiplied, and the one that is copied to.
    slots = T.alloc_buffer((2,), "int32", scope="local")
    T.buffer_store(slots, tirx.const(0, "int32"), [0])
    T.buffer_store(slots, tirx.const(ahead, "int32"), [1])
    with T.serial(count) as step:
        if gpu.async_copy:
            T.evaluate(cp_async_wait(ahead - 1))
        core.filled()
        T.evaluate(T.tvm_storage_sync("shared.dyn"))
        full, free = named("full", slots[0]), named("free", slots[1])
        starts = full * shared.a_stage, full * shared.b_stage + shared.b_start
        # Multiplications that go on by themselves come first: addresses and copies then cost them no time.
        if core.in_flight:
            core.multiply(buffer, starts[0], buffer, starts[1])
        with when(step + ahead < count):
            fetch(step + ahead, free)
        commit()
        if not core.in_flight:
            core.multiply(buffer, starts[0], buffer, starts[1])
        core.settle()
        if lands:
            with when(step + ahead < count):
                land(free)
        for i, value in enumerate((full, free)):
            T.buffer_store(slots, tirx.if_then_else(value == tile.stages - 1, 0, value + 1), [i])
    core.finish()

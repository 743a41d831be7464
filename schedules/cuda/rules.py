"""The schedule of a GPU function: cut into parts (partition.py), each of them a kernel by the rule of its kind.

    gemm       a product of matrices with its epilogue (gemm.py); what that refuses is a sum
    chain      the transforms of a tile, in the registers of a thread (chain.py)
    staged     a product between two such chains, nothing of it in memory (staged.py)
    rows       equations that agree on their rows, such as softmax: a block a row (rows.py)
    sum        a reduction and the map behind it (reduction.py, window.py)
    transpose  a map that reads along another axis than it writes (transpose.py)
    map        every other map (elementwise.py)

What is no set of equations (several results, sizes that are not known) is left to TVM's own rules, `fallback`; what
they leave as it is (scans) is done by one thread, `serial`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import ScheduleError, dlight
from tvm.tirx import ForKind, PrimFunc, Stmt, Var

from ..cpu.tir_tools import collect, lower_blocks, sequence, substitute
from ..target import TargetError
from .chain import chain_kernel
from .device import Gpu
from .elementwise import map_kernel
from .emit import Grid
from .equation import NotAnEquation, narrowed
from .gemm import gemm_kernel
from .gemm_knobs import require_known
from .partition import Part, nests, partition
from .reduction import reduction_kernel
from .rows import rows_kernel
from .staged_kernel import staged_kernel
from .transpose import find_transposed, transpose_kernel

IS_SCHEDULED = "tirx.is_scheduled"
SCRATCH = "gemmify.scratch"
Knobs = dict[str, int | str]


def schedule_func(func: PrimFunc, gpu: Gpu, knobs: Mapping[str, int | str] | None = None) -> PrimFunc:
    """The same function as kernels for `gpu`, in sequence, and marked `tirx.is_scheduled`.

    Tensors between kernels become parameters, just before the last one; `gemmify.scratch` counts them. `knobs` gives
    values of the GEMM's space by name. A function that carries the mark, or is no block-level TIR, comes back unchanged
    but for the mark. Raises TargetError for a function that cannot be made a kernel, ValueError for knobs that no GEMM
    has.
    """
    if func.attrs and IS_SCHEDULED in func.attrs and func.attrs[IS_SCHEDULED]:
        return func
    if not (func.attrs and "s_tir" in func.attrs):
        return func.with_attr(IS_SCHEDULED, True)
    require_known(knobs or {})
    return scheduled_by(func, gpu, knobs)[0].with_attr(IS_SCHEDULED, True)


def scheduled_by(func: PrimFunc, gpu: Gpu, knobs: Mapping[str, int | str] | None = None) -> tuple[PrimFunc, list[str]]:
    """(the scheduled function, the rule of each of its parts in order, by the names of the module's list)"""
    try:
        return _by_parts(func, gpu, dict(knobs or {}))
    except (NotAnEquation, ScheduleError):
        return _fallback(func, gpu)


def schedule_module(mod: tvm.IRModule, gpu: Gpu) -> tvm.IRModule:
    """Every PrimFunc of the module scheduled; Relax functions stay."""
    result = mod.clone() if hasattr(mod, "clone") else tvm.IRModule(dict(mod.functions.items()))
    for name, func in mod.functions.items():
        if isinstance(func, PrimFunc):
            result.update_func(name, schedule_func(func, gpu))
    return result


def _by_parts(func: PrimFunc, gpu: Gpu, knobs: Knobs) -> tuple[PrimFunc, list[str]]:
    inlined, parts = partition(narrowed(func))
    params = list(inlined.params)
    scratch: list[Any] = []
    kernels: list[Stmt] = []
    rules: list[str] = []
    for part in parts:
        rule, body, extra = _kernel(part, inlined, gpu, knobs)
        rules.append(rule)
        kernels.append(body)
        scratch += extra
        if not any(part.result.buffer.same_as(param) for param in params):
            scratch.append(part.result.buffer)
    attrs = dict(func.attrs) if func.attrs else {}
    if scratch:
        attrs[SCRATCH] = len(scratch)
    given = [*params[:-1], *scratch, params[-1]]
    return PrimFunc(given, sequence(kernels), attrs=tvm.ir.make_node("ir.DictAttrs", **attrs)), rules


def _kernel(part: Part, func: PrimFunc, gpu: Gpu, knobs: Knobs) -> tuple[str, Stmt, list[Any]]:
    """(the rule of a part, its kernels, the scratch that they need beside the tensors of the function)"""
    if part.kind == "gemm" and (made := _gemm(part, func, gpu, knobs)) is not None:
        return "gemm", *made
    if part.staged is not None:
        return "staged", staged_kernel(part.staged, gpu), []
    if part.chain is not None:
        return "chain", chain_kernel(part.chain, gpu), []
    if part.rows is not None:
        return "rows", rows_kernel(part.rows), []
    if part.kind == "map":
        if (turned := find_transposed(part.result)) is not None:
            return "transpose", transpose_kernel(part.result, turned), []
        return "map", map_kernel(part.result, gpu), []
    total, behind = part.equations[0], part.equations[1] if len(part.equations) > 1 else None
    return "sum", reduction_kernel(total, behind, gpu), []


def _gemm(part: Part, func: PrimFunc, gpu: Gpu, knobs: Knobs) -> tuple[Stmt, list[Any]] | None:
    """The part as a function of its own, scheduled by gemm.py, its parameters those of `func` again."""
    alone, given = _alone(part, func)
    made = gemm_kernel(alone, gpu, knobs)
    if made is None:
        return None
    params = list(made.params)
    inputs = len(given) - 1
    own = [*params[:inputs], params[-1]]
    back: dict[Var, Any] = {new: old for new, old in zip(own, given, strict=True) if not new.same_as(old)}
    body = substitute(made.body, back) if back else made.body
    return _without_root(body), params[inputs:-1]


def gemm_funcs(func: PrimFunc) -> list[PrimFunc]:
    """Every GEMM of an unscheduled function, with its epilogue, as a function of its own."""
    if not (func.attrs and "s_tir" in func.attrs):
        return []
    try:
        inlined, parts = partition(narrowed(func))
    except (NotAnEquation, ScheduleError):
        return []
    return [_alone(part, inlined)[0] for part in parts if part.kind == "gemm"]


def _alone(part: Part, func: PrimFunc) -> tuple[PrimFunc, list[Any]]:
    """(the part as a function of its own, the tensors of `func` that are its parameters)"""
    total, behind = part.equations
    read: list[Any] = []
    for source in [*total.sources, *behind.sources]:
        if not source.same_as(total.buffer) and not any(source.same_as(r) for r in read):
            read.append(source)
    given = [*read, behind.buffer]
    root = tvm.s_tir.SBlock([], [], [], "root", tirx.SeqStmt(list(part.nests)), alloc_buffers=[total.buffer])
    alone = PrimFunc(given, tvm.s_tir.SBlockRealize([], True, root)).with_attr("s_tir", True)
    for name in ("tirx.noalias", "gemmify.tf32"):
        if func.attrs and name in func.attrs:
            alone = alone.with_attr(name, func.attrs[name])
    return alone.with_attr("global_symbol", "main"), given


def _without_root(body: Any) -> Any:
    """What an opaque root block holds."""
    if isinstance(body, tvm.s_tir.SBlockRealize) and not body.block.iter_vars and not body.block.alloc_buffers:
        return body.block.body
    return body


def _fallback(func: PrimFunc, gpu: Gpu) -> tuple[PrimFunc, list[str]]:
    """What is no set of equations: TVM's own rules; what they leave without threads, by one thread."""
    target = tvm.target.Target({"kind": "cuda", "arch": gpu.archs[0]}, host={"kind": "llvm"})
    with target:
        rules = (dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
        mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        made = dlight.ApplyDefaultSchedule(*rules)(mod)["main"]
    given = func.attrs.get("global_symbol")
    made = made.with_attr("global_symbol", str(given)) if given else made.without_attr("global_symbol")
    return (made, ["fallback"]) if all(map(_on_device, nests(made))) else (_by_one_thread(func), ["serial"])


def _on_device(nest: Any) -> bool:
    """Whether threads are bound somewhere in a nest of loops."""
    launched = any(attr.attr_key == "thread_extent" for attr in collect(nest, tirx.AttrStmt))
    return launched or any(loop.kind == ForKind.THREAD_BINDING for loop in collect(nest, tirx.For))


def _by_one_thread(func: PrimFunc) -> PrimFunc:
    """The function as it stands, in a kernel of one thread. Raises TargetError where it needs memory of its own."""
    lowered = lower_blocks(func)
    own = [alloc.buffer for alloc in collect(lowered.body, tirx.AllocBuffer) if alloc.buffer.scope() == "global"]
    if own:
        names = ", ".join(str(buffer.name) for buffer in own)
        raise TargetError(
            f"{func.attrs.get('global_symbol', 'a function')} cannot be made a kernel of a GPU: it is no set of "
            f"equations and keeps {names} between its steps; compile the model for llvm, or without that operator"
        )

    def in_order(node: Any) -> Any:
        return tirx.For(node.loop_var, node.min, node.extent, ForKind.SERIAL, node.body)

    body = tvm_ffi.structural_map(lowered.body, (tirx.For, in_order), order="post")
    return lowered.with_body(Grid(1, 1).launch(body))

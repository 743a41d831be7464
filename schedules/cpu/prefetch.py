"""Software prefetch of B: the loop that carries `gemmify.prefetch` asks for the rows of its panel some bytes ahead.

A panel is stored row after row, and panel after panel, so that what lies ahead of the last rows is the next panel. An
address past the end of B is only asked for, never read, and asking for it has no effect.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlockRealize
from tvm.tirx import BufferLoad, For, IntImm, PrimFunc, SeqStmt, Stmt

from .blocks import REDUCTION
from .gemm_knobs import AXES_ANNOTATION
from .tir_tools import collect, substitute

PREFETCH_ANNOTATION = "gemmify.prefetch"
LINE_BYTES = 64
# Arguments of the instruction: a read, kept in all caches, of data.
_READ, _ALL_CACHES, _DATA = 0, 3, 1


def prefetch_panels(func: PrimFunc) -> PrimFunc:
    """`func` with the prefetches that its annotated loops ask for; unchanged where there are none."""
    if not any(PREFETCH_ANNOTATION in loop.annotations for loop in collect(func.body, For)):
        return func
    return func.with_body(tvm_ffi.structural_map(func.body, (For, _one_loop), order="post"))


def _one_loop(loop: For) -> Stmt:
    notes = dict(loop.annotations)
    ahead = notes.pop(PREFETCH_ANNOTATION, None)
    if ahead is None:
        return loop
    (realize,) = [r for r in collect(loop.body, SBlockRealize) if AXES_ANNOTATION in r.block.annotations]
    body = SeqStmt([*_requests(loop, realize, int(ahead)), loop.body])
    return For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, notes, loop.step)


def _requests(loop: For, realize: Any, ahead: int) -> list[Stmt]:
    """One request for each cache line of the rows of B that one iteration of `loop` reads."""
    block = realize.block
    source = list(block.reads)[-1].source
    load = next(l for l in reversed(collect(block.body, TensorLoad)) if l.source.same_as(source))
    inside = {f.loop_var: IntImm(str(f.loop_var.ty.dtype), 0) for f in collect(loop.body, For)}
    first = {it.var: substitute(value, inside) for it, value in zip(block.iter_vars, realize.iter_values, strict=True)}
    at = [substitute(index, first) for index in load.indices]
    element = tvm.DataType(str(source.dtype)).bits // 8
    innermost = [it for it in block.iter_vars if int(it.iter_type) == REDUCTION][-1]
    steps = int(innermost.dom.extent) // int(loop.extent)
    width = int(source.shape[-1])
    requests = []
    for line in range(ceil(steps * width * element / LINE_BYTES)):
        index = [*at[:-1], at[-1] + (ahead + line * LINE_BYTES) // element]
        address = tirx.address_of(BufferLoad(source, index))
        requests.append(tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, _READ, _ALL_CACHES, _DATA)))
    return requests

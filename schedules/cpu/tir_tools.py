"""Small tools on TIR for the passes beside this file: walk, substitute, flat indices, loop nests without blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.ir import TensorLoad
from tvm.tirx import BufferStore, For, ForKind, IntImm, PrimFunc, SeqStmt, Stmt, Var


def walk(node: Any, kind: type | tuple[type, ...], visit: Callable[[Any], None]) -> None:
    """Call `visit` on every node of the given type(s) below (and including) `node`."""
    tvm_ffi.structural_walk(node, (kind, lambda found: visit(found)), order="pre")


def collect(node: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """Every node of the given type(s) below (and including) `node`, outermost first."""
    found: list[Any] = []
    walk(node, kind, found.append)
    return found


def substitute(node: Any, values: dict[Var, Any]) -> Any:
    """`node` with variables replaced."""
    return tvm_ffi.structural_map(node, (Var, lambda var: values.get(var, var)), order="post")


def renamed(stmt: Stmt) -> Stmt:
    """A copy of `stmt` in which every loop variable, bound variable and allocated buffer is a new one."""
    new: dict[Var, Any] = {node.loop_var: fresh(node.loop_var, "") for node in collect(stmt, For)}
    new |= {node.var: fresh(node.var, "") for node in collect(stmt, (tirx.Let, tirx.Bind))}
    for node in collect(stmt, tirx.AllocBuffer):
        old = node.buffer
        new[old] = tirx.decl_buffer(old.shape, old.dtype, old.name, scope=old.scope(), data_alignment=64)
    return substitute(stmt, new) if new else stmt


def uses(node: Any, variables: Iterable[Var]) -> bool:
    """Whether any of the variables occurs in `node`."""
    wanted = list(variables)
    return any(any(var.same_as(other) for other in wanted) for var in collect(node, Var))


def constant(value: Any) -> int | None:
    """The Python int behind an integer constant, else None."""
    return int(value.value) if isinstance(value, IntImm) else None


def extent_of(loop: For) -> int | None:
    """The constant extent of a loop that starts at 0, else None."""
    return constant(loop.extent) if constant(loop.min) == 0 else None


def buffer_of(access: TensorLoad | BufferStore) -> Any:
    """The buffer that a load reads or a store writes."""
    return access.buffer if isinstance(access, BufferStore) else access.source


def flat_index(access: TensorLoad | BufferStore) -> Any | None:
    """The row-major element index of an access; None for a buffer with strides or a symbolic shape."""
    buffer = buffer_of(access)
    sizes = [constant(size) for size in buffer.shape]
    if len(buffer.strides) or any(size is None for size in sizes):
        return None
    dtypes = {str(part.ty.dtype) for part in access.indices}
    if len(dtypes) > 1 or any("int" not in dtype for dtype in dtypes):
        return None
    dtype = dtypes.pop() if dtypes else "int64"
    index: Any = IntImm(dtype, 0)
    for size, part in zip(sizes, access.indices, strict=True):
        index = index * IntImm(dtype, size or 1) + part
    return index


def stride_of(index: Any, var: Var, analyzer: sym.Analyzer) -> int | None:
    """How far a flat index moves when `var` moves by one; None where that is not constant."""
    index = analyzer.simplify(index)
    if not uses(index, [var]):
        return 0
    parts = sym.detect_linear_equation(index, [var])
    return constant(analyzer.simplify(parts[0])) if len(parts) == 2 else None


def loop(var: Var, extent: int, kind: ForKind, body: Stmt) -> For:
    """`for var in range(extent): body`."""
    return For(var, IntImm(str(var.ty.dtype), 0), IntImm(str(var.ty.dtype), extent), kind, body)


def fresh(var: Var, suffix: str) -> Var:
    """A new variable of the type of `var`."""
    return Var(f"{var.name}{suffix}", str(var.ty.dtype))


def sequence(parts: list[Stmt]) -> Stmt:
    """The statements in order, nested sequences flattened; an empty list is a statement that does nothing."""
    flat: list[Stmt] = []
    for part in parts:
        flat.extend(part.seq if isinstance(part, SeqStmt) else [part])
    flat = [part for part in flat if not is_nothing(part)]
    if not flat:
        return tirx.Evaluate(IntImm("int32", 0))
    return flat[0] if len(flat) == 1 else SeqStmt(flat)


def is_nothing(stmt: Stmt) -> bool:
    return isinstance(stmt, tirx.Evaluate) and isinstance(stmt.value, IntImm)


def lower_blocks(func: PrimFunc) -> PrimFunc:
    """The scheduled function as plain loops: no blocks left, every buffer allocated where it is used, and no larger."""
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        s_tir.transform.StmtSimplify(),
    ]
    return run_passes(func, passes)


def in_root_block(func: PrimFunc) -> PrimFunc:
    """The function with its loops inside one opaque block: Relax's passes look for a block in every function."""
    if isinstance(func.body, s_tir.SBlockRealize):
        return func
    root = s_tir.SBlock([], [], [], "root", func.body)
    return func.with_body(s_tir.SBlockRealize([], True, root))


def run_passes(func: PrimFunc, passes: list[Any]) -> PrimFunc:
    """The function after TIR passes, its attributes (and its lack of a global symbol) as before."""
    name = "main"
    given = func.attrs.get("global_symbol") if func.attrs else None
    mod = tvm.IRModule({name: func.with_attr("global_symbol", str(given) if given else name)})
    for one in passes:
        mod = one(mod)
    result = mod[name]
    return result if given else result.without_attr("global_symbol")

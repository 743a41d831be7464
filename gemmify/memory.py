"""One arena for every intermediate tensor of `main`, planned by liveness.

Strategy of `plan_arena`, a pass over `main` as `CallTIRRewrite` leaves it:
1. number the calls of `main`; find for every allocated tensor the first and the last call that touches it, through
   every alias (reshapes, tuples, renamings);
2. what `main` returns keeps an allocation of its own, since it outlives the call; the rest gets an offset (`arena.py`);
3. `main` then begins with one `alloc_storage`, the tensors at their offsets, and one call of `REBASE`.

Why `REBASE`: the VM describes a tensor at offset o as (data = start of the arena, byte_offset = o), and every compiled
kernel asserts byte_offset == 0. One small kernel folds the offset into each data pointer; all others stay as they are.

The VM takes storage from a pool that belongs to the process: the arena goes back to it after a run and is found again,
still mapped, by the next one; two runs at the same moment hold two arenas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import tvm
import tvm_ffi
from tvm import relax, tirx

from gemmify.arena import ALIGNMENT, Request, assign_offsets, peak
from gemmify.errors import UnsupportedError

WORKSPACE_ATTR = "gemmify.workspace"
"""Attribute (any non-zero integer) of a PrimFunc whose outputs are workspace of a layer, not activations."""
SCRATCH_ATTR = "gemmify.scratch"
"""Attribute of a PrimFunc: how many arguments just before its last are workspace, whatever the others are."""

REBASE = "gemmify_rebase"
_ALLOC = "relax.builtin.alloc_tensor"
_VIEWS = frozenset({"relax.reshape", "relax.memory.view"})  # they move no byte: aliases, not uses
_DATA_FIELD, _BYTE_OFFSET_FIELD = 1, 8  # TVMStructFieldKind of a DLTensor

Roots: TypeAlias = "frozenset[int] | tuple[Roots, ...]"
"""The allocations that a value may alias: a set of indices, or one entry a field for a tuple."""


@dataclass(frozen=True)
class TensorPlacement:
    """A tensor in the arena: `bytes` at `offset`, live from call `first` to call `last`, both included.

    `kind` is "activation" or "workspace".
    """

    name: str
    bytes: int
    offset: int
    first: int
    last: int
    kind: str


@dataclass(frozen=True)
class MemoryPlan:
    """What `main` allocates, in bytes.

    `lower_bound` is the largest sum of live tensors at any call: no arena can be smaller. `workspace_peak` is the same
    sum over workspace only. `output_bytes` are allocated apart, each run anew; `weight_bytes` counts equal constants
    once. `kernel_workspace` (filled by the build) maps a kernel to what it allocates inside itself, beside the arena.
    """

    arena_bytes: int
    placements: tuple[TensorPlacement, ...]
    lower_bound: int
    workspace_peak: int
    output_bytes: int
    weight_bytes: int
    kernel_workspace: dict[str, int] = field(default_factory=dict)


@dataclass
class _Alloc:
    """One `alloc_tensor` of `main` while it is analysed."""

    binding: relax.VarBinding
    bytes: int
    first: int | None = None
    last: int = -1
    kind: str = "activation"

    @property
    def name(self) -> str:
        return str(self.binding.var.name)

    def touch(self, call: int) -> None:
        self.first = call if self.first is None else self.first
        self.last = call


# --- liveness --------------------------------------------------------------------------------------------------------


def _flat(roots: Roots) -> frozenset[int]:
    if isinstance(roots, frozenset):
        return roots
    return frozenset().union(*(_flat(r) for r in roots))


def _element_bytes(dtype: str) -> int:
    kind = tvm.DataType(dtype)
    return int(kind.bits * kind.lanes + 7) // 8


def _tensor_bytes(call: relax.Call, name: str) -> int:
    shape, dtype, device, scope = call.args
    dims = [getattr(v, "value", None) for v in shape.values]
    if any(d is None for d in dims):
        raise UnsupportedError(
            f"the memory planner needs static shapes; tensor {name} has shape {shape}: fix the input sizes of the model"
        )
    if int(device.value) != 0 or str(scope.value) != "global":
        raise UnsupportedError(
            f"the memory planner places tensors of device 0 in scope 'global'; tensor {name} is on device "
            f"{device.value} in scope '{scope.value}'"
        )
    return prod(int(d) for d in dims if d is not None) * _element_bytes(str(dtype.value))


def _scratch(call: relax.Call, callee: object) -> list[relax.Expr]:
    """The arguments of a call that the function needs only between its own launches (see `gemmify.scratch`)."""
    count = int(callee.attrs.get(SCRATCH_ATTR, 0)) if isinstance(callee, tirx.PrimFunc) else 0
    return list(call.args)[len(call.args) - 1 - count : -1] if count else []


class _Liveness:
    """Walks the bindings of `main` in order and records, for each allocation, the calls that touch it."""

    def __init__(self, mod: tvm.IRModule, main: relax.Function) -> None:
        self.mod = mod
        self.allocs: list[_Alloc] = []
        self.calls = 0
        self._roots: dict[relax.Var, Roots] = {}
        self._owner: dict[relax.Var, int] = {}
        for block in main.body.blocks:
            for binding in block.bindings:
                self._roots[binding.var] = self._visit(binding)
        # A tensor that no call touches holds nothing to plan: it stays where it is, like an output.
        untouched = {i for i, a in enumerate(self.allocs) if a.first is None}
        self.outputs = _flat(self._of(main.body.body)) | untouched

    def _of(self, expr: relax.Expr) -> Roots:
        if isinstance(expr, relax.Tuple):
            return tuple(self._of(f) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            whole = self._of(expr.tuple_value)
            return whole[expr.index] if isinstance(whole, tuple) else whole
        return self._roots.get(expr, frozenset()) if isinstance(expr, relax.Var) else frozenset()

    def _visit(self, binding: relax.Binding) -> Roots:
        value = binding.value
        if isinstance(value, (relax.If, relax.Function)):
            raise UnsupportedError(
                f"the memory planner needs straight-line code in main; {binding.var.name} is bound to "
                f"{type(value).__name__}: inline it or unroll the control flow before planning"
            )
        if not isinstance(value, relax.Call):
            return self._of(value)
        op = str(getattr(value.op, "name", ""))
        if op == _ALLOC:
            self._owner[binding.var] = len(self.allocs)
            self.allocs.append(_Alloc(binding, _tensor_bytes(value, str(binding.var.name))))
            return frozenset({len(self.allocs) - 1})
        if op in _VIEWS:
            return self._of(value.args[0])
        return self._use(value)

    def _use(self, call: relax.Call) -> Roots:
        """A call that computes. A PrimFunc returns nothing; what another callee returns may alias any argument."""
        touched = _flat(tuple(self._of(a) for a in call.args))
        callee = self.mod[call.op] if isinstance(call.op, tvm.ir.GlobalVar) else None
        is_workspace = isinstance(callee, tirx.PrimFunc) and bool(callee.attrs.get(WORKSPACE_ATTR, 0))
        scratch = _flat(tuple(self._of(a) for a in _scratch(call, callee)))
        for i in touched:
            alloc = self.allocs[i]
            # The first call to touch a tensor is the one that writes it.
            if alloc.first is None and (is_workspace or i in scratch):
                alloc.kind = "workspace"
            alloc.touch(self.calls)
        self.calls += 1
        return frozenset() if isinstance(callee, tirx.PrimFunc) else touched


def weight_bytes(mod: tvm.IRModule) -> int:
    """Bytes of the constant tensors that `main` reaches, itself or through Relax functions; equal tensors count once.

    Equal means same shape, dtype and values: the executable stores such tensors once, too.
    """
    distinct: dict[tuple[object, ...], list[tvm.runtime.Tensor]] = {}
    seen: set[tvm.runtime.Tensor] = set()
    functions: list[relax.Function] = [mod["main"]]
    visited: set[tvm.ir.GlobalVar] = set()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst) and isinstance(expr.value, tvm.runtime.Tensor):
            if expr.value not in seen:
                seen.add(expr.value)
                alike = distinct.setdefault((tuple(expr.value.shape), str(expr.value.dtype)), [])
                if not any(tvm_ffi.structural_equal(expr.value, other) for other in alike):
                    alike.append(expr.value)
        elif isinstance(expr, tvm.ir.GlobalVar) and expr not in visited:
            visited.add(expr)
            if isinstance(mod[expr], relax.Function):
                functions.append(mod[expr])

    while functions:
        relax.analysis.post_order_visit(functions.pop(), visit)
    return sum(prod(t.shape) * _element_bytes(str(t.dtype)) for tensors in distinct.values() for t in tensors)


# --- the pass --------------------------------------------------------------------------------------------------------


def _rebase_kernel(count: int) -> tirx.PrimFunc:
    """`count` DLTensors: data += byte_offset; byte_offset = 0. The VM never frees through a view's data pointer."""
    params = [tirx.Var(f"t{i}", "handle") for i in range(count)]
    body = []
    for p in params:
        data = tirx.tvm_struct_get(p, 0, _DATA_FIELD, "handle")
        offset = tirx.tvm_struct_get(p, 0, _BYTE_OFFSET_FIELD, "uint64")
        moved = tirx.handle_add_byte_offset(data, offset)
        body.append(tirx.Evaluate(tirx.tvm_struct_set(p, 0, _DATA_FIELD, moved)))
        body.append(tirx.Evaluate(tirx.tvm_struct_set(p, 0, _BYTE_OFFSET_FIELD, tirx.const(0, "uint64"))))
    kernel = tirx.PrimFunc(params, tirx.SeqStmt(body) if len(body) > 1 else body[0])
    return kernel.with_attrs({"global_symbol": REBASE, "tirx.is_host_func": True})


def _prologue(
    arena_bytes: int, allocs: Sequence[_Alloc], offsets: Sequence[int], rebase: tvm.ir.GlobalVar | None
) -> relax.BindingBlock:
    """The arena, its tensors, and the call that moves their data pointers. The variables of `main` are kept."""
    arena = relax.Var("arena", relax.AnyType())
    bindings = [
        relax.VarBinding(arena, relax.op.memory.alloc_storage(relax.ShapeExpr([arena_bytes]), 0, "global", "uint8"))
    ]
    for alloc, offset in zip(allocs, offsets, strict=True):
        shape, dtype = alloc.binding.value.args[:2]
        tensor = relax.op.memory.alloc_tensor(arena, offset, shape, dtype)
        bindings.append(relax.VarBinding(alloc.binding.var, tensor))
    if rebase is not None:
        moved = [a.binding.var for a, offset in zip(allocs, offsets, strict=True) if offset]
        nothing = tvm.ir.TupleType([])
        bindings.append(relax.VarBinding(relax.Var("_", nothing), relax.Call(rebase, moved, ret_ty=nothing)))
    return relax.BindingBlock(bindings)


def _check_others(mod: tvm.IRModule) -> None:
    for gv, func in mod.functions.items():
        if isinstance(func, relax.Function) and gv.name_hint != "main" and _calls(func, _ALLOC):
            raise UnsupportedError(
                f"the memory planner plans 'main' only; the Relax function '{gv.name_hint}' allocates tensors too: "
                "inline it"
            )


def plan_arena(mod: tvm.IRModule, alignment: int = ALIGNMENT) -> tuple[tvm.IRModule, MemoryPlan]:
    """Places every intermediate tensor of `main` in one arena, at multiples of `alignment` bytes (itself a multiple of
    ALIGNMENT); returns the new module and the plan.

    `mod` is what `CallTIRRewrite` returns: straight-line `main`, `relax.builtin.alloc_tensor` for each tensor. Tensors
    that `main` returns (or whose view it returns) are left for `LowerAllocTensor`. Raises UnsupportedError for shapes
    that are not static, control flow, other devices or scopes, and further Relax functions that allocate.
    """
    _check_others(mod)
    live = _Liveness(mod, mod["main"])
    inner = [a for i, a in enumerate(live.allocs) if i not in live.outputs]
    requests = [Request(a.bytes, a.first or 0, a.last) for a in inner]
    # The size of a tensor decides where the next one may begin.
    rounded = [Request(-(-r.bytes // alignment) * alignment, r.first, r.last) for r in requests]
    offsets = assign_offsets(requests if alignment == ALIGNMENT else rounded)
    placements = tuple(
        TensorPlacement(a.name, a.bytes, offset, r.first, r.last, a.kind)
        for a, r, offset in zip(inner, requests, offsets, strict=True)
    )
    plan = MemoryPlan(
        arena_bytes=max((p.offset + p.bytes for p in placements), default=0),
        placements=placements,
        lower_bound=peak(requests),
        workspace_peak=peak([r for r, a in zip(requests, inner, strict=True) if a.kind == "workspace"]),
        output_bytes=sum(live.allocs[i].bytes for i in live.outputs),
        weight_bytes=weight_bytes(mod),
    )
    return (_rewrite(mod, plan.arena_bytes, inner, offsets) if inner else mod), plan


def _rewrite(mod: tvm.IRModule, arena_bytes: int, inner: Sequence[_Alloc], offsets: Sequence[int]) -> tvm.IRModule:
    """`mod` with the allocations of `inner` moved to the head of `main`, into one arena."""
    main, builder = mod["main"], relax.BlockBuilder(mod.clone())
    moved = sum(1 for offset in offsets if offset)
    rebase = builder.add_func(_rebase_kernel(moved), REBASE) if moved else None
    mod = builder.get()
    placed = {a.binding.var for a in inner}
    blocks = [relax.BindingBlock([b for b in block.bindings if b.var not in placed]) for block in main.body.blocks]
    body = relax.SeqExpr([_prologue(arena_bytes, inner, offsets, rebase), *blocks], main.body.body)
    mod[mod.get_global_var("main")] = relax.Function(
        main.params, body, main.ret_ty, is_pure=main.is_pure, attrs=main.attrs
    )
    return relax.transform.Normalize()(mod)


def _calls(func: relax.Function, *names: str) -> list[relax.Call]:
    """The calls of the operators `names` in `func`, in order."""
    found: list[relax.Call] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and str(getattr(expr.op, "name", "")) in names:
            found.append(expr)

    relax.analysis.post_order_visit(func, visit)
    return found


def allocated_bytes(mod: tvm.IRModule) -> list[int]:
    """The size of every storage that `main` allocates, as its IR says after `LowerAllocTensor`; the arena is first."""
    calls = _calls(mod["main"], "relax.memory.alloc_storage", "relax.vm.alloc_storage")
    return [prod(int(v.value) for v in c.args[0].values) for c in calls]

"""The last part of the pipeline: a module of scheduled kernels and a Relax `main` -> an executable of the Relax VM.

Strategy:
1. dataflow lowering: views recognised, `call_tir` turned into allocation and call;
2. the one-arena memory plan (`gemmify.memory`);
3. VM lowering and code generation, with the kernels compiled by a TIR pipeline of our own: TVM's, and then `local`
   buffers kept on the stack.

Why the last one. TVM's `LowerTVMBuiltin` keeps an allocation of a CPU kernel on the stack only where its scope is
`global`, its size is constant and below 1,024 bytes. Everything else, and that is every `local` buffer of whatever
size, becomes a call of `TVMBackendAllocWorkspace`: a register tile then lives behind an opaque pointer, and LLVM must
write it to memory though it also keeps it in registers. An annotation of the allocation switches that off.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from math import prod

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.tirx import compilation_pipeline as tir_pipelines

from gemmify.arena import ALIGNMENT
from gemmify.cuda import callback as _cuda_callback  # noqa: F401  # TVM asks it for machine code
from gemmify.cuda.fixed_arena import lift_arena
from gemmify.errors import GemmifyError
from gemmify.memory import MemoryPlan, allocated_bytes, plan_arena

TIR_PIPELINE = "gemmify"
TVM_STACK_BYTES = 1024
"""Below this size TVM itself keeps a constant-size `global` buffer of a CPU kernel on the stack (kMaxStackAlloca)."""

LOCAL_STACK_BYTES = 32 * 1024
"""Up to this size a `local` buffer stays on the stack: far more than any register tile, far below a thread's stack."""

GPU_ALIGNMENT = 256
"""Bytes between the places of tensors in a GPU's arena: two lines of its cache, and what cudaMalloc itself keeps."""

_ON_STACK = "disable_lower_builtin"
_HOST_KINDS = ("llvm", "c")
_Recorder = Callable[[str, tirx.PrimFunc], None]
_recorder: ContextVar[_Recorder | None] = ContextVar("gemmify_kernel_recorder", default=None)


def _alloc_bytes(alloc: tirx.AllocBuffer) -> int | None:
    """Size of an allocation, None where it is not a constant."""
    dims = [getattr(d, "value", None) for d in alloc.buffer.shape]
    dtype = tvm.DataType(str(alloc.buffer.dtype))
    return None if None in dims else prod(int(d) for d in dims if d is not None) * ((dtype.bits * dtype.lanes + 7) // 8)


def _keep_on_stack(alloc: tirx.AllocBuffer) -> tirx.AllocBuffer:
    size = _alloc_bytes(alloc)
    if str(alloc.buffer.scope()) != "local" or size is None or not 0 < size <= LOCAL_STACK_BYTES:
        return alloc
    return tirx.AllocBuffer(alloc.buffer, {**dict(alloc.annotations), _ON_STACK: tirx.const(1, "int32")})


def _is_host(func: tirx.PrimFunc) -> bool:
    target = func.attrs.get("target", None)
    return target is not None and target.kind.name in _HOST_KINDS


@tvm.transform.module_pass(opt_level=0, name="KeepLocalOnStack")
def keep_local_on_stack(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Marks the `local` buffers of host functions, up to LOCAL_STACK_BYTES, so that they stay on the stack."""
    record = _recorder.get()
    mod = mod.clone()
    for gv, func in mod.functions.items():
        if isinstance(func, tirx.PrimFunc) and _is_host(func):
            mod[gv] = func.with_body(tvm_ffi.structural_map(func.body, (tirx.AllocBuffer, _keep_on_stack)))
            if record is not None:
                record(gv.name_hint, mod[gv])
    return mod


@tvm.transform.module_pass(opt_level=0, name="PlainNames")
def plain_names(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Gives the variables of device functions names that C takes: a model's own ("conv/1") become those of tensors, and
    TVM writes them into CUDA text as they are."""
    mod = mod.clone()
    for gv, func in mod.functions.items():
        if isinstance(func, tirx.PrimFunc) and "target" in func.attrs and not _is_host(func):
            renamed: dict[tvm.ir.Var, tvm.ir.Var] = {}

            def rename(var: tvm.ir.Var, renamed: dict[tvm.ir.Var, tvm.ir.Var] = renamed) -> tvm.ir.Var:
                name = re.sub(r"\W|^(?=\d)", "_", str(var.name), flags=re.ASCII)
                if name != str(var.name) and var not in renamed:
                    renamed[var] = tvm.ir.Var(name, var.ty)
                return renamed.get(var, var)

            mod[gv] = tvm_ffi.structural_map(func, (tvm.ir.Var, rename))
    return mod


def _tir_pipeline() -> tuple[object, Callable[[], tvm.transform.Pass], Callable[[], tvm.transform.Pass]]:
    lower, finalize_host, finalize_device = tir_pipelines.get_tir_pipeline("s_tir")
    lower = tvm.transform.Sequential([plain_names, lower])
    return lower, lambda: tvm.transform.Sequential([keep_local_on_stack, finalize_host()]), finalize_device


tir_pipelines.register_tir_pipeline(TIR_PIPELINE, _tir_pipeline)


# --- what kernels allocate inside themselves -----------------------------------------------------------------------


def _off_stack(stmt: tirx.Stmt) -> dict[tvm.ir.Var, int]:
    """Buffer -> bytes of every allocation in a lowered host statement that will become a workspace call."""
    found: dict[tvm.ir.Var, int] = {}

    def visit(alloc: tirx.AllocBuffer) -> None:
        size = _alloc_bytes(alloc)
        small = size is not None and str(alloc.buffer.scope()) == "global" and 0 < size < TVM_STACK_BYTES
        if not small and _ON_STACK not in dict(alloc.annotations):
            assert size is not None, f"an allocation of variable size in a kernel: {alloc}"
            found[alloc.buffer] = size

    tvm_ffi.structural_walk(stmt, (tirx.AllocBuffer, visit))
    return found


def _hidden_bytes(func: tirx.PrimFunc, threads: int) -> int:
    """Bytes that a lowered host function takes from the workspace pool; inside a parallel loop once a thread."""
    every, parallel = _off_stack(func.body), {}

    def visit(loop: tirx.For) -> None:
        if loop.kind == tirx.ForKind.PARALLEL:
            parallel.update(_off_stack(loop.body))

    tvm_ffi.structural_walk(func.body, (tirx.For, visit))
    return sum(size * (threads if buffer in parallel else 1) for buffer, size in every.items())


def kernel_workspace_bytes(mod: tvm.IRModule, target: tvm.target.Target, threads: int = 1) -> dict[str, int]:
    """Kernel name -> bytes that it takes from TVM's workspace pool while it runs; kernels that take none are left out.

    The kernels (PrimFuncs of `mod`, scheduled or not) are lowered as the build lowers them. Allocations of one kernel
    are summed; one inside a parallel loop counts `threads` times. Stack buffers count nothing. The pool, one a thread,
    rounds each allocation up to 4,096 bytes and keeps it.
    """
    kernels = {gv: f for gv, f in mod.functions.items() if isinstance(f, tirx.PrimFunc)}
    if not kernels:
        return {}
    target = tvm.target.Target(target)
    host = target.host if target.host is not None else target
    lower, _, _ = tir_pipelines.get_tir_pipeline(TIR_PIPELINE)
    lowered = relax.transform.AttachGlobalSymbol()(tvm.IRModule(kernels))
    lowered = tirx.transform.BindTarget(target.with_host(host))(lowered)
    found: dict[str, int] = {}
    with _recording(found, threads):
        keep_local_on_stack(lower(lowered))
    return found


class _recording:
    """Within it, every host kernel that is built adds its hidden allocations to `found`."""

    def __init__(self, found: dict[str, int], threads: int) -> None:
        def record(name: str, func: tirx.PrimFunc) -> None:
            size = _hidden_bytes(func, threads)
            if size:
                found[name] = found.get(name, 0) + size

        self._record = record

    def __enter__(self) -> None:
        self._token = _recorder.set(self._record)

    def __exit__(self, *_: object) -> None:
        _recorder.reset(self._token)


def check_launches(mod: tvm.IRModule) -> None:
    """GemmifyError where a scheduled kernel of `mod` computes on the host: it could not reach the memory of a GPU."""
    for gv, func in mod.functions.items():
        if isinstance(func, tirx.PrimFunc) and not _launches(func):
            raise GemmifyError(f"kernel {gv.name_hint} launches nothing on the GPU: no schedule was found for it")


def _launches(func: tirx.PrimFunc) -> bool:
    found: list[bool] = []

    def attribute(node: tirx.AttrStmt) -> None:
        if str(node.attr_key) == "thread_extent":
            found.append(True)

    def loop(node: tirx.For) -> None:
        if node.kind == tirx.ForKind.THREAD_BINDING:
            found.append(True)

    tvm_ffi.structural_walk(func.body, [(tirx.AttrStmt, attribute), (tirx.For, loop)])
    return bool(found)


def _on_gpu(target: tvm.target.Target) -> bool:
    return tvm.target.Target(target).kind.name not in _HOST_KINDS


# --- the build -------------------------------------------------------------------------------------------------------


def lower_main(mod: tvm.IRModule, target: tvm.target.Target) -> tuple[tvm.IRModule, MemoryPlan]:
    """The passes from `call_tir` in dataflow form to what the VM code generator takes, with the arena planned."""
    t = relax.transform
    with tvm.target.Target(target):
        mod = tvm.transform.Sequential([t.ToNonDataflow(), t.RemovePurityChecking(), t.CallTIRRewrite()])(mod)
        mod, plan = plan_arena(mod, GPU_ALIGNMENT if _on_gpu(target) else ALIGNMENT)
        mod = t.LowerAllocTensor()(mod)
        storages = allocated_bytes(mod)
        wanted = plan.arena_bytes + plan.output_bytes
        assert sum(storages) == wanted, f"main allocates {storages}, the plan says {wanted} bytes in all"
        if _on_gpu(target):
            mod = lift_arena(mod)
        mod = tvm.transform.Sequential(
            [
                t.KillAfterLastUse(),
                t.LowerRuntimeBuiltin(),
                t.ComputePrimValue(),
                t.VMShapeLower(),
                t.AttachGlobalSymbol(),
            ]
        )(mod)
    return mod, plan


def build_executable(
    mod: tvm.IRModule, target: tvm.target.Target, threads: int = 1
) -> tuple[relax.VMExecutable, MemoryPlan]:
    """Compiles `main` and its kernels for `target`; returns the executable and what it will allocate.

    `mod` holds one Relax function `main` in dataflow form, made of views and of `call_tir` of PrimFuncs that are
    scheduled already; nothing is legalised or fused here. `threads` scales the per-thread allocations in
    `plan.kernel_workspace`. Raises UnsupportedError where `plan_arena` does.
    """
    if _on_gpu(target):
        check_launches(mod)
    mod, plan = lower_main(mod, target)
    found: dict[str, int] = {}
    with _recording(found, threads), tvm.target.Target(target):  # the target is asked for by `cuda.callback`
        executable = relax.build(mod, target, relax_pipeline=None, tir_pipeline=TIR_PIPELINE)
    return executable, replace(plan, kernel_workspace=found)

"""Kernels that need tensors between their launches: in Relax these are further outputs of the call, which nobody reads.

So the memory plan sees them: live during one call, they share the arena with everything that is not needed then. A
scheduled function says with the attribute `gemmify.scratch` how many it has; they stand just before its last parameter.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from lowering.graph._rewrite import Emitter, Graph, substitute

from .kernels import scratch_count, scratch_of


def call_kernel(func: tirx.PrimFunc, gvar: tvm.ir.GlobalVar, inputs: list[Any], outputs: list[Any]) -> tuple[Any, int]:
    """The `call_tir` of `func` that also allocates its scratch, and which of its results is the last of `outputs`.

    `outputs` are the Relax types of what the function returned before it was scheduled. Without scratch the call gives
    the one output itself, and the position is -1.
    """
    scratch = [relax.TensorType(shape, dtype) for shape, dtype in scratch_of(func)]
    if not scratch:
        return relax.call_tir(gvar, inputs, outputs[0] if len(outputs) == 1 else outputs), -1
    every = [*outputs[:-1], *scratch, outputs[-1]]
    return relax.call_tir(gvar, inputs, every), len(every) - 1


def allocate_scratch(mod: tvm.IRModule) -> tvm.IRModule:
    """Every `call_tir` of `main` whose function has got scratch by being scheduled, given that scratch."""
    waiting = {gv.name_hint for gv, f in mod.functions_items() if isinstance(f, tirx.PrimFunc) and scratch_count(f)}
    graph, out = Graph(mod["main"]), Emitter()
    callees = {var: callee for var, value in graph.bindings if (callee := _callee(value)) is not None}
    values = dict(graph.bindings)
    stale = {c.name_hint for v, c in callees.items() if c.name_hint in waiting and not _has_scratch(values[v], mod[c])}
    if not stale:
        return mod
    mod, renewed = _renewed(mod, stale)
    for var, value in graph.bindings:
        callee = renewed.get(callees[var].name_hint) if var in callees else None
        if callee is None:
            out.env[var] = out.default(var, value)
            continue
        types = _fields(value.ty_args[0])
        inputs = [substitute(arg, out.lookup) for arg in value.args[1].fields]
        call, last = call_kernel(mod[callee], callee, inputs, types)
        result = out.emit(call, f"{var.name}_all")
        picked = [*range(len(types) - 1), last]
        fields = [relax.TupleGetItem(result, i) for i in picked]
        out.env[var] = out.emit(fields[0], var.name) if len(types) == 1 else relax.Tuple([out.emit(f) for f in fields])
    mod["main"] = out.finish(graph, [substitute(o, out.lookup) for o in graph.outputs])
    return relax.transform.Normalize()(mod)


def _renewed(mod: tvm.IRModule, names: set[str]) -> tuple[tvm.IRModule, dict[str, tvm.ir.GlobalVar]]:
    """`mod` with new global variables for the functions `names`, and these by name: a variable keeps the type of what
    it first stood for, which has other parameters."""
    kept = {gv: func for gv, func in mod.functions_items() if gv.name_hint not in names}
    builder = relax.BlockBuilder(tvm.IRModule(kept, attrs=mod.attrs))
    # Without its symbol, which would be that of another variable where the builder has to choose a new name.
    found = {name: builder.add_func(mod[name].without_attr("global_symbol"), name) for name in sorted(names)}
    return builder.get(), found


def _callee(value: Any) -> Any:
    """The function of a `call_tir`, else None."""
    called = isinstance(value, relax.Call) and str(getattr(value.op, "name", "")) == "relax.call_tir"
    return value.args[0] if called else None


def _has_scratch(call: Any, func: tirx.PrimFunc) -> bool:
    """Whether the call gives the function as many tensors as it has parameters."""
    return len(call.args[1].fields) + len(_fields(call.ty_args[0])) == len(func.params)


def _fields(output: Any) -> list[Any]:
    return list(output.fields) if isinstance(output, relax.TupleType) else [output]

"""The arena of a network on a GPU as an object that outlives a run: allocated once, passed to every run.

On a CPU `main` takes its arena from the virtual machine's pool and gives it back. A captured graph of launches holds
addresses instead, which must stay what they were: so `main` becomes three functions,

    ARENA()                  -> the arena
    RUN(arena, inputs ...)   -> the outputs; all that `main` did but the allocation
    main(inputs ...)         -> RUN(ARENA(), inputs ...)

and whoever runs the network again and again keeps the arena and calls RUN.
"""

from __future__ import annotations

import tvm
from tvm import relax

from .names import ARENA, RUN

_ALLOCATE = "relax.memory.alloc_storage"


def lift_arena(mod: tvm.IRModule) -> tvm.IRModule:
    """`mod` with `main` divided as above; as it is where `main` allocates no arena.

    `mod` is what `LowerAllocTensor` leaves after `gemmify.memory.plan_arena`: the arena is what `main` binds first.
    """
    main = mod["main"]
    bindings = list(main.body.blocks[0].bindings) if main.body.blocks else []
    if not bindings or not _allocates(bindings[0].value) or str(bindings[0].var.name) != "arena":
        return mod
    first, *others = bindings
    builder = relax.BlockBuilder(mod.clone())
    arena = relax.Function([], relax.SeqExpr([], first.value), relax.AnyType(), is_pure=False)
    blocks = [relax.BindingBlock(others), *main.body.blocks[1:]]
    body = relax.SeqExpr(blocks, main.body.body)
    run = relax.Function([first.var, *main.params], body, main.ret_ty, is_pure=main.is_pure)
    made = builder.add_func(arena.with_attr("global_symbol", ARENA), ARENA)
    ran = builder.add_func(run.with_attr("global_symbol", RUN), RUN)
    mod = builder.get()
    inputs = [relax.Var(str(p.name), p.ty) for p in main.params]
    storage, result = relax.Var("arena", relax.AnyType()), relax.Var("outputs", main.ret_ty)
    calls = [
        relax.VarBinding(storage, relax.Call(made, [])),
        relax.VarBinding(result, relax.Call(ran, [storage, *inputs])),
    ]
    whole = relax.SeqExpr([relax.BindingBlock(calls)], result)
    mod[mod.get_global_var("main")] = relax.Function(inputs, whole, main.ret_ty, is_pure=main.is_pure, attrs=main.attrs)
    return relax.transform.Normalize()(mod)


def _allocates(value: relax.Expr) -> bool:
    return isinstance(value, relax.Call) and str(getattr(value.op, "name", "")) == _ALLOCATE

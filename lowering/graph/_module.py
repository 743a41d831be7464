"""How a graph pass changes a module: `main` rewritten, functions added or dropped."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm import relax

from ._rewrite import Expr, Graph


def rewrite_main(mod: tvm.IRModule, rewrite: Callable[[relax.Function], relax.Function]) -> tvm.IRModule:
    """The module with `main` replaced by `rewrite(main)`. Raises ValueError where the module has no Relax `main`."""
    return extend_main(mod, lambda func, builder: rewrite(func))


def extend_main(
    mod: tvm.IRModule, rewrite: Callable[[relax.Function, relax.BlockBuilder], relax.Function]
) -> tvm.IRModule:
    """As `rewrite_main`, for passes that also add functions: the builder that they get holds the new module."""
    if "main" not in [gv.name_hint for gv in mod.get_global_vars()] or not isinstance(mod["main"], relax.Function):
        raise ValueError("the graph passes rewrite the Relax function main, which this module does not hold")
    builder = relax.BlockBuilder(mod.clone())
    builder.update_func(mod.get_global_var("main"), rewrite(mod["main"], builder))
    return builder.get()


def drop_uncalled(mod: tvm.IRModule) -> tvm.IRModule:
    """The module without the private PrimFuncs that no Relax function calls any more."""
    called: set[str] = set()
    for func in mod.functions.values():
        if isinstance(func, relax.Function):
            for _, value in Graph(func).bindings:
                called.update(a.name_hint for a in value_args(value) if isinstance(a, tvm.ir.GlobalVar))
    keep = {
        gv: func
        for gv, func in mod.functions.items()
        if not isinstance(func, tvm.tirx.PrimFunc) or gv.name_hint in called or "global_symbol" in (func.attrs or {})
    }
    return tvm.IRModule(keep, attrs=mod.attrs)


def value_args(value: Expr) -> list[Expr]:
    """The operator and the arguments of a call; nothing for any other value."""
    return [value.op, *value.args] if isinstance(value, relax.Call) else []

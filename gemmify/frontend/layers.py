"""The layers of a Relax `main` (what is lowered to GEMMs) and their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

LAYER_OPS = frozenset(["relax.matmul"] + [f"relax.nn.conv{d}d{kind}" for d in (1, 2, 3) for kind in ("", "_transpose")])
_DEFAULT_NAME = re.compile(r"(lv|gv)\d*")


def layer_bindings(function: relax.Function) -> Iterator[relax.VarBinding]:
    """The bindings of `function` whose value is a layer: a convolution, transposed convolution or matrix product."""
    for block in function.body.blocks:
        for binding in block.bindings:
            op = getattr(getattr(binding, "value", None), "op", None)
            if isinstance(op, tvm.ir.Op) and op.name in LAYER_OPS:
                yield binding


def name_layers(mod: tvm.IRModule, names: Mapping[str, str] | None = None) -> tvm.IRModule:
    """Rename the binding of every layer of `main` to its name, which is of [A-Za-z0-9_./-] and unique.

    `names` maps the present name of a binding to the wanted one; a layer outside of it keeps its own name, or becomes
    `<op>_<count>` if that is one that Relax made up (`lv3`).
    """
    taken: set[str] = {p.name for p in mod["main"].params}
    renamed: dict[relax.Var, str] = {}
    for count, binding in enumerate(layer_bindings(mod["main"])):
        own = binding.var.name
        made_up = f"{binding.value.op.name.rsplit('.', 1)[-1]}_{count}"
        wanted = (names or {}).get(own) or (made_up if _DEFAULT_NAME.fullmatch(own) else own)
        renamed[binding.var] = _unique(sanitize(wanted), taken)
    if not renamed:
        return mod
    out = tvm.IRModule(mod.functions, attrs=mod.attrs)
    main = mod["main"]
    out["main"] = _Rename(renamed).visit_expr(main).with_attrs(dict(main.attrs.items()) if main.attrs else {})
    return out


def sanitize(name: str) -> str:
    """The name with everything outside of [A-Za-z0-9_./-] made an underscore."""
    return re.sub(r"[^A-Za-z0-9_./-]", "_", name) or "layer"


def _unique(name: str, taken: set[str]) -> str:
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    taken.add(unique)
    return unique


@mutator
class _Rename(PyExprMutator):
    def __init__(self, names: Mapping[relax.Var, str]) -> None:
        super().__init__()
        self.names = names

    def visit_var_def(self, var: relax.Var) -> relax.Var:
        return var

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        name = self.names.get(binding.var)
        if name is None:
            super().visit_var_binding_(binding)
            return
        value = self.visit_expr(binding.value)
        made = relax.DataflowVar if isinstance(binding.var, relax.DataflowVar) else relax.Var
        var = made(name, binding.var.ty)
        self.set_var_remap(binding.var, var)
        self.builder_.emit_normalized(relax.VarBinding(var, value))

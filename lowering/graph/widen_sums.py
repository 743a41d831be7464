"""Operators that add up float16 values outside the layers, in float32: pooling, means, softmax, normalisations.

    y = f(x)   ->   y = astype(f(astype(x, float32)), float16)        f one of SUMS, x in float16

The layers need none of this, their lowerings add up in float32 themselves (`lowering.precision`). What an operator adds
up in float16 loses digits with every step (SqueezeNet's output, behind a mean over 13x13 pixels, was 7 rounding units
off, with this pass 1.2) and is infinite above 65,504, as the sum of 224x224 pixels of 2 is. Elementwise operators stay,
each rounds once.
"""

from __future__ import annotations

import tvm
from tvm import relax

from ._module import rewrite_main
from ._rewrite import Emitter, Expr, Graph, array_of, dtype_of, is_const, is_tensor, make_const, op_name, substitute

SUMS = frozenset(
    [
        *(f"nn.{kind}pool{dims}d" for kind in ("avg_", "adaptive_avg_") for dims in (1, 2, 3)),
        *(f"nn.{kind}_norm" for kind in ("layer", "group", "instance", "rms")),
        *(f"nn.conv{dims}d{kind}" for kind in ("", "_transpose") for dims in (1, 2, 3)),
        *("nn.softmax", "nn.log_softmax", "matmul", "einsum"),
        *("sum", "mean", "prod", "std", "variance", "cumsum", "cumprod"),
    ]
)
"""The operators, without those that give several tensors."""
NARROW, WIDE = "float16", "float32"


@tvm.transform.module_pass(opt_level=0, name="WidenSums")
class WidenSums:
    """The pass of this module, on `main`; what is in another dtype is left as it is."""

    def transform_module(self, mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        return rewrite_main(mod, _rewrite)


def _rewrite(func: relax.Function) -> relax.Function:
    graph, out = Graph(func), Emitter()
    for var, value in graph.bindings:
        if op_name(value) in SUMS and is_tensor(var) and any(_narrow(arg) for arg in value.args):
            value = substitute(value, out.lookup)
            args = [_widened(out, arg) for arg in value.args]
            wide = out.emit(relax.Call(value.op, args, value.attrs, value.ty_args), f"{var.name}_wide")
            out.env[var] = out.emit(relax.op.astype(wide, dtype_of(var)), var.name)
        else:
            out.env[var] = out.default(var, value)
    return out.finish(graph, [substitute(o, out.lookup) for o in graph.outputs])


def _narrow(expr: Expr) -> bool:
    return is_tensor(expr) and dtype_of(expr) == NARROW


def _widened(out: Emitter, expr: Expr) -> Expr:
    if not _narrow(expr):
        return expr
    return make_const(array_of(expr), WIDE) if is_const(expr) else out.emit(relax.op.astype(expr, WIDE))

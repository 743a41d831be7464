"""What the graph passes share: a read view of a straight-line Relax function and an emitter of a new one.

A pass walks the bindings of `main` in order, maps each old variable to a new expression, and `finish` drops what
nobody reads. The variables' names survive: a layer is called as the variable that its operator is bound to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

Expr = Any
"""A Relax expression; TVM's Python classes carry no useful static types."""


def op_name(value: Expr) -> str:
    """`"nn.conv2d"` for a call of `relax.nn.conv2d`, `""` for everything that is no operator call."""
    if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
        return str(value.op.name).removeprefix("relax.")
    return ""


def is_const(expr: Expr) -> bool:
    """Whether `expr` is a tensor constant."""
    return isinstance(expr, tvm.ir.GenericConst)


def is_var(expr: Expr) -> bool:
    """Whether `expr` is a Relax variable (a parameter or a binding)."""
    return isinstance(expr, relax.Var)


def is_tensor(expr: Expr) -> bool:
    """Whether `expr` is a tensor of known, static shape."""
    ty = getattr(expr, "ty", None)
    return (
        isinstance(ty, relax.TensorType)
        and ty.shape is not None
        and all(isinstance(d, tvm.tirx.IntImm) for d in ty.shape)
    )


def shape_of(expr: Expr) -> tuple[int, ...]:
    """The static shape of a tensor expression."""
    return tuple(int(d) for d in expr.ty.shape)


def dtype_of(expr: Expr) -> str:
    """The element type of a tensor expression, `"float32"`."""
    return str(expr.ty.dtype)


def array_of(const: Expr) -> np.ndarray:
    """The values of a constant; a view without a copy where numpy knows the element type."""
    try:
        return np.from_dlpack(const.value)
    except (BufferError, RuntimeError, TypeError, ValueError):
        return const.value.numpy()


def make_const(values: np.ndarray, dtype: str | None = None) -> Expr:
    """A tensor constant of `values`, cast to `dtype`."""
    # Not `ascontiguousarray`, which gives a number an axis; `relax.const` narrows float64 and int64 unless told.
    array = np.asarray(values if dtype is None else values.astype(dtype, copy=False), order="C")
    return relax.const(array, str(array.dtype))


def scalar_of(expr: Expr) -> float | None:
    """The value of a constant whose elements are all one and the same number, else None."""
    if not is_const(expr):
        return None
    values = array_of(expr)
    if values.size == 0 or (values.size > 1 and not np.all(values == values.flat[0])):
        return None
    return float(values.flat[0])


def channel_vector(const: Expr, shape: Sequence[int], axis: int) -> np.ndarray | None:
    """`const` as one float64 value a channel, where it varies along `axis` only when broadcast to `shape`.

    None where it is no constant, varies along another axis, or would enlarge the tensor.
    """
    if not is_const(const):
        return None
    own = shape_of(const)
    if len(own) > len(shape):
        return None
    full = (1,) * (len(shape) - len(own)) + own
    axis %= len(shape)
    if any(d != 1 for i, d in enumerate(full) if i != axis) or full[axis] not in (1, shape[axis]):
        return None
    return np.broadcast_to(array_of(const).astype("float64").reshape(-1), (shape[axis],))


def int_list(values: Any) -> list[int]:
    """A TVM array or tuple expression of integers as a Python list."""
    fields = values.fields if isinstance(values, relax.Tuple) else values
    return [int(getattr(v, "value", v)) for v in fields]


class Graph:
    """A read view of a function whose body is a straight line of bindings.

    `bindings` are (variable, value) in order, `defs` maps a variable to its value, `users` to the variables whose
    values read it, `outputs` are the returned expressions (`multiple` when they are returned as a tuple). Raises
    ValueError for control flow and for run-time shape matches, which no pass here understands.
    """

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.params = list(func.params)
        self.bindings: list[tuple[Expr, Expr]] = []
        for block in func.body.blocks:
            for binding in block.bindings:
                if not isinstance(binding, relax.VarBinding) or isinstance(binding.value, relax.If):
                    raise ValueError(
                        f"the graph passes need a straight line of static operators, but {binding.var.name} is bound "
                        f"to a {type(binding).__name__} of {type(binding.value).__name__}; export the model with "
                        "static shapes and without control flow"
                    )
                self.bindings.append((binding.var, binding.value))
        self.defs = dict(self.bindings)
        body = self.resolve(func.body.body)
        self.multiple = isinstance(body, relax.Tuple)
        self.outputs = list(body.fields) if self.multiple else [body]
        self.users: dict[Expr, list[Expr]] = {}
        for var, value in self.bindings:
            for read in reads(value):
                self.users.setdefault(read, []).append(var)
        self._outputs = {self.resolve(o) for o in self.outputs if is_var(o)}

    def resolve(self, expr: Expr) -> Expr:
        """`expr` with plain renamings (`a = b`) and a binding of a tuple looked through."""
        while is_var(expr) and expr in self.defs:
            value = self.defs[expr]
            if not (is_var(value) or isinstance(value, relax.Tuple)):
                break
            expr = value
        return expr

    def value(self, expr: Expr) -> Expr:
        """What `expr` is bound to; None for parameters and constants."""
        return self.defs.get(expr) if is_var(expr) else None

    def is_output(self, var: Expr) -> bool:
        """Whether the function returns `var`."""
        return var in self._outputs

    def single_user(self, var: Expr) -> Expr | None:
        """The only variable whose value reads `var`, once; None where there are others or it is returned."""
        users = self.users.get(var, [])
        return users[0] if len(users) == 1 and not self.is_output(var) else None


def reads(value: Expr) -> list[Expr]:
    """Every variable that `value` reads, once for each time that it does."""
    if is_var(value):
        return [value]
    if isinstance(value, relax.Call):
        return [v for arg in value.args for v in reads(arg)]
    if isinstance(value, relax.Tuple):
        return [v for field in value.fields for v in reads(field)]
    if isinstance(value, relax.TupleGetItem):
        return reads(value.tuple_value)
    return []


def substitute(value: Expr, lookup: Callable[[Expr], Expr]) -> Expr:
    """`value` with every variable `v` replaced by `lookup(v)`."""
    if is_var(value):
        return lookup(value)
    if isinstance(value, relax.Call):
        args = [substitute(a, lookup) for a in value.args]
        return relax.Call(value.op, args, value.attrs, value.ty_args)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([substitute(f, lookup) for f in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(value.tuple_value, lookup), value.index)
    return value


class Emitter:
    """Collects the bindings of a new function in order; `env` maps the old variables to new expressions."""

    def __init__(self) -> None:
        self._builder = relax.BlockBuilder()
        self.env: dict[Expr, Expr] = {}
        self.bindings: list[tuple[Expr, Expr]] = []
        self.defs: dict[Expr, Expr] = {}

    def lookup(self, expr: Expr) -> Expr:
        """The new expression of an old one."""
        return self.env.get(expr, expr) if is_var(expr) else expr

    def normalized(self, value: Expr) -> Expr:
        """`value` in terms of the new variables, its type inferred, not yet bound."""
        return self._builder.normalize(substitute(value, self.lookup))

    def emit(self, value: Expr, name: str = "t") -> Expr:
        """Bind `value` to a new variable called `name`, its type inferred; variables and constants stay as they are."""
        value = self._builder.normalize(value)
        if is_var(value) or is_const(value):
            return value
        var = relax.DataflowVar(name, value.ty)
        self.bindings.append((var, value))
        self.defs[var] = value
        return var

    def default(self, var: Expr, value: Expr) -> Expr:
        """The old binding of `var` to `value` with its variables replaced, under its old name; tuples stay unbound."""
        value = substitute(value, self.lookup)
        if isinstance(value, relax.TupleGetItem) and isinstance(value.tuple_value, relax.Tuple):
            return value.tuple_value.fields[value.index]
        return value if isinstance(value, relax.Tuple) else self.emit(value, var.name)

    def reshape(self, expr: Expr, shape: Sequence[int], name: str = "t") -> Expr:
        """`expr` in another shape: nothing, a new constant, or one reshape of whatever was reshaped before."""
        shape = tuple(int(d) for d in shape)
        if is_const(expr):
            return expr if shape_of(expr) == shape else make_const(array_of(expr).reshape(shape))
        while op_name(self.defs.get(expr)) == "reshape":
            expr = self.defs[expr].args[0]
        return expr if shape_of(expr) == shape else self.emit(relax.op.reshape(expr, shape), name)

    def permute(self, expr: Expr, axes: Sequence[int], name: str = "t") -> Expr:
        """`expr` with its axes permuted: free for constants, a reshape where only axes of size 1 move, never twice."""
        axes = tuple(int(a) for a in axes)
        if is_const(expr):
            return expr if axes == tuple(range(len(axes))) else make_const(array_of(expr).transpose(axes))
        shape = shape_of(expr)
        if moves_only_units(shape, axes):
            return self.reshape(expr, [shape[a] for a in axes], name)
        inner: Expr = self.defs.get(expr)
        if op_name(inner) == "permute_dims" and inner.attrs.axes is not None:
            before = int_list(inner.attrs.axes)
            return self.permute(inner.args[0], [before[a] for a in axes], name)
        return self.emit(relax.op.permute_dims(expr, axes), name)

    def finish(self, graph: Graph, outputs: Sequence[Expr], name: str = "main") -> relax.Function:
        """The function of the old parameters, the live bindings and `outputs`, with the old function's attributes."""
        attrs = dict(graph.func.attrs.items()) if graph.func.attrs else None
        return build_function(graph.params, self.bindings, list(outputs), graph.multiple, attrs, name)


def moves_only_units(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Whether permuting `shape` by `axes` keeps the elements' order in memory."""
    moved = [a for a in axes if shape[a] != 1]
    return moved == sorted(moved)


def live_bindings(bindings: Sequence[tuple[Expr, Expr]], outputs: Sequence[Expr]) -> list[tuple[Expr, Expr]]:
    """The bindings that `outputs` need, in their order."""
    needed = {o for o in outputs if is_var(o)}
    live = []
    for var, value in reversed(bindings):
        if var in needed:
            live.append((var, value))
            needed.update(reads(value))
    return live[::-1]


def build_function(
    params: Sequence[Expr],
    bindings: Sequence[tuple[Expr, Expr]],
    outputs: Sequence[Expr],
    multiple: bool,
    attrs: dict[str, Any] | None,
    name: str = "main",
    private: bool = False,
) -> relax.Function:
    """A Relax function of one dataflow block that returns `outputs` (a tuple where `multiple`)."""
    live = live_bindings(bindings, outputs)
    if multiple:
        result: Expr = relax.Var("outputs", relax.TupleType([o.ty for o in outputs]))
        live.append((result, relax.Tuple(list(outputs))))
    else:
        result = outputs[0]
    builder = relax.BlockBuilder()
    # What a dataflow block returns must be an ordinary variable, and inside it every other one a dataflow variable.
    fresh = {result: relax.Var(result.name, result.ty)} if result in {var for var, _ in live} else {}
    attrs = {k: v for k, v in (attrs or {}).items() if k != "global_symbol"}
    with builder.function(name, list(params), attrs=attrs or None, private=private):
        with builder.dataflow():
            for var, value in live:
                value = builder.normalize(substitute(value, lambda v: fresh.get(v, v)))
                builder.emit_normalized(relax.VarBinding(fresh.get(var, var), value))
            if result not in fresh:
                fresh[result] = builder.emit_output(result)
        builder.emit_func_output(fresh.get(result, result))
    return builder.get()[name]

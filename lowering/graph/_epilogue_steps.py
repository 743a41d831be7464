"""One step of the run behind a layer: recognised the same way in `main` and inside a layer's function."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._rewrite import Expr, Graph, channel_vector, dtype_of, is_const, op_name, scalar_of, shape_of

UNARY = {"nn.relu": "relu", "sigmoid": "sigmoid", "tanh": "tanh", "nn.silu": "silu"}


@dataclass(frozen=True, eq=False)
class Step:
    """An epilogue operation of `lowering.epilogue.KINDS`: the variables that it consists of (the last is its result),
    and what it reads beside the layer's value: a vector by channel, or a variable."""

    kind: str
    values: tuple[Expr, ...]
    operand: np.ndarray | Expr | None = None
    params: tuple[float, ...] = ()


def next_step(graph: Graph, var: Expr, axis: int) -> Step | None:
    """The operation behind `var`, whose channels lie on `axis`; None where the run of a layer ends."""
    user = graph.single_user(var)
    if user is None:
        return _hardswish(graph, var)
    value = graph.defs[user]
    name = op_name(value)
    if not name or getattr(user.ty, "dtype", None) is None or dtype_of(user) != dtype_of(var):
        return None
    if name in UNARY:
        return Step(UNARY[name], (user,))
    if name == "clip":
        return Step("clip", (user,), params=(float(value.args[1].value), float(value.args[2].value)))
    if name == "nn.leakyrelu":
        return Step("leaky_relu", (user,), params=(float(value.attrs.alpha),))
    return _binary(value, user, var, axis) if name in ("add", "multiply") else None


def _binary(value: Expr, user: Expr, var: Expr, axis: int) -> Step | None:
    other = value.args[1] if value.args[0].same_as(var) else value.args[0]
    is_add = op_name(value) == "add"
    if shape_of(user) != shape_of(var):
        return None
    if is_const(other):
        vector = channel_vector(other, shape_of(var), axis)
        return None if vector is None else Step("bias" if is_add else "scale", (user,), vector)
    return Step("add" if is_add else "mul", (user,), other) if shape_of(other) == shape_of(var) else None


def _affine(value: Expr) -> tuple[float, float] | None:
    """`(p, q)` where `value = p x + q` with constant numbers."""
    name = op_name(value)
    number = scalar_of(value.args[1]) if name in ("add", "multiply") else None
    if number is None:
        return None
    return (number, 0.0) if name == "multiply" else (1.0, number)


def _hardswish(graph: Graph, var: Expr) -> Step | None:
    """`var * gate(var)`, where the gate is `r clip(p x + q, low, high) + t` and comes to `c clip(a x + b, 0, 1)`; `c`
    must be 1, or be cancelled by a factor directly behind."""
    users = graph.users.get(var, [])
    if len(users) != 2 or graph.is_output(var) or users[0].same_as(users[1]):
        return None
    start, product = users
    value = graph.defs[product]
    if op_name(value) != "multiply" or shape_of(product) != shape_of(var):
        return None
    found = _gate(graph, var, start, product)
    if found is None:
        return None
    inside, a, b, c = found
    values = (*inside, product)
    if abs(c - 1) > 1e-6:
        behind = graph.single_user(product)
        factor = _affine(graph.defs[behind]) if behind is not None else None
        if behind is None or factor is None or factor[1] != 0 or abs(c * factor[0] - 1) > 1e-6:
            return None
        values = (*values, behind)
    return Step("hardswish", values, params=(a, b))


def _gate(graph: Graph, var: Expr, start: Expr, product: Expr) -> tuple[tuple[Expr, ...], float, float, float] | None:
    """The variables from `start` up to the one that `product` multiplies `var` by, and `(a, b, c)` of the gate."""
    before, after, bounds = (1.0, 0.0), (1.0, 0.0), None
    inside: list[Expr] = []
    current: Expr | None = start
    while current is not None and not current.same_as(product):
        value = graph.defs[current]
        step = _affine(value)
        if step is not None and bounds is None:
            before = (before[0] * step[0], before[1] * step[0] + step[1])
        elif step is not None:
            after = (after[0] * step[0], after[1] * step[0] + step[1])
        elif op_name(value) == "clip" and bounds is None:
            bounds = (float(value.args[1].value), float(value.args[2].value))
        else:
            return None
        inside.append(current)
        current = graph.single_user(current)
    if current is None or bounds is None or not any(a.same_as(var) for a in graph.defs[product].args):
        return None
    (p, q), (r, t), (low, high) = before, after, bounds
    c = r * high + t
    # The lower end of the gate must be 0; a negative factor would swap the ends.
    if r <= 0 or c <= 0 or abs(r * low + t) > 1e-6 * c:
        return None
    return tuple(inside), r * p / c, (r * q + t) / c, c

"""PrimFuncs that are no layer, or not quite one: each refused with the reason, and left exactly as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tvm
from foreign import prim_func, tensor
from tvm import te, tirx, topi

from lowering import LOWERINGS, Reason
from lowering.recognize import recognize

NN = topi.nn


def sum_1d(term: Callable[[Any, Any, Any], Any], out: int = 6, dtype: str = "float32", size: int = 8) -> tirx.PrimFunc:
    """`o[i] = sum_k term(i, x, w)(k)` over x of 8 and w of 3 elements."""
    x, w, k = tensor(size, name="x", dtype=dtype), tensor(3, name="w", dtype=dtype), te.reduce_axis((0, 3), name="k")
    return prim_func(x, w, te.compute((out,), lambda i: te.sum(term(i, x, w)(k), axis=k), name="o"))


def guarded(low: Callable[[Any], Any], value: float = 0.0) -> tirx.PrimFunc:
    """A 1-D convolution with pad 1 whose condition on the address is `low`."""

    def term(i: Any, x: te.Tensor, w: te.Tensor) -> Callable[[Any], Any]:
        return lambda k: tirx.if_then_else(low(i + k - 1), x[i + k - 1], tirx.const(value, "float32")) * w[k]

    return sum_1d(term, out=8)


def with_init() -> tirx.PrimFunc:
    x, w, k = tensor(4, name="x"), tensor(5, 4, name="w"), te.reduce_axis((0, 4), name="k")
    add = te.comm_reducer(lambda a, b: a + b, lambda t: tirx.const(1, t), name="from_one")
    return prim_func(x, w, te.compute((5,), lambda m: add(x[k] * w[m, k], axis=k), name="o"))


def two_layers() -> tirx.PrimFunc:
    x, w, v = tensor(3, 4, name="x"), tensor(5, 4, name="w"), tensor(6, 5, name="v")
    return prim_func(x, w, v, NN.dense(NN.dense(x, w), v))


def scheduled() -> tirx.PrimFunc:
    x, w = tensor(3, 4, name="x"), tensor(5, 4, name="w")
    sch = tvm.s_tir.Schedule(prim_func(x, w, NN.dense(x, w)))
    block = sch.get_child_blocks(sch.get_sblock("root"))[0]
    sch.parallel(sch.get_loops(block)[0])
    return sch.mod["main"]


def symbolic() -> tirx.PrimFunc:
    n = tirx.Var("n", "int64")
    x, w = te.placeholder((n, 4), "float32", name="x"), tensor(5, 4, name="w")
    return prim_func(x, w, NN.dense(x, w))


def int8_dense() -> tirx.PrimFunc:
    x, w = tensor(3, 4, name="x", dtype="int8"), tensor(5, 4, name="w", dtype="int8")
    return prim_func(x, w, NN.dense(x, w, out_dtype="int32"))


def mixed_dense() -> tirx.PrimFunc:
    x, w = tensor(3, 4, name="x", dtype="float16"), tensor(5, 4, name="w", dtype="float16")
    return prim_func(x, w, NN.dense(x, w, out_dtype="float32"))


def batch_matmul() -> tirx.PrimFunc:
    x, w = tensor(2, 3, 4, name="x"), tensor(2, 5, 4, name="w")
    return prim_func(x, w, NN.batch_matmul(x, w))


def pool(kind: str) -> tirx.PrimFunc:
    x = tensor(1, 4, 8, 8, name="x")
    return prim_func(x, NN.pool2d(x, (2, 2), (2, 2), (1, 1), (0, 0, 0, 0), kind))


def transposed_gather() -> tirx.PrimFunc:
    """A transposed convolution with stride 2, written by the definition."""

    def term(i: Any, x: te.Tensor, w: te.Tensor) -> Callable[[Any], Any]:
        def at(k: Any) -> Any:
            hit = tirx.all((i - k) % 2 == 0, i - k >= 0, i - k < 16)
            return tirx.if_then_else(hit, x[(i - k) // 2], tirx.const(0, "float32")) * w[k]

        return at

    return sum_1d(term, out=17)


REFUSED: dict[str, tuple[Callable[[], tirx.PrimFunc], str]] = {
    "elementwise": (lambda: prim_func(x := tensor(4, name="x"), topi.exp(x)), "exactly one reduction, found 0"),
    "max-pool": (lambda: pool("max"), "sum"),
    "average-pool": (lambda: pool("avg"), "sum of products"),
    "integer": (int8_dense, "found int32"),
    "mixed precision": (mixed_dense, "elements of a tensor"),
    "two layers": (two_layers, "exactly one reduction, found 2"),
    "starts from one": (with_init, "starts from 0"),
    "scheduled": (scheduled, "unscheduled"),
    "symbolic shape": (symbolic, "constant sizes"),
    "a batch of weights": (batch_matmul, "one axis of the output"),
    "transposed convolution": (transposed_gather, "address"),
    "pads with one": (lambda: guarded(lambda i: tirx.all(i >= 0, i < 8), 1.0), "zero where it pads"),
    "condition one too tight": (lambda: guarded(lambda i: tirx.all(i >= 1, i < 8)), "exactly outside"),
    "condition one too wide": (lambda: guarded(lambda i: tirx.all(i >= 0, i < 9)), "exactly outside"),
    "condition missing": (lambda: guarded(lambda i: i >= 0), "exactly outside"),
    "condition with a hole": (lambda: guarded(lambda i: tirx.all(i >= 0, i < 8, i != 4)), "exactly outside"),
    "address by a table": (
        lambda: sum_1d(lambda i, x, w: lambda k: x[tirx.Cast("int32", w[k])] * w[k]),
        "plain integer arithmetic",
    ),
    "quadratic address": (lambda: sum_1d(lambda i, x, w: lambda k: x[i * k // 2] * w[k]), "address"),
    "reversed input": (lambda: sum_1d(lambda i, x, w: lambda k: x[7 - i - k] * w[k]), "s, d >= 1"),
    "cropped output": (lambda: sum_1d(lambda i, x, w: lambda k: x[i + k] * w[k], out=4), "every output position"),
    "offset input": (lambda: sum_1d(lambda i, x, w: lambda k: x[i + k + 1] * w[k], out=5), "p >= 0"),
    "a sum of sums": (lambda: sum_1d(lambda i, x, w: lambda k: x[i + k] + w[k]), "sum of products"),
    "a difference": (lambda: sum_1d(lambda i, x, w: lambda k: (x[i + k] - w[k]) * w[k]), "elements of a tensor"),
    "a sum as the weight": (
        lambda: sum_1d(lambda i, x, w: lambda k: x[i + k] * (w[k] + x[i])),
        "elements of a tensor",
    ),
    "a weight by position": (lambda: sum_1d(lambda i, x, w: lambda k: x[i + k] * x[i]), "groups that divide"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """The reason names what failed, and every pass leaves the function exactly as it is."""
    make, text = REFUSED[name]
    func = make()
    found = recognize(func)
    assert isinstance(found, Reason), found.problem
    assert text in found.text
    for low in LOWERINGS.values():
        assert low(tvm.IRModule({"main": func}))["main"].same_as(func)

"""What schedules/cuda reads in a GEMM: batch, m, n and k, neighbouring axes as one, how wide its accesses are."""

from __future__ import annotations

from typing import Any

import pytest
from conv_gemm import Conv, conv_func, gpu_for
from tvm import sym, te, tirx
from tvm.tirx import Var

from lowering.base import Tile
from lowering.tile_gemm import tile_gemm
from schedules.cuda.affine import split, terms, total, vector_width
from schedules.cuda.contraction import Axis, Contraction, contraction_of
from schedules.cuda.gemm_choice import candidates, choose, possible_split


def read(p: Conv) -> Contraction:
    found = contraction_of(conv_func(p))
    assert isinstance(found, Contraction), found
    return found


def sizes(found: Contraction) -> dict[str, list[int]]:
    return {letter: [axis.extent for axis in getattr(found, letter)] for letter in ("batch", "m", "n", "k")}


def test_axes_of_a_padded_convolution() -> None:
    """Conditions keep the pixels apart; the taps of the weights do not merge because those of A do not."""
    found = read(Conv(n=2, h=5, w=6, c=8, m=16))
    assert sizes(found) == {"batch": [], "m": [2, 5, 6], "n": [16], "k": [3, 3, 8]}
    assert len(found.a.inside) == 4 and found.a.load is not None


def test_axes_of_a_pointwise_layer_are_one_each() -> None:
    assert sizes(read(Conv(n=2, c=8, m=16, r=1, pad=0))) == {"batch": [], "m": [60], "n": [16], "k": [8]}


def test_groups_are_a_batch_and_halves_are_operands() -> None:
    found = read(Conv(c=16, m=24, groups=2, dtype="bfloat16"))
    assert sizes(found)["batch"] == [2] and sizes(found)["n"] == [12]
    assert (found.operand, found.dtype) == ("bfloat16", "float32")


def dense(store: Any, name: str = "out") -> Any:
    """acc[6][10] = A B^T with k = 4, and what `store(acc)` makes of it."""
    a, b = te.placeholder((6, 4), name="a"), te.placeholder((10, 4), name="b")
    k = te.reduce_axis((0, 4), name="k")
    acc = te.compute((6, 10), lambda i, j: te.sum(a[i, k] * b[j, k], axis=k), attrs={"gemmify.axes": "tp"}, name="acc")
    return te.create_prim_func([a, b, store(acc)])


def test_an_axis_that_the_reader_takes_apart_is_several() -> None:
    """n = 10 stored as 2 x 5 with the 2 outside of m: every access stays a sum of strides."""
    func = dense(lambda acc: te.compute((2, 6, 5), lambda p, i, q: acc[i, p * 5 + q], name="out"))
    found = contraction_of(func)
    assert isinstance(found, Contraction) and sizes(found) == {"batch": [], "m": [6], "n": [2, 5], "k": [4]}
    assert vector_width(found.result.index, found.n, [], sym.Analyzer()) == 5 & -5


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (lambda acc: te.compute((6, 5), lambda i, j: acc[i, j], name="out"), "element by element"),
        (lambda acc: te.compute((6, 10, 2), lambda i, j, t: acc[i, j], name="out"), "more than once"),
        (lambda acc: te.compute((6, 10), lambda i, j: acc[i, j] + acc[i, 9 - j], name="out"), "one element of it"),
        (lambda acc: te.compute((10, 10), lambda i, j: acc[i // 2, j], name="out"), "element by element"),
    ],
)
def test_what_does_not_fit_has_a_reason(store: Any, said: str) -> None:
    found = contraction_of(dense(store))
    assert isinstance(found, str) and said in found


def test_a_product_of_other_kinds_is_read_as_an_expression() -> None:
    """A is a product itself: no plain load, so that it is computed element by element."""
    a, scale = te.placeholder((6, 4), name="a"), te.placeholder((4,), name="scale")
    b = te.placeholder((1, 10, 4), name="b")
    out = tile_gemm(
        outer=(), inner=6, n=10, k_extents=(4,), tile=Tile(1, 1), epilogue=lambda value, index: value,
        read_a=lambda at, x, g, n, k: a(x, k[0]) * scale(k[0]), read_b=lambda at, g, p, j, k: b(g, p + j, k[0]),
    )  # fmt: skip
    found = contraction_of(te.create_prim_func([a, scale, b, out]))
    assert isinstance(found, Contraction) and found.a.load is None and found.b.load is not None


def test_widths_of_accesses() -> None:
    """A vector starts at a multiple of itself, lies within a run, and no condition changes in it."""
    x, y, k = (Var(name, "int32") for name in "xyk")
    analyzer = sym.Analyzer()
    axes = [Axis(y, 3), Axis(k, 8)]
    assert vector_width(x * 24 + y * 8 + k, axes, [], analyzer) == 8
    assert vector_width(x * 20 + y * 8 + k, axes, [], analyzer) == 4
    assert vector_width(x * 24 + y * 8 + k + 2, axes, [], analyzer) == 2
    assert vector_width(x * 48 + y * 16 + k * 2, axes, [], analyzer) == 1
    assert vector_width(x * 24 + y * 8 + k, axes, [k < 5], analyzer) == 1
    assert vector_width(x * 24 + y * 8 + k, axes, [y < 2], analyzer) == 8


def test_sums_are_taken_apart_by_what_they_depend_on() -> None:
    x, k = Var("x", "int32"), Var("k", "int32")
    mine, rest, offset = split((x * 3 + k - 1) * 4 + x, [x], sym.Analyzer())
    assert [(factor, str(term)) for factor, term in mine] == [(13, "x")] and offset == -4
    assert [(factor, str(term)) for factor, term in rest] == [(4, "k")]
    again = total([*mine, *rest, (offset, 1)], "int32")
    assert sym.Analyzer().can_prove_equal(again, (x * 3 + k - 1) * 4 + x)
    assert terms(tirx.const(7, "int32")) == [(7, 1)]


def test_the_model_splits_a_small_grid_and_no_large_one() -> None:
    gpu = gpu_for("sm_90")
    small, large = read(Conv(h=7, w=7, c=512, m=512)), read(Conv(n=64, h=28, w=28, c=128, m=128))
    assert choose(small, gpu, {}, False)[0].split > 1
    plan, core = choose(large, gpu, {}, False)
    assert plan.split == 1 and core == "simt" and plan.tile.bm * plan.tile.bn == 128 * 128
    assert all(seconds > 0 for seconds, _, _ in candidates(large, gpu, False))


def test_no_part_of_a_split_is_empty() -> None:
    for k in (1, 16, 33, 160, 1000):
        for asked in range(1, 40):
            stages = -(-k // 16)
            split_k = possible_split(asked, k, 16)
            steps = -(-stages // split_k)
            assert 1 <= split_k <= asked and (split_k - 1) * steps < stages

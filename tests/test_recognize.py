"""PrimFuncs that somebody else wrote: recognised, rewritten by each lowering as a TVM pass, and run against float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
import tvm_ffi
from foreign import Written, conv_tensors, from_canonical, prim_func, tensor, written
from hypothesis import HealthCheck, Phase, given, settings
from oracle import UNIT, magnitude, random_arrays, reference
from tvm import te, tirx, topi

import lowering
from lowering import LOWERINGS, ConvProblem, DenseProblem, Problem, Reason, Tile, conv2d
from lowering.passes import lower_func
from lowering.recognize import recognize

Layout = tuple[int, ...]


def problem_of(func: tirx.PrimFunc) -> Problem:
    found = recognize(func)
    assert not isinstance(found, Reason), found
    return found.problem


def lowered_by_all(func: tirx.PrimFunc) -> dict[str, tirx.PrimFunc]:
    """`func` through the pass of every lowering that applies to it; it must change, its signature must not."""
    problem = problem_of(func)
    out = {}
    for key, low in LOWERINGS.items():
        mod = low(tvm.IRModule({"main": func}))
        if low.applicable(problem) is not None:
            assert mod["main"].same_as(func), key
            continue
        assert not tvm_ffi.structural_equal(mod["main"], func), key
        signature = [[(p.name, [int(i) for i in p.shape], str(p.dtype)) for p in f.params] for f in (mod["main"], func)]
        assert signature[0] == signature[1]
        assert tvm_ffi.structural_equal(mod["main"].attrs, func.attrs)
        assert all(new.same_as(old) for new, old in zip(mod["main"].params, func.params, strict=True))
        out[key] = mod["main"]
    return out


class Batch:
    """Many functions compiled in one module, each run on its own arrays with a poisoned output and compared."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, tirx.PrimFunc, list[np.ndarray], np.ndarray, float]] = []

    def add(self, name: str, func: tirx.PrimFunc, arrays: list[np.ndarray], want: np.ndarray, limit: float) -> None:
        self.jobs += [(f"{name}: {key}", f, arrays, want, limit) for key, f in lowered_by_all(func).items()]

    def check(self) -> None:
        names = [f"f{i}" for i in range(len(self.jobs))]
        mod = {name: job[1].with_attr("global_symbol", name) for name, job in zip(names, self.jobs, strict=True)}
        with tvm.transform.PassContext(opt_level=0):
            built = tvm.compile(tvm.IRModule(mod), target={"kind": "llvm", "opt-level": 0})
        wrong = []
        for name, (text, _, arrays, want, limit) in zip(names, self.jobs, strict=True):
            out = tvm.runtime.tensor(np.full(want.shape, np.nan, arrays[0].dtype))
            built[name](*(tvm.runtime.tensor(a) for a in arrays), out)
            error = float(np.max(np.abs(out.numpy() - want)))
            # A NaN compares as False: it must fail.
            if not error <= limit * (20 if "winograd" in text else 1):
                wrong.append(f"{text}: error {error:.2e}, limit {limit:.2e}")
        assert self.jobs and not wrong, "\n".join(wrong)


def limit_of(problem: Problem, data: np.ndarray, weight: np.ndarray) -> float:
    return 16 * UNIT[problem.dtype] * (1 + float(magnitude(problem, data, weight).max()))


# --- what topi writes ------------------------------------------------------------------------------------------------

OIHW, HWIO, NCHW, NHWC = (0, 1, 2, 3), (2, 3, 1, 0), (0, 1, 2, 3), (0, 2, 3, 1)
NN = topi.nn
# Name -> (problem, data order, weight order, output order, the call). Orders permute (n, c, *dims) and (m, c, *dims).
TOPI: dict[str, tuple[ConvProblem, Layout, Layout, Callable[..., te.Tensor]]] = {
    "conv2d_nchw": (
        ConvProblem(2, 5, 6, (9, 8), (3, 3), (1, 2), (1, 0), (2, 1), (2, 1)),
        NCHW,
        OIHW,
        lambda x, w: NN.conv2d_nchw(x, w, (1, 2), (1, 0, 2, 1), (2, 1)),
    ),
    "conv2d_nhwc": (conv2d(4, 9, 9, 7, 3, 2), NHWC, HWIO, lambda x, w: NN.conv2d_nhwc(x, w, 2, 1, 1)),
    "conv2d_hwcn": (conv2d(4, 7, 6, 5, 3, n=2), (2, 3, 1, 0), HWIO, lambda x, w: NN.conv2d_hwcn(x, w, 1, 1, 1)),
    "group_conv2d_nchw": (
        conv2d(6, 9, 9, 4, 3, 2, g=2),
        NCHW,
        OIHW,
        lambda x, w: NN.group_conv2d_nchw(x, w, (2, 2), (1, 1), (1, 1), 2),
    ),
    "group_conv2d_nhwc": (
        conv2d(6, 7, 7, 9, 3, g=3),
        NHWC,
        HWIO,
        lambda x, w: NN.group_conv2d_nhwc(x, w, (1, 1), (1, 1), (1, 1), 3),
    ),
    "depthwise_nchw": (
        conv2d(8, 9, 9, 8, 3, g=8),
        NCHW,
        OIHW,
        lambda x, w: NN.depthwise_conv2d_nchw(x, w, (1, 1), (1, 1), (1, 1)),
    ),
    "conv1d_ncw": (
        ConvProblem(2, 4, 5, (17,), (3,), (2,), (1,), (1,), (1,)),
        (0, 1, 2),
        (0, 1, 2),
        lambda x, w: NN.conv1d_ncw(x, w, 2, 1, 1),
    ),
    "conv1d_nwc": (
        ConvProblem(2, 4, 5, (13,), (3,), (1,), (2,), (2,), (2,)),
        (0, 2, 1),
        (2, 1, 0),
        lambda x, w: NN.conv1d_nwc(x, w, 1, 2, 2),
    ),
    "conv3d_ncdhw": (
        ConvProblem(1, 2, 5, (4, 5, 5), (3, 2, 3), (1, 1, 2), (1, 0, 1), (1, 0, 1), (1, 1, 1)),
        (0, 1, 2, 3, 4),
        (0, 1, 2, 3, 4),
        lambda x, w: NN.conv3d_ncdhw(x, w, (1, 1, 2), (1, 0, 1), (1, 1, 1), 1),
    ),
    "conv2d_nchw_1x1": (conv2d(5, 6, 7, 9, 1), NCHW, OIHW, lambda x, w: NN.conv2d_nchw(x, w, 1, 0, 1)),
}


def conv_case(
    problem: ConvProblem, data_order: Layout, weight_order: Layout
) -> tuple[list[np.ndarray], np.ndarray, float]:
    """Arrays in the given orders, the float64 result channels last, and the error allowed."""
    data, weight = random_arrays(problem, 3)
    arrays = [from_canonical(data, data_order), from_canonical(weight, weight_order)]
    return arrays, reference(problem, data, weight), limit_of(problem, data, weight)


def test_topi_convolutions() -> None:
    batch = Batch()
    for name, (problem, data_order, weight_order, call) in TOPI.items():
        arrays, want, limit = conv_case(problem, data_order, weight_order)
        x, w = (tensor(*a.shape, name=n) for a, n in zip(arrays, "xw", strict=True))
        func = prim_func(x, w, call(x, w))
        assert problem_of(func) == problem, name
        batch.add(name, func, arrays, from_canonical(want, data_order), limit)
    batch.check()


def test_topi_depthwise_with_a_multiplier() -> None:
    """topi keeps the multiplier as an axis of its own: weight (C, multiplier, Kh, Kw) or (Kh, Kw, C, multiplier)."""
    problem = conv2d(4, 9, 9, 8, 3, g=4)
    data, weight = random_arrays(problem, 3)
    want, limit = reference(problem, data, weight), limit_of(problem, data, weight)
    batch = Batch()
    x, w = tensor(1, 4, 9, 9, name="x"), tensor(4, 2, 3, 3, name="w")
    func = prim_func(x, w, NN.depthwise_conv2d_nchw(x, w, (1, 1), (1, 1), (1, 1)))
    assert problem_of(func) == problem
    arrays = [from_canonical(data, NCHW), np.ascontiguousarray(weight.reshape(4, 2, 3, 3))]
    batch.add("nchw", func, arrays, from_canonical(want, NCHW), limit)
    x, w = tensor(1, 9, 9, 4, name="x"), tensor(3, 3, 4, 2, name="w")
    func = prim_func(x, w, NN.depthwise_conv2d_nhwc(x, w, (1, 1), (1, 1), (1, 1)))
    assert problem_of(func) == problem
    arrays = [data, np.ascontiguousarray(weight.reshape(4, 2, 3, 3).transpose(2, 3, 0, 1))]
    batch.add("nhwc", func, arrays, want, limit)
    batch.check()


def test_fully_connected_layers() -> None:
    problem = DenseProblem(5, 13, 19)
    data, weight = random_arrays(problem, 3)
    bias = np.random.default_rng(1).standard_normal(19).astype("float32")
    want, limit = reference(problem, data, weight), limit_of(problem, data, weight)
    x, w, b, wt, xt = (
        tensor(*shape, name=n)
        for shape, n in [((5, 13), "x"), ((19, 13), "w"), ((19,), "b"), ((13, 19), "w"), ((13, 5), "x")]
    )
    k = te.reduce_axis((0, 13), name="k")
    transposed = te.compute((19, 5), lambda m, n: te.sum(wt[k, m] * xt[k, n], axis=k), name="y")
    turned = np.ascontiguousarray(weight.T)
    batch = Batch()
    func = prim_func(x, w, b, NN.dense(x, w, b))
    assert problem_of(func) == problem
    batch.add("dense", func, [data, weight, bias], want + bias, limit)
    batch.add("matmul", prim_func(x, wt, NN.matmul(x, wt)), [data, turned], want, limit)
    flipped = [turned, np.ascontiguousarray(data.T)]
    batch.add("transposed", prim_func(wt, xt, transposed), flipped, want.T, limit)
    batch.check()


# --- what is written by hand -----------------------------------------------------------------------------------------


def random_writings(count: int) -> list[Written]:
    found: dict[Written, None] = {}

    @settings(
        max_examples=3 * count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(written())
    def collect(how: Written) -> None:
        found[how] = None

    collect()
    return list(found)[-count:]


def test_random_convolutions_in_any_order_of_axes() -> None:
    batch = Batch()
    for number, how in enumerate(random_writings(36)):
        p = how.problem
        tensors = conv_tensors(how)
        func = prim_func(*tensors)
        arrays, want, limit = conv_case(p, how.data_order, how.weight_order)
        if how.bias:
            bias = np.random.default_rng(2).standard_normal(p.m).astype(p.dtype)
            arrays, want = [*arrays, bias], np.maximum(want + bias, 0)
        found = problem_of(func)
        assert isinstance(found, ConvProblem) and found.macs == p.macs, how
        batch.add(str(number), func, arrays, from_canonical(want, how.out_order), limit)
    batch.check()


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(written())
def test_random_convolutions_are_recognised(how: Written) -> None:
    found = problem_of(prim_func(*conv_tensors(how)))
    p = how.problem
    assert isinstance(found, ConvProblem) and found.macs == p.macs
    if min(p.n, p.c_group, p.m_group, *p.kernel, *p.out_size) > 1:
        # Nothing is ambiguous then, but which spatial dimension stands outermost.
        assert (found.n, found.c, found.m, found.groups) == (p.n, p.c, p.m, p.groups)
        ours, theirs = (
            sorted(zip(q.size, q.kernel, q.stride, q.pad_before, q.dilation, strict=True)) for q in (found, p)
        )
        assert ours == theirs


def test_elementwise_blocks_before_and_after_are_kept() -> None:
    """Scaled input, transposed weight, then bias, residual and a second output: only the convolution changes."""
    problem = conv2d(3, 7, 6, 5, 3)
    x, w, r = tensor(1, 3, 7, 6, name="x"), tensor(3, 3, 3, 5, name="w"), tensor(1, 5, 7, 6, name="r")
    scaled = te.compute(x.shape, lambda *i: x(*i) * tirx.const(2, "float32"), name="scaled")
    out = NN.conv2d_nchw(scaled, topi.transpose(w, (3, 2, 0, 1)), 1, 1, 1)
    func = prim_func(x, w, r, NN.relu(topi.add(out, r)))
    assert problem_of(func) == problem
    data, weight = random_arrays(problem, 3)
    residual = np.random.default_rng(5).standard_normal((1, 5, 7, 6)).astype("float32")
    arrays = [from_canonical(data, NCHW), np.ascontiguousarray(weight.transpose(1, 2, 3, 0)), residual]
    want = np.maximum(from_canonical(reference(problem, 2 * data, weight), NCHW) + residual, 0)
    batch = Batch()
    batch.add("blocks", func, arrays, want, 2 * limit_of(problem, data, weight))
    batch.check()


def test_a_flipped_kernel_and_a_pad_that_is_not_zero() -> None:
    """Both are convolutions all the same: of the flipped weight, and of a tensor that was padded with ones before."""
    problem = ConvProblem(1, 3, 4, (8,), (3,), (1,), (0,), (0,), (1,))
    x, w = tensor(3, 6, name="x"), tensor(4, 3, 3, name="w")
    ones = te.compute(
        (3, 8), lambda c, i: tirx.if_then_else(tirx.all(i >= 1, i < 7), x[c, i - 1], tirx.const(1, "float32"))
    )
    c, k = te.reduce_axis((0, 3), name="c"), te.reduce_axis((0, 3), name="k")
    func = prim_func(
        x, w, te.compute((4, 6), lambda m, o: te.sum(ones[c, o + k] * w[m, c, 2 - k], axis=[c, k]), name="o")
    )
    assert problem_of(func) == problem
    rng = np.random.default_rng(4)
    data, weight = rng.standard_normal((3, 6)).astype("float32"), rng.standard_normal((4, 3, 3)).astype("float32")
    padded = np.pad(data, [(0, 0), (1, 1)], constant_values=1.0).T[None]
    want = reference(problem, padded, weight[:, :, ::-1].transpose(0, 2, 1))[0].T
    batch = Batch()
    batch.add("flipped", func, [data, weight], want, 1e-5)
    batch.check()


# --- as a pass -------------------------------------------------------------------------------------------------------


def test_a_lowering_is_a_pass_of_a_sequential() -> None:
    x, w = tensor(1, 3, 7, 7, name="x"), tensor(4, 3, 3, 3, name="w")
    conv = prim_func(x, w, NN.conv2d_nchw(x, w, 1, 1, 1))
    other = prim_func(x, topi.exp(x))
    mod = tvm.IRModule({"conv": conv, "other": other})
    passed = tvm.transform.Sequential([lowering.Im2col(), lowering.Direct()])(mod)
    assert tvm_ffi.structural_equal(passed["conv"], lowering.Im2col()(mod)["conv"])
    assert "im2col" in passed["conv"].script()
    assert passed["other"].same_as(other) and mod["conv"].same_as(conv)
    assert lowering.Im2col().as_pass().info.name == "lowering.im2col"


def test_the_tile_of_a_pass_is_its_own() -> None:
    x, w = tensor(5, 33, name="x"), tensor(40, 33, name="w")
    func = prim_func(x, w, NN.dense(x, w))
    lowered = lower_func(lowering.Dense(Tile(2, 8)), func)
    assert isinstance(lowered, tirx.PrimFunc) and "(1, 5, 33, 8)" in lowered.script()


def test_a_scheduled_function_is_left_alone() -> None:
    x, w = tensor(5, 33, name="x"), tensor(40, 33, name="w")
    func = prim_func(x, w, NN.dense(x, w)).with_attr("tirx.is_scheduled", True)
    assert lowering.Dense()(tvm.IRModule({"main": func}))["main"].same_as(func)

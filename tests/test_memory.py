"""The memory plan: what is planned is right, and what is reported is what the VM allocates and touches."""

from __future__ import annotations

import ctypes
import resource
import threading

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te
from tvm.script import ir as I
from tvm.script import relax as R

from gemmify.arena import ALIGNMENT, Request, assign_offsets, peak
from gemmify.errors import UnsupportedError
from gemmify.memory import REBASE, WORKSPACE_ATTR, MemoryPlan, plan_arena
from gemmify.pipeline_build import build_executable

TARGET = tvm.target.Target("llvm")


class Net:
    """Builds a Relax `main` kernel by kernel and computes the same in float64 beside it."""

    def __init__(self, *inputs: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        self.arrays = [rng.standard_normal(s).astype("float32") for s in inputs]
        self.inputs = [relax.Var(f"x{i}", relax.TensorType(a.shape, "float32")) for i, a in enumerate(self.arrays)]
        self.want = {v: a.astype("float64") for v, a in zip(self.inputs, self.arrays, strict=True)}
        self.bb = relax.BlockBuilder()
        self.kernels = 0

    def _call(self, args, outs, values, workspace=False):
        func = te.create_prim_func([*self._places, *outs])
        name = f"k{self.kernels}"
        self.kernels += 1
        if workspace:
            func = func.with_attr(WORKSPACE_ATTR, 1)
        gvar = self.bb.add_func(func.with_attr("global_symbol", name), name)
        types = [relax.TensorType([int(d) for d in o.shape], "float32") for o in outs]
        var = self.bb.emit(relax.call_tir(gvar, relax.Tuple(args), types if len(types) > 1 else types[0]))
        if len(outs) == 1:
            self.want[var] = values[0]
            return var
        fields = [self.bb.emit(relax.TupleGetItem(var, i)) for i in range(len(outs))]
        self.want.update(zip(fields, values, strict=True))
        return fields

    def _inputs(self, args):
        self._places = [te.placeholder([int(d) for d in self.want[a].shape], name="i") for a in args]
        return self._places

    def double(self, a, workspace=False):
        """2 a + 1."""
        (p,) = self._inputs([a])
        out = te.compute(p.shape, lambda *i: p[i] * 2.0 + 1.0, name="o")
        return self._call([a], [out], [self.want[a] * 2 + 1], workspace)

    def add(self, a, b):
        p, q = self._inputs([a, b])
        return self._call(
            [a, b], [te.compute(p.shape, lambda *i: p[i] + q[i], name="o")], [self.want[a] + self.want[b]]
        )

    def split(self, a):
        """A kernel with two outputs: a + 1 and 3 a."""
        (p,) = self._inputs([a])
        outs = [
            te.compute(p.shape, lambda *i: p[i] + 1.0, name="o"),
            te.compute(p.shape, lambda *i: p[i] * 3.0, name="q"),
        ]
        return self._call([a], outs, [self.want[a] + 1, self.want[a] * 3])

    def concat(self, a, b):
        p, q = self._inputs([a, b])
        n, m = int(p.shape[0]), int(p.shape[0]) + int(q.shape[0])
        out = te.compute(
            (m, p.shape[1]), lambda i, j: te.if_then_else(i < n, p[i, j], q[te.max(i - n, 0), j]), name="o"
        )
        return self._call([a, b], [out], [np.concatenate([self.want[a], self.want[b]])])

    def reshape(self, a, shape):
        var = self.bb.emit(relax.op.reshape(a, shape))
        self.want[var] = self.want[a].reshape(shape)
        return var

    def const(self, array):
        const = relax.const(array)
        self.want[const] = array.astype("float64")
        return const


def build(define, *inputs):
    """`define(net, *vars)` returns a nest of tuples of variables: the module, and that nest with float64 values."""
    net = Net(*inputs)

    def nest(x, leaf, node):
        return node(nest(f, leaf, node) for f in x) if isinstance(x, tuple) else leaf(x)

    with net.bb.function("main", net.inputs):
        with net.bb.dataflow():
            result = define(net, *net.inputs)
            out = net.bb.emit_output(nest(result, lambda v: v, lambda fs: relax.Tuple(list(fs))))
        net.bb.emit_func_output(out)
    want = nest(result, lambda v: net.want[v], tuple)
    return net.bb.get(), want, net.arrays


class Watch:
    """Instrument of the VM: records allocations and destroys, before each kernel, all that the plan calls dead."""

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan, self.call, self.storages, self.tensors, self.base = plan, 0, [], 0, None

    def __call__(self, func, name, before, ret, *args):
        if name == "vm.builtin.alloc_storage" and before:
            self.storages.append(int(np.prod(list(args[1]))))
        elif name == "vm.builtin.alloc_tensor" and not before:
            ret.copyfrom(np.full(ret.shape, np.nan, str(ret.dtype)))
            if self.tensors < len(self.plan.placements) and int(args[1]) == 0:  # the arena's tensors come first
                self.base = ret.data_ptr()
            self.tensors += 1
        elif before and not name.startswith("vm.builtin") and name != REBASE:
            assert all(a.data_ptr() % ALIGNMENT == 0 for a in args if isinstance(a, tvm.runtime.Tensor))
            self._poison()
            self.call += 1
        return 0

    def _poison(self):
        free = np.ones(self.plan.arena_bytes, bool)
        for p in self.plan.placements:
            if p.first <= self.call <= p.last:
                free[p.offset : p.offset + p.bytes] = False
        if self.base is not None:
            memory = np.frombuffer((ctypes.c_uint8 * self.plan.arena_bytes).from_address(self.base), np.uint8)
            memory[free] = 0xFF  # a NaN in float32


def flat(result):
    if isinstance(result, tvm.runtime.Tensor):
        return [result.numpy()]
    return [a for f in result for a in flat(f)] if not isinstance(result, np.ndarray) else [result]


def run(define, *inputs):
    """Builds and runs under `Watch`; checks numbers, allocations and the plan's own invariants; returns the plan."""
    mod, want, arrays = build(define, *inputs)
    executable, plan = build_executable(mod, TARGET)
    vm = relax.VirtualMachine(executable, tvm.cpu())
    for _ in range(2):  # the second run finds a used arena
        watch = Watch(plan)
        vm.set_instrument(watch)
        got = flat(vm["main"](*[tvm.runtime.tensor(a) for a in arrays]))
        for g, w in zip(got, flat(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
        assert sum(watch.storages) == plan.arena_bytes + plan.output_bytes
        assert watch.storages[: 1 if plan.placements else 0] == [plan.arena_bytes] * bool(plan.placements)
        assert not plan.placements or watch.base is not None
    check_plan(plan)
    return plan


def check_plan(plan):
    requests = [Request(p.bytes, p.first, p.last) for p in plan.placements]
    check_offsets(requests, [p.offset for p in plan.placements])
    assert plan.lower_bound == peak(requests) <= plan.arena_bytes


def check_offsets(requests, offsets):
    for i, (r, o) in enumerate(zip(requests, offsets, strict=True)):
        assert o >= 0 and o % ALIGNMENT == 0
        for q, p in zip(requests[:i], offsets[:i], strict=True):
            alive_together = r.first <= q.last and q.first <= r.last
            assert not alive_together or o + r.bytes <= p or p + q.bytes <= o


# --- offsets ---------------------------------------------------------------------------------------------------------

requests_of = st.lists(
    st.builds(lambda size, a, n: Request(size, a, a + n), st.integers(1, 2000), st.integers(0, 12), st.integers(0, 6)),
    max_size=24,
)


@settings(max_examples=200, deadline=None)
@given(requests_of)
def test_live_tensors_never_overlap(requests):
    offsets = assign_offsets(requests)
    check_offsets(requests, offsets)
    end = max((o + r.bytes for o, r in zip(offsets, requests, strict=True)), default=0)
    assert peak(requests) <= end <= sum(r.bytes + ALIGNMENT for r in requests)


@settings(max_examples=100, deadline=None)
@given(requests_of)
def test_peak_is_the_largest_sum_of_live_bytes(requests):
    calls = range(20)
    assert peak(requests) == max(sum(r.bytes for r in requests if r.first <= c <= r.last) for c in calls)


@pytest.mark.parametrize(
    "lines",  # (cache lines, first, last); in each, three or all four of the greedy orders miss the bound
    [
        [(6, 8, 10), (6, 3, 4), (3, 4, 7), (2, 6, 7), (5, 7, 8)],
        [(5, 3, 6), (6, 8, 8), (6, 3, 3), (5, 5, 9)],
        [(4, 6, 10), (6, 5, 6), (6, 6, 9), (4, 7, 7), (5, 7, 8)],
        [(1, 0, 1), (2, 1, 2), (1, 2, 3), (1, 3, 4), (2, 4, 5)],
        [(4, 6, 10), (5, 2, 4), (5, 7, 11), (3, 3, 5), (3, 8, 11), (6, 5, 6)],
    ],
)
def test_the_bound_is_reached_where_one_greedy_order_misses_it(lines):
    requests = [Request(n * ALIGNMENT, first, last) for n, first, last in lines]
    offsets = assign_offsets(requests)
    assert max(o + r.bytes for o, r in zip(offsets, requests, strict=True)) == peak(requests)
    assert offsets == assign_offsets(requests)


# --- networks: numbers, allocations, aliases -------------------------------------------------------------------------

S = (6, 40)  # 960 bytes, 15 cache lines


def chain(net, x):
    for _ in range(6):
        x = net.double(x)
    return x


def residual(net, x):
    a = net.double(x)
    return net.add(net.double(net.double(a)), a)


def concat(net, x, y):
    a, b = net.double(x), net.double(y)
    return net.double(net.concat(net.concat(a, b), a))


def views(net, x):
    a = net.double(x)
    v = net.reshape(net.reshape(a, (240,)), (40, 6))
    other = net.double(net.double(net.double(x)))  # would fit into `a` if the view did not keep it alive
    return net.add(net.double(v), net.reshape(other, (40, 6)))


def used_output(net, x):
    a = net.double(x)
    b = net.double(a)
    return (b, net.double(net.double(b)))


def same_output_twice(net, x):
    b = net.double(net.double(x))
    return (b, b, net.reshape(b, (240,)))


def constant_output(net, x):
    c = net.const(np.arange(240, dtype="float32").reshape(S))
    return (c, net.add(net.double(x), c))


def parameter_output(net, x, y):
    return (y, net.double(net.double(x)), x)


def nested_outputs(net, x):
    a = net.double(x)
    return ((a, net.double(a)), (net.double(net.double(a)),))


def two_results(net, x):
    p, q = net.split(x)
    r, s = net.split(net.add(p, q))
    return net.add(net.double(r), net.double(net.double(s)))


def one_of_two_results(net, x):
    p, q = net.split(net.double(x))
    return (q, net.add(p, q))


def dead_result(net, x):
    p, _ = net.split(net.double(x))
    return net.double(p)


def view_of_input(net, x):
    return net.double(net.reshape(x, (240,)))


def only_output(net, x):
    return net.double(x)


def no_kernel(net, x):
    return x


ONE = [chain, residual, views, used_output, same_output_twice, constant_output, nested_outputs, two_results]
ONE += [one_of_two_results, dead_result, view_of_input, only_output, no_kernel]


@pytest.mark.parametrize("define", [*ONE, concat, parameter_output], ids=lambda f: f.__name__)
def test_network(define):
    inputs = (S, S) if define in (concat, parameter_output) else (S,)
    plan = run(define, *inputs)
    assert bool(plan.placements) == (define not in (only_output, no_kernel, view_of_input))


@pytest.mark.parametrize("seed", range(6))
def test_random_network(seed):
    def define(net, x):
        rng = np.random.default_rng(seed)
        pool = [x]
        for _ in range(14):
            a, b = (pool[i] for i in rng.integers(max(0, len(pool) - 4), len(pool), 2))
            kind = rng.integers(4)
            if kind == 0:
                pool += net.split(a)
            else:
                pool.append((net.double(a), net.add(a, b), net.reshape(net.reshape(a, (240,)), S))[kind - 1])
        return (pool[-1], pool[len(pool) // 2])

    assert run(define, S).placements


def test_a_chain_keeps_two_tensors_and_a_view_its_source():
    assert run(chain, S).arena_bytes == 2 * 960
    plan = run(views, S)
    source = plan.placements[0]
    last_reader_of_the_view = 4  # calls: a, three for `other`, then the kernel that reads the view
    assert (source.first, source.last) == (0, last_reader_of_the_view)


def test_what_main_returns_is_not_in_the_arena():
    plan = run(used_output, S)
    assert plan.output_bytes == 2 * 960 and len(plan.placements) == 2
    assert run(same_output_twice, S).output_bytes == 960
    assert run(view_of_input, S).arena_bytes == 0


def test_outputs_survive_the_next_run():
    mod, want, arrays = build(used_output, S)
    vm = relax.VirtualMachine(build_executable(mod, TARGET)[0], tvm.cpu())
    first = vm["main"](tvm.runtime.tensor(arrays[0]))
    vm["main"](tvm.runtime.tensor(arrays[0] * 0))
    for g, w in zip(flat(first), flat(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5)


def test_workspace_is_what_the_attribute_says():
    def define(net, x):
        w = net.double(x, workspace=True)
        a = net.double(w)
        return net.add(net.double(net.double(a, workspace=True)), a)

    plan = run(define, S)
    assert [p.kind for p in plan.placements] == ["workspace", "activation", "workspace", "activation"]
    assert plan.workspace_peak == 960 < plan.lower_bound
    assert run(chain, S).workspace_peak == 0


def test_equal_constants_count_once():
    same = np.random.default_rng(0).standard_normal(S).astype("float32")

    def define(net, x):
        a = net.add(net.add(x, net.const(same)), net.const(same.copy()))
        return net.add(a, net.const(same + 1))

    assert run(define, S).weight_bytes == 2 * 960


# --- the runtime -----------------------------------------------------------------------------------------------------


def test_repeated_runs_fault_no_pages_in():
    mod, _, arrays = build(chain, (1024, 2048))  # an arena of 16 MiB
    executable, plan = build_executable(mod, TARGET)
    vm, x = relax.VirtualMachine(executable, tvm.cpu()), tvm.runtime.tensor(arrays[0])
    for _ in range(2):
        vm["main"](x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        vm["main"](x)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert plan.arena_bytes == 16 << 20
    assert faults < 3 * plan.arena_bytes // 4096 // 20


def test_two_virtual_machines_at_once_do_not_share_an_arena():
    mod, want, arrays = build(chain, (64, 1024))
    executable, _ = build_executable(mod, TARGET)
    wrong = []

    def work(scale):
        vm = relax.VirtualMachine(executable, tvm.cpu())
        x = tvm.runtime.tensor(arrays[0] * np.float32(scale))
        expected = 64 * scale * arrays[0].astype("float64") + 63
        for _ in range(40):
            if not np.allclose(vm["main"](x).numpy(), expected, rtol=1e-4, atol=1e-4):
                wrong.append(scale)

    threads = [threading.Thread(target=work, args=(s,)) for s in (1, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    np.testing.assert_allclose(want, 64 * arrays[0].astype("float64") + 63)
    assert not wrong


def test_an_exported_library_runs(tmp_path):
    mod, want, arrays = build(residual, S)
    build_executable(mod, TARGET)[0].export_library(str(tmp_path / "net.so"))
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(tmp_path / "net.so")), tvm.cpu())
    np.testing.assert_allclose(vm["main"](tvm.runtime.tensor(arrays[0])).numpy(), want, rtol=1e-5)


# --- rejections ------------------------------------------------------------------------------------------------------


def test_shapes_that_are_not_static_are_refused():
    n = tvm.tirx.Var("n", "int64")
    bb, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((n, 4), "float32"))
    with bb.function("main", [x]):
        a = bb.emit(relax.op.builtin.alloc_tensor(relax.ShapeExpr([n, 4]), "float32", 0, "global"), name_hint="a")
        bb.emit_func_output(a)
    with pytest.raises(UnsupportedError, match=r"needs static shapes; tensor a has shape .*fix the input sizes"):
        plan_arena(bb.get())


def test_control_flow_is_refused():
    @I.ir_module
    class Mod:
        @R.function
        def main(x: R.Tensor((4,), "float32"), c: R.Tensor((), "bool")) -> R.Tensor((4,), "float32"):
            if c:
                y: R.Tensor((4,), "float32") = R.add(x, x)
            else:
                y: R.Tensor((4,), "float32") = R.multiply(x, x)
            return y

    with pytest.raises(UnsupportedError, match=r"straight-line code in main; y is bound to If"):
        plan_arena(Mod)


@pytest.mark.parametrize("device, scope", [(1, "global"), (0, "texture")])
def test_other_devices_and_scopes_are_refused(device, scope):
    bb, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((4,), "float32"))
    with bb.function("main", [x]):
        bb.emit_func_output(bb.emit(relax.op.builtin.alloc_tensor(relax.ShapeExpr([4]), "float32", device, scope)))
    with pytest.raises(UnsupportedError, match=rf"is on device {device} in scope '{scope}'"):
        plan_arena(bb.get())


def test_other_functions_that_allocate_are_refused():
    bb, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType((4,), "float32"))
    for name in ("helper", "main"):
        with bb.function(name, [x]):
            bb.emit_func_output(bb.emit(relax.op.builtin.alloc_tensor(relax.ShapeExpr([4]), "float32", 0)))
    with pytest.raises(UnsupportedError, match=r"the Relax function 'helper' allocates tensors too"):
        plan_arena(bb.get())

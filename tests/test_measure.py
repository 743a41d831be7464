"""`gemmify.measure`: kernels that measure what they say, and statistics of times."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from gemmify import measure
from gemmify.errors import InputError
from schedules import Machine, host_target


def test_peak_kernel_computes_its_recurrence() -> None:
    kernel = measure._peak_kernel(2, 8, 4, "float32", str(host_target()))["main"]
    factors = np.array([[0.9] * 4, [0.2] * 4], "float32")
    out = tvm.runtime.tensor(np.zeros((2, 8, 4), "float32"))
    measure.set_threads(1)
    kernel(tvm.runtime.tensor(factors), out, 7)
    want = np.arange(8, dtype="float64")
    for _ in range(7):
        want = want * 0.9 + 0.2
    np.testing.assert_allclose(out.numpy(), np.broadcast_to(want[None, :, None], (2, 8, 4)), rtol=1e-5)


@pytest.mark.parametrize("dtype", measure.PEAK_DTYPES)
def test_peak_kernel_keeps_its_accumulators_in_vector_registers(dtype: str) -> None:
    machine = Machine.from_target(host_target())
    if machine.arch != "x86_64" or not {"fma", "avx2"} <= machine.features:
        pytest.skip("the names of registers and instructions are x86's")
    chains = machine.vector_registers * 3 // 4
    kernel = measure._peak_kernel(1, chains, machine.lanes(dtype), dtype, str(host_target()))
    lines = kernel.mod.inspect_source("asm").splitlines()
    register = {64: "%zmm", 32: "%ymm"}[machine.vector_bytes]
    fma = [i for i, line in enumerate(lines) if "vfmadd" in line and line.count(register) == 3]
    assert len(fma) >= chains
    between = [line for line in lines[fma[0] : fma[chains - 1]] if "vmov" in line]
    assert not between, "an accumulator is spilled inside the loop"


def test_peak_is_positive_and_grows_with_the_vector_width() -> None:
    assert measure.multiply_add_peak(1) > 0
    assert measure.multiply_add_peak(1, "float64") > 0


def test_read_and_triad_touch_every_element() -> None:
    rng = np.random.default_rng(0)
    b, c = (rng.random((2, 3, 8, 4), dtype=np.float32) for _ in range(2))
    measure.set_threads(1)
    total = tvm.runtime.tensor(np.zeros((2, 8, 4), "float32"))
    measure._read_kernel(2, 3, 4)["main"](tvm.runtime.tensor(b), total)
    np.testing.assert_allclose(total.numpy(), b.astype("float64").sum(1), rtol=1e-6)
    a = tvm.runtime.tensor(np.full(b.shape, np.nan, "float32"))
    measure._triad_kernel(2, 3, 4)["main"](a, tvm.runtime.tensor(b), tvm.runtime.tensor(c))
    np.testing.assert_allclose(a.numpy(), b + 3 * c.astype("float64"), rtol=1e-6)


def test_bandwidth_is_positive() -> None:
    assert measure.memory_bandwidth(1) > 0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: measure.multiply_add_peak(1, "int8"), "float32 or float64, got 'int8'"),
        (lambda: measure.multiply_add_peak(0), "at least 1, got 0"),
        (lambda: measure.multiply_add_peak(1, target="llvm -mtriple=riscv64-linux-gnu"), "is for riscv64"),
        (lambda: measure.memory_bandwidth(1, "write"), "'read' or 'triad', got 'write'"),
        (lambda: measure.time_call(lambda: None, repeat=0), "at least 1 is required"),
        (lambda: measure.alternate({}, rounds=0), "at least 1 is required"),
        (lambda: measure.summarize([]), "at least 1 run"),
    ],
)
def test_measure_refuses(call: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        call()  # type: ignore[operator]


def test_peak_refuses_a_target_whose_instructions_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cpu_flags", lambda: frozenset({"sse4_2"}))
    with pytest.raises(InputError, match="CPU features that this machine lacks"):
        measure.multiply_add_peak(1)


def test_a_pool_that_is_too_small_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "use_threads", lambda n: n - 1)
    with pytest.raises(InputError, match=r"asked for 1 threads.*holds 0.*TVM_NUM_THREADS=1"):
        measure.set_threads(1)


def test_summarize_orders_and_counts() -> None:
    found = measure.summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert found == {"best": 1.0, "median": 5.5, "p90": 9.0, "runs": 10}
    assert measure.summarize([2.0]) == {"best": 2.0, "median": 2.0, "p90": 2.0, "runs": 1}


def test_geomean() -> None:
    assert measure.geomean([]) is None
    assert measure.geomean([2.0, 8.0]) == pytest.approx(4.0)


def test_alternate_turns_the_order_round() -> None:
    order: list[str] = []
    times = measure.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=0)
    assert "".join(order) == "abbaab"
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_time_call_does_not_count_the_warmup() -> None:
    calls: list[int] = []
    assert len(measure.time_call(lambda: calls.append(1), repeat=4, warmup=2)) == 4
    assert len(calls) == 6

"""Tests of code on a CUDA device: the real one where there is one, else the emulator of tests/emulator.

They run in a process of their own (`scripts/test`, or `pytest tests/gpu`), because a CUDA driver, emulated or not,
stays in a process. `GEMMIFY_GPU_TESTS=emulator` takes the emulator on a machine that has a GPU, too. Tests marked `gpu`
run on a real device alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import emulator
import numpy as np
import pytest

EMULATED = pytest.StashKey[bool]()
MISSING = pytest.StashKey[str]()
ORDERS = (0, 1)
"""Orders of threads, and times of asynchronous copies, in which an emulated kernel is run (emulator/README.md)."""


def pytest_configure(config: pytest.Config) -> None:
    """Install the emulator where there is no GPU; not in a process that only hands out tests to others."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    emulated = os.environ.get("GEMMIFY_GPU_TESTS") == "emulator" or emulator.gpu_count() == 0
    config.stash[EMULATED] = emulated
    if emulated:
        try:
            emulator.install()
        except (emulator.BuildError, OSError) as error:
            config.stash[MISSING] = f"no GPU, and no emulator: {error}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if MISSING in config.stash:
            item.add_marker(pytest.mark.skip(reason=config.stash[MISSING]))
        elif config.stash.get(EMULATED, True) and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a real CUDA device, the emulator is not one"))


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config) -> bool:
    """Whether the device is the emulator."""
    return pytestconfig.stash[EMULATED]


@pytest.fixture
def only_emulated(emulated: bool) -> None:
    """For tests of the emulator."""
    if not emulated:
        pytest.skip("about the emulator, and this is a real GPU")


@pytest.fixture(autouse=True)
def sound_device(emulated: bool) -> Iterator[None]:
    """Each test begins with order 0 on an sm_90, and leaves no write beside an allocation behind."""
    if emulated:
        emulator.set_order(0)
        emulator.set_capability("sm_90")
        emulator.set_watched(False)
    yield
    if emulated:
        assert emulator.check_guards(), "something was written beside an allocation of the device"


@pytest.fixture(scope="session")
def target(emulated: bool) -> Callable[..., Any]:
    """`target("sm_80")`: the cuda target of an architecture; on a real GPU always the device's own."""
    import tvm

    from schedules.target import parse_target

    def of(arch: str = "sm_90", **options: Any) -> Any:
        if not emulated:
            arch = "sm_" + str(tvm.cuda(0).compute_version).replace(".", "")
        return parse_target({"kind": "cuda", "arch": arch, **options})

    return of


@pytest.fixture(scope="session")
def gpu(target: Callable[..., Any]) -> Any:
    """The `Gpu` that `target()` describes."""
    from schedules.cuda.device import Gpu

    return Gpu.from_target(target())


def _tensors(func: Any, arrays: tuple[np.ndarray | None, ...], device: Any) -> list[Any]:
    """Device tensors for the parameters of `func`: copies of `arrays`, memory as cudaMalloc gives it for None."""
    import tvm

    tensors = []
    for buffer, array in zip(func.params, arrays, strict=True):
        shape, dtype = tuple(int(extent) for extent in buffer.shape), str(buffer.dtype)
        if array is None:
            tensors.append(tvm.runtime.empty(shape, dtype, device))
        else:
            assert array.shape == shape and str(array.dtype) == dtype, (array.shape, array.dtype, shape, dtype)
            tensors.append(tvm.runtime.tensor(array, device))
    return tensors


def _call(entry: Callable[..., None], tensors: list[Any], emulated: bool) -> None:
    """Run it and wait. Where the emulator stops the kernel, say why: TVM's own message is all of the CUDA text."""
    import tvm

    stopped = False
    try:
        entry(*tensors)
        tvm.cuda(0).sync()
    except RuntimeError:
        if not emulated:
            raise
        stopped = True
    if stopped:
        pytest.fail(f"the emulator stopped the kernel: {emulator.last_error()}", pytrace=False)


@pytest.fixture(scope="session")
def run_kernel(emulated: bool, target: Callable[..., Any]) -> Callable[..., tuple[np.ndarray, ...]]:
    """`outputs = run_kernel(func, a, b, None)`: compile the PrimFunc `func`, run it, give back what None stands for.

    One argument a buffer parameter; None is an output, which begins as the device's memory (0xFF on the emulator). The
    result is a tuple of the outputs. On the emulator the kernel runs in all of `orders`, whose results must be the same
    bits. `arch` or `on` (a whole target) says for what it is compiled. A `watched` kernel is stopped
    where two threads race or an access leaves its tensor by a byte; it takes about ten times as long to run.
    """
    import tvm

    import gemmify.pipeline_build as build

    def run(
        func: Any,
        *arrays: np.ndarray | None,
        arch: str = "sm_90",
        on: Any = None,
        orders: tuple[int, ...] = ORDERS,
        watched: bool = True,
    ) -> tuple[np.ndarray, ...]:
        goal = on if on is not None else target(arch)
        if emulated:
            emulator.set_capability(str(goal.attrs["arch"]))
            emulator.set_watched(watched)
        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        with goal:  # the hook that compiles CUDA text asks for it
            entry = tvm.compile(module, target=goal, tir_pipeline=build.TIR_PIPELINE)["main"]
        results = []
        for order in orders if emulated else (0,):
            if emulated:
                emulator.set_order(order)
            tensors = _tensors(func, arrays, tvm.cuda(0))
            _call(entry, tensors, emulated)
            pairs = zip(tensors, arrays, strict=True)
            results.append(tuple(tensor.numpy() for tensor, array in pairs if array is None))
            if emulated:
                assert emulator.check_guards(), "something was written beside an allocation of the device"
        for other in results[1:]:
            for first, second in zip(results[0], other, strict=True):
                same = first.tobytes() == second.tobytes()
                assert same, "another order of threads gives another result: threads race"
        return results[0]

    return run

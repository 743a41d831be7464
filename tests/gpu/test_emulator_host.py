"""The emulated driver itself: modules, memory, streams and graphs, fresh processes."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import textwrap

import emulator
import numpy as np
import pytest
from emulator.launch import launch
from hand_written import INPUT, POISON, N, kernel

pytestmark = pytest.mark.usefixtures("only_emulated")


def fresh(code: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run Python `code` in a fresh process under the emulated driver."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = emulator.environment(**settings)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_a_fresh_process_finds_the_device():
    done = fresh("import tvm; d = tvm.cuda(0); print(d.exist, d.compute_version, tvm.cuda(1).exist)", capability=80)
    assert done.stdout.split() == ["True", "8.0", "False"], done.stderr


def test_a_driver_without_a_device():
    done = fresh("import tvm; print(tvm.cuda(0).exist)", devices=0)
    assert done.stdout.split() == ["False"], done.stderr


def test_host_code_cannot_follow_a_device_pointer():
    code = """
        import ctypes
        import emulator
        runtime = ctypes.CDLL(str(emulator.libraries() / "libcudart.so.13"))
        place = ctypes.c_void_p()
        assert runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(64)) == 0
        print(flush=True, end="reading ")
        print(ctypes.cast(place, ctypes.POINTER(ctypes.c_float))[0])
    """
    done = fresh(code)
    assert done.stdout == "reading " and done.returncode == -signal.SIGSEGV
    done = fresh(code, host_access=1)
    assert done.stdout == "reading nan\n", done.stderr


def test_modules_that_live_together_are_not_mixed_up():
    texts = [kernel(f"  out[t] = {value};") for value in range(8)]
    modules, functions = [], []
    for text in texts:
        module = ctypes.c_void_p()
        assert emulator.driver().cuModuleLoadData(ctypes.byref(module), emulator.compile_text(text)) == 0
        modules.append(module)
        function = ctypes.c_void_p()
        assert emulator.driver().cuModuleGetFunction(ctypes.byref(function), module, b"kernel") == 0
        functions.append(function)
    for value, text in enumerate(texts):
        assert (launch(text, 1, N, INPUT, POISON)[1] == value).all()
    for module in modules:
        assert emulator.driver().cuModuleUnload(module) == 0


class Captured:
    """A stream of the runtime API, and what is called while it is captured."""

    def __init__(self) -> None:
        self.runtime = ctypes.CDLL(str(emulator.libraries() / "libcudart.so.13"))
        self.stream, self.graph, self.place = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        assert self.runtime.cudaMalloc(ctypes.byref(self.place), ctypes.c_size_t(INPUT.nbytes)) == 0
        assert self.runtime.cudaStreamCreate(ctypes.byref(self.stream)) == 0
        assert self.runtime.cudaStreamBeginCapture(self.stream, 0) == 0

    def copy(self, source: np.ndarray, stream: ctypes.c_void_p | None) -> int:
        size, pointer = ctypes.c_size_t(source.nbytes), ctypes.c_void_p(source.ctypes.data)
        return self.runtime.cudaMemcpyAsync(self.place, pointer, size, 1, stream)

    def content(self) -> np.ndarray:
        result = np.empty_like(INPUT)
        pointer = ctypes.c_void_p(result.ctypes.data)
        assert self.runtime.cudaMemcpy(pointer, self.place, ctypes.c_size_t(result.nbytes), 2) == 0
        return result

    def end(self) -> int:
        return self.runtime.cudaStreamEndCapture(self.stream, ctypes.byref(self.graph))


def test_a_capture_records_and_a_graph_replays():
    captured, source = Captured(), INPUT.copy()
    assert captured.copy(source, captured.stream) == 0 and captured.end() == 0
    assert np.isnan(captured.content()).all(), "nothing is done while it is captured"
    executable = ctypes.c_void_p()
    assert captured.runtime.cudaGraphInstantiate(ctypes.byref(executable), captured.graph, ctypes.c_ulonglong(0)) == 0
    for by in (1, 2):
        source[:] = INPUT * by
        assert captured.runtime.cudaGraphLaunch(executable, captured.stream) == 0
        np.testing.assert_array_equal(captured.content(), source)
    assert captured.runtime.cudaFree(captured.place) == 0


UNSUPPORTED, INVALIDATED, IMPLICIT = 900, 901, 906


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaStreamSynchronize", "another stream"])
def test_a_capture_is_spoilt_by_what_it_does_not_allow(call):
    captured = Captured()
    if call == "another stream":
        assert captured.copy(INPUT, None) == IMPLICIT
    elif call == "cudaMalloc":
        assert captured.runtime.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4)) == UNSUPPORTED
    else:
        assert captured.runtime.cudaStreamSynchronize(captured.stream) == UNSUPPORTED
    assert captured.end() == INVALIDATED
    assert captured.runtime.cudaFree(captured.place) == 0


def test_a_copy_beyond_its_allocation_and_a_wrong_kind_are_refused():
    captured = Captured()
    assert captured.end() == 0
    assert captured.copy(np.zeros(N + 1, "float32"), None) == 1
    assert "copy to the device of 1028 bytes" in emulator.last_error()
    size, pointer = ctypes.c_size_t(INPUT.nbytes), ctypes.c_void_p(INPUT.ctypes.data)
    assert captured.runtime.cudaMemcpy(pointer, captured.place, size, 1) == 1
    assert "the pointer of the other" in emulator.last_error()
    assert captured.runtime.cudaFree(captured.place) == 0
    assert captured.runtime.cudaFree(captured.place) == 1, "freed twice"


def test_memory_ends():
    captured, place = Captured(), ctypes.c_void_p()
    assert captured.end() == 0
    most = (32 << 30) - INPUT.nbytes
    assert captured.runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(most + 1)) == 2
    assert f"{most + 1} bytes asked for" in emulator.last_error()
    assert captured.runtime.cudaFree(captured.place) == 0

"""All launches of a run as one CUDA graph: recorded once, then started by a single call.

The recording follows the CUDA runtime API, "Stream Management" and "Graph Management": what a thread launches on a
stream in capture mode is not run but becomes the nodes of a graph.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

from ..errors import GemmifyError
from .device import cuda_runtime

_RELAXED = 2  # cudaStreamCaptureModeRelaxed: what other threads of the process do meanwhile is their own affair
_NON_BLOCKING = 1


class CapturedRun:
    """The launches that `work()` makes on the TVM device `device`, and the values that it returned.

    Everything that the launches read or write must stay where it is as long as this object lives; the memory of
    `results` does. `work` is called three times: twice so that the driver loads the code and the memory pool holds
    enough, then recorded.
    """

    def __init__(self, device: Any, work: Callable[[], Any]) -> None:
        self._cuda = cuda_runtime()
        self._device, self._graph, self._exec = device, ctypes.c_void_p(), ctypes.c_void_p()
        self._stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(self._stream), _NON_BLOCKING)
        try:
            # Two at once: the virtual machine keeps the last result, and nothing can be allocated in a recording.
            warm = [work(), work()]
            device.sync()
            del warm
            self.results = self._record(work)
            self._call("cudaGraphInstantiate", ctypes.byref(self._exec), self._graph, ctypes.c_ulonglong(0))
        except BaseException:
            self.close()
            raise

    def _record(self, work: Callable[[], Any]) -> Any:
        self._call("cudaStreamBeginCapture", self._stream, _RELAXED)
        self._device.set_raw_stream(self._stream.value)
        try:
            results = work()
        except BaseException:
            self._cuda.cudaStreamEndCapture(self._stream, ctypes.byref(self._graph))
            raise
        finally:
            self._device.set_raw_stream(0)
        self._call("cudaStreamEndCapture", self._stream, ctypes.byref(self._graph))
        return results

    def __call__(self) -> Any:
        """Start the launches, and wait until they are done; returns what `work` returned, with new contents."""
        self._call("cudaGraphLaunch", self._exec, self._stream)
        self._call("cudaStreamSynchronize", self._stream)
        return self.results

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            self._cuda.cudaGetErrorString.restype = ctypes.c_char_p
            said = (self._cuda.cudaGetErrorString(status) or b"").decode(errors="replace")
            raise GemmifyError(f"{name} failed with error {status} ({said}); run without the CUDA graph to see where")

    def close(self) -> None:
        """Free the graph; the object is of no use afterwards."""
        for name, handle in (
            ("cudaGraphExecDestroy", self._exec),
            ("cudaGraphDestroy", self._graph),
            ("cudaStreamDestroy", self._stream),
        ):
            if handle:
                getattr(self._cuda, name)(handle)
                handle.value = None

    def __del__(self) -> None:
        # At the interpreter's end the driver may be gone: it frees everything itself.
        if not sys.is_finalizing():
            self.close()

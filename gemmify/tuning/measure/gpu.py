"""Measuring candidates on the GPU of this machine: compiled by all cores at once, run one at a time."""

from __future__ import annotations

from typing import Any

from schedules import machine_of

from ...errors import GemmifyError
from ...threads import most_threads
from ..folder import this_machine
from ..record import MachineId
from .builders import START_LIMIT
from .helper import HelperDied, HelperError, HelperTimeout
from .job import about_memory
from .libraries import LibraryMeasurer
from .tries import Gone, Try

_WORK = "gemmify.tuning.measure.gpu_device"
_TRANSFER = 1e9  # bytes a second that reach the GPU at least
_SETUP = 5.0


class GpuMeasurer(LibraryMeasurer):
    """Measures on GPU 0 of this machine. A context manager, with the methods of `LocalMeasurer`.

    `target` is a cuda target. A candidate may build for `build_limit` seconds (nvcc takes a few) and run for
    `run_limit` seconds. Raises InputError for a target that cannot be read, GemmifyError where there is no GPU that
    can run it.
    """

    def __init__(
        self, target: Any, *, build_limit: float = 120.0, run_limit: float = 20.0, seed: int = 0, builders: int = 0
    ) -> None:
        super().__init__(
            target,
            1,
            build_limit=build_limit,
            run_limit=run_limit,
            memory_limit=None,
            seed=seed,
            workers=1,
            builders=builders or most_threads(),
            prefix="gemmify-gpu-",
        )
        try:
            from ...cuda.device import require_gpu

            require_gpu(self.target)
            self._l2 = machine_of(self.target).l2_bytes
        except BaseException:
            self.close()
            raise

    def machine(self) -> MachineId:
        """The GPU."""
        return this_machine(self.target)

    def _on_device(self, do: str, work: tuple[Any, ...], size: int, tried: Try, limit: float | None = None) -> Any:
        seconds = (limit or self._run_limit) + _SETUP + size / _TRANSFER

        def heard(news: tuple[Any, ...]) -> float:
            tried.phase = news[0]
            return seconds

        helper = self._free.get()
        try:
            if self._closed:
                raise GemmifyError("the measurer was closed")
            return helper.call(f"{_WORK}:{do}", self._l2, *work, limit=START_LIMIT, news=heard)
        except HelperTimeout as err:
            raise Gone("timeout", f"{tried.phase} took more than {seconds:g} s") from err
        except HelperDied as err:
            raise Gone("crash", str(err)) from err
        except HelperError as err:
            helper.kill()  # a process whose kernel failed can run no other
            raise Gone("memory" if about_memory(str(err)) else "crash", f"{err.kind}: {err}") from err
        finally:
            self._free.put(helper)

"""TVM's runtime and its threads.

TVM's own thread defaults are not used, for reasons that were measured: on x86 it takes half of the hardware threads
(one on a machine of two cores), and its pinning ignores the affinity mask, so that under `taskset -c 0` it moves the
process back onto every core. Here the default is the physical cores that the process may use, without pinning, and no
environment variable is left changed, so that child processes decide for themselves.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from . import host
from .errors import CheckError, GemmifyError, IncompatibleError, InputError, UnsupportedError

SHARE_ALL_CORES = -3  # threading::ThreadGroup::kSpecifyThreadShareAllCore
# TVM keeps one pool for each thread that calls it, of a size fixed at its first use; this remembers how many of the
# pool's workers the calling thread was last told to use, and the process that they belong to.
_pool = threading.local()


def default_threads() -> int:
    """TVM_NUM_THREADS where the user set it (at most `most_threads`), else the physical cores that affinity and the
    control group allow."""
    asked = os.environ.get("TVM_NUM_THREADS", "")
    return min(int(asked), most_threads()) if asked.isdigit() and int(asked) > 0 else host.physical_cores()


def most_threads() -> int:
    """The most threads that can be asked for: the CPUs that this process may use. A pool's waiting threads poll, so
    that one larger than that takes minutes to do, and to end, what takes milliseconds."""
    return max(1, host.usable_cpus())


def check_threads(threads: Any) -> int:
    """`threads` where it is a usable count; InputError otherwise."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InputError(f"threads must be a whole number of at least 1, got {threads!r}")
    if threads > (most := most_threads()):
        raise InputError(
            f"{threads} threads were asked for, but this process may use {most} CPUs; ask for {most} or fewer"
        )
    return threads


def require_one_thread(threads: Any) -> None:
    """InputError where another number of CPU threads than 1, or none, was asked for with code for a GPU."""
    if threads not in (None, 1):
        raise InputError(f"{threads} CPU threads were asked for, but one launches all kernels of a GPU; leave it out")


def check_fork() -> None:
    """GemmifyError where the calling thread's pool was left behind in the parent by a fork: a run would never end."""
    if getattr(_pool, "process", os.getpid()) != os.getpid():
        raise GemmifyError(
            "this process was forked after TVM's threads had started, and they did not come along; start it with "
            "multiprocessing's spawn method, or load and run the network only in the child"
        )


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables that the user did not set, for the time of the block."""
    new = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in new})
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def import_tvm(compiler: bool = False) -> Any:
    """TVM, with its compiler only where `compiler` is set or somebody imported it already.

    Raises GemmifyError where TVM is missing, or where the compiler is asked for in a process that has loaded the bare
    runtime.
    """
    if "tvm" not in sys.modules:
        with _environment(**({} if compiler else {"TVM_USE_RUNTIME_LIB": "1"})):
            try:
                import tvm
            except ImportError as err:
                raise GemmifyError(f"cannot import TVM ({err}); install it with `pip install gemmify`") from err
    import tvm
    import tvm.base
    import tvm.runtime.vm

    _keep_error_types()
    if compiler and tvm.base._RUNTIME_ONLY:
        raise GemmifyError(
            "this process cannot compile: it has loaded TVM's runtime without the compiler, as gemmify.load does; "
            "`import tvm` before the first gemmify.load, or compile in another process"
        )
    return tvm


@contextlib.contextmanager
def without_scope_lines() -> Iterator[None]:
    """Drop the lines "Warning: Scope Saving/Loaded" that TVM's virtual machine logs for each constant.

    TVM writes them from C++ straight to file descriptor 2 and has no switch for them; what else is written there
    during the block is passed on at its end.
    """
    try:
        saved = os.dup(2)
    except OSError:  # stderr is closed: nothing to keep clean
        yield
        return
    with tempfile.TemporaryFile() as caught:
        sys.stderr.flush()
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            kept = [line for line in caught if b"Warning: Scope " not in line]
            if kept:
                os.write(2, b"".join(kept))


@functools.cache
def _keep_error_types() -> None:
    """Let our errors, and Ctrl-C, pass through TVM's C++ unchanged.

    An exception raised in a pass written in Python crosses C++ by its name; a name that TVM does not know comes out as
    RuntimeError, and an interrupted compilation would look like a fault.
    """
    import tvm_ffi

    for kind in (KeyboardInterrupt, GemmifyError, InputError, UnsupportedError, CheckError, IncompatibleError):
        tvm_ffi.register_error(kind.__name__, kind)


def use_threads(threads: int) -> int:
    """Let the calling Python thread's pool use `threads` workers; returns the number that it really uses.

    The pool's size is fixed the first time, at `threads` or at the CPUs that the process may use, whichever is more.
    Workers are not pinned, unless the user set TVM_BIND_THREADS=1. Raises GemmifyError in a forked process whose
    parent started the pool.
    """
    check_fork()
    if getattr(_pool, "asked", None) != threads:
        tvm = import_tvm()
        cpus = sorted(host.allowed_cpus())
        # The length of this list is what TVM takes as the size of a new pool; the list itself matters for pinning only.
        places = [str(cpus[i % len(cpus)]) for i in range(max(threads, most_threads()))]
        _pool.process = os.getpid()
        with _environment(TVM_BIND_THREADS="0"):
            tvm.get_global_func("runtime.config_threadpool")(SHARE_ALL_CORES, threads, places)
            _pool.used = int(tvm.get_global_func("runtime.NumThreads")())
        _pool.asked = threads
    used: int = _pool.used
    return used

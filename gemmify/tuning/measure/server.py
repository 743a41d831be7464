"""The process that all candidates are forked from: TVM imported and warm, no thread running, nothing of a kernel run.

    python -c "..." -> main(descriptor)

It obeys single messages on a socket: `fork ID` with the descriptor of the child's pipe, `kill ID`, `stop ID`,
`continue ID`; and reports `ready`, then `exit ID STATUS` for every child (as os.waitpid gives it). The end of the
socket, or of the process at its other end, ends it and all its children.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import os
import pickle
import select
import shutil
import signal
import socket
import sys
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.3
"""How often a server without messages looks whether its parent still lives."""
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Config:
    """What the server prepares: for which target (as text), for how many threads, with a flush buffer of so many bytes,
    and the private folder, in which each child's messages go to the file `ID.txt`."""

    target: str
    threads: int
    flush_bytes: int
    folder: str


def main(descriptor: int) -> None:
    """Serve on the socket of that number until it ends."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent alone decides
    control = socket.socket(fileno=descriptor)
    config: Config = pickle.loads(control.recv(1 << 16))
    server = _Server(control, config, parent)
    try:
        try:
            server.prepared = _prepare(config)
        except Exception as error:
            control.send(f"failed {type(error).__name__}: {error}".encode()[:4000])
            return
        gc.collect()
        gc.disable()  # a child lives too briefly to collect, and must not touch, and so copy, what it was forked with
        control.send(b"ready")
        server.run()
    except BrokenPipeError:
        return  # the parent ended meanwhile
    finally:
        server.end()


def _prepare(config: Config) -> Any:
    """All that children would otherwise do each: imports, the target, a kernel's first compilation."""
    import tvm

    from lowering import ImplicitGemm, conv2d
    from lowering.epilogue import EpilogueOp
    from schedules import Machine, parse_target

    from ...kernels import layer_kernels
    from ...pipeline_build import TIR_PIPELINE
    from .child import Prepared
    from .flush import compile_touch, flush_buffer

    target = parse_target(config.target)
    machine = Machine.from_target(target)
    first = layer_kernels(ImplicitGemm(), conv2d(8, 6, 6, 8, 3), machine, (EpilogueOp("bias", 0),))
    funcs = {f"k{i}": k.func.with_attr("global_symbol", f"k{i}") for i, k in enumerate(first.kernels)}
    tvm.compile(tvm.IRModule(funcs), target=target, tir_pipeline=TIR_PIPELINE)["k0"]
    touch = compile_touch(target, config.threads)
    return Prepared(target, machine, config.threads, touch, flush_buffer(config.threads, config.flush_bytes))


@dataclass
class _Server:
    control: socket.socket
    config: Config
    parent: int
    prepared: Any = None
    children: dict[int, int] = field(default_factory=dict)  # process -> number

    def run(self) -> None:
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while os.getppid() == self.parent:
            both: list[Any] = [self.control, woken]
            ready, _, _ = select.select(both, [], [], POLL_SECONDS)
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
            self.reap()
            if self.control in ready and not self.obey():
                return

    def reap(self) -> None:
        while self.children:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return
            self.control.send(f"exit {self.children.pop(process)} {status}".encode())

    def obey(self) -> bool:
        """Do what one message says; False at the end of the socket."""
        text, ancillary, _, _ = self.control.recvmsg(256, socket.CMSG_SPACE(4))
        if not text:
            return False
        do, number = text.decode().split()
        if do == "fork":
            (descriptor,) = array.array("i", ancillary[0][2])
            self.fork(int(number), descriptor)
        else:
            for process in [p for p, n in self.children.items() if n == int(number)]:
                os.kill(process, _SIGNALS[do])  # not reaped yet: the number is still this child's
        return True

    def fork(self, number: int, descriptor: int) -> None:
        server = os.getpid()
        process = os.fork()
        if process:
            os.close(descriptor)
            self.children[process] = number
            return
        status = 1
        try:
            self.control.close()
            _isolate(server, Path(self.config.folder) / f"{number}.txt")
            from .child import serve

            with Connection(descriptor) as connection:
                serve(connection, self.prepared)
            status = 0
        except BrokenPipeError:
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)  # nothing that was inherited may be tidied up here

    def end(self) -> None:
        for process in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        # Where the parent was killed nobody else removes it.
        shutil.rmtree(self.config.folder, ignore_errors=True)


def _isolate(server: int, said: Path) -> None:
    """Let this child die with its server, write its messages into `said`, and leave no core file."""
    import resource

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)

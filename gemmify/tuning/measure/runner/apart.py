"""Work in a process of its own, which may crash or hang."""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
from collections.abc import Callable
from typing import Any


def apart(work: Callable[[], Any], limit: float) -> tuple[str, Any]:
    """What `work()` returns in a forked process, or (outcome, why) where it does not return within `limit` seconds."""
    receive, send = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(receive)
            try:
                answer = ("value", work())
            except MemoryError as err:
                answer = ("memory", str(err) or "out of memory")
            except Exception as err:
                answer = ("crash", "{}: {}".format(type(err).__name__, " ".join(str(err).split())[:400]))
            with os.fdopen(send, "wb") as file:
                pickle.dump(answer, file)
            status = 0
        finally:
            os._exit(status)
    os.close(send)
    received, end = bytearray(), time.monotonic() + limit
    try:
        with os.fdopen(receive, "rb") as file:
            while select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
                part = os.read(file.fileno(), 1 << 20)
                if not part:
                    break
                received += part
            else:
                return "timeout", f"running took more than {limit:g} s"
    finally:
        # Harmless where it has ended: it is not waited for yet, so that the number is still its own.
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
    try:
        kind, value = pickle.loads(received)
        return kind, value
    except (EOFError, pickle.UnpicklingError):
        number = os.WTERMSIG(status)
        why = signal.Signals(number).name if number else f"exit status {os.WEXITSTATUS(status)}"
        hint = " (perhaps for want of memory)" if number == signal.SIGKILL else ""
        return "crash", f"its process was ended by {why}{hint}"

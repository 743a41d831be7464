"""A piece of work on its way to a device, and what a failure says of the work and of the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .helper import HelperError

MOST_KILLED = 2
"""A candidate during whose run so many devices went away is taken to be the cause."""
MOST_FAILED = 3
"""A trial that so many devices failed is given up as lost."""


@dataclass
class Try:
    """A piece of work on its way to a device: how far it came, and what became of it before."""

    phase: str = "waiting"
    address: str = ""
    killed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    begun: float = 0.0
    since: float = field(default_factory=time.monotonic)


class Gone(Exception):
    """The work cannot be done: (outcome, why)."""


def judge(err: Exception, tried: Try) -> None:
    """Decide what the end of a conversation says of candidate and device. Raises Gone where it is settled."""
    text = str(err)
    running = tried.phase == "running"
    if isinstance(err, HelperError) and running:
        if "Timeout" in err.kind or "session has expired" in text:
            raise Gone("timeout", "running took more than its limit")
        if not _is_link(err):
            raise Gone("crash", f"{err.kind}: {text}")
    if running:
        tried.killed.append(tried.address)
        if len(tried.killed) >= MOST_KILLED:
            raise Gone("crash", f"{len(tried.killed)} devices went away while it ran ({', '.join(tried.killed)})")
    elif tried.phase == "setup":
        tried.failed.append(tried.address)
    if len(tried.killed) + len(tried.failed) >= MOST_FAILED:
        raise Gone("lost", f"{MOST_FAILED} devices went away: {', '.join([*tried.failed, *tried.killed])}; {text}")
    if tried.phase not in ("running", "setup"):
        tried.phase = "waiting"


def _is_link(err: HelperError) -> bool:
    """Whether an exception speaks of the connection, not of what the device's functions raised."""
    return "Error caught from RPC call" not in str(err) and err.kind in (
        "ConnectionError",
        "ConnectionResetError",
        "InternalError",
        "OSError",
        "RPCError",
        "RuntimeError",
        "TVMError",
    )

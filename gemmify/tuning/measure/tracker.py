"""The address of TVM's tracker, and whether one answers there."""

from __future__ import annotations

import contextlib
import socket
import struct

from tvm.rpc import base

from ...errors import GemmifyError, InputError


def parse_tracker(text: str) -> tuple[str, int]:
    """The address in "HOST:PORT"; InputError where it is none."""
    host, _, port = str(text).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--tracker takes HOST:PORT, e.g. 192.168.1.10:9190, got {text!r}")
    return host.strip("[]"), int(port)


def checked_key(key: str) -> str:
    """`key` where it can be one of the tracker's; InputError otherwise."""
    if not isinstance(key, str) or not key or any(c.isspace() or c == ":" for c in key):
        raise InputError(f"--key takes the name that the servers were started with, without spaces, got {key!r}")
    return key


def greet_tracker(address: tuple[str, int]) -> None:
    """GemmifyError, saying how to start one, where no TVM tracker answers at `address`."""
    place = f"{address[0]}:{address[1]}"
    start = f"start one with `python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {address[1]}`"
    try:
        with contextlib.closing(socket.create_connection(address, timeout=5.0)) as sock:
            sock.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            if struct.unpack("<i", base.recvall(sock, 4))[0] != base.RPC_TRACKER_MAGIC:
                raise GemmifyError(f"what answers at {place} is no TVM tracker; {start}")
    except OSError as err:
        raise GemmifyError(f"no tracker answers at {place}: {err.strerror or err}; {start}") from err

"""What a remote device is, asked through a server that knows nothing of gemmify.

TVM's server cannot read a file of /proc (it asks for the length first). A library of one function, compiled for the
plainest CPU of the target's architecture, reads it with the C library's `open` and `read`.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.script import tirx as T

from ...bench.header import cpu_model
from ...export import write_library
from ...host import cpu_flags

_PATH_BYTES = 256
_FILE_BYTES = 1 << 16


def build_probe(triple: str, path: str) -> None:
    """Write the library for machines of `triple` (LLVM's); GemmifyError where it cannot be linked."""

    @T.prim_func
    def read_file(p: T.handle, o: T.handle, c: T.handle) -> None:
        T.func_attr({"global_symbol": "read_file", "tirx.noalias": True})
        name = T.match_buffer(p, (_PATH_BYTES,), "uint8")
        out = T.match_buffer(o, (_FILE_BYTES,), "uint8")
        count = T.match_buffer(c, (2,), "int64")
        count[0] = T.Cast("int64", T.call_extern("int32", "open", name.data, T.int32(0)))
        count[1] = T.int64(-1)
        if count[0] >= T.int64(0):
            count[1] = T.call_extern("int64", "read", T.Cast("int32", count[0]), out.data, T.int64(_FILE_BYTES))
            T.evaluate(T.call_extern("int32", "close", T.Cast("int32", count[0])))

    target = tvm.target.Target({"kind": "llvm", "mtriple": triple})
    write_library(tvm.compile(tvm.IRModule({"read_file": read_file}), target=target), triple, path)


def remote_file(module: Any, device: Any, path: str) -> str | None:
    """The first 64 KiB of a text file on the device; None where it cannot be read."""
    name = np.zeros(_PATH_BYTES, "uint8")
    encoded = np.frombuffer(path.encode(), "uint8")
    name[: encoded.size] = encoded
    out = tvm.runtime.tensor(np.zeros(_FILE_BYTES, "uint8"), device)
    count = tvm.runtime.tensor(np.zeros(2, "int64"), device)
    module["read_file"](tvm.runtime.tensor(name, device), out, count)
    length = int(count.numpy()[1])
    return None if length < 0 else bytes(out.numpy()[:length]).decode("utf-8", "replace")


def device_facts(module: Any, device: Any) -> dict[str, Any]:
    """`cpu` (its model's name, "" where unknown), `flags` (sorted) and `cores` (physical ones that the server may use),
    both None where unknown."""
    cpuinfo = remote_file(module, device, "/proc/cpuinfo")
    status = remote_file(module, device, "/proc/self/status")
    quota = remote_file(module, device, "/sys/fs/cgroup/cpu.max")
    facts: dict[str, Any] = {"cpu": "", "flags": None, "cores": count_cores(cpuinfo or "", status or "", quota or "")}
    if cpuinfo:
        with tempfile.TemporaryDirectory(prefix="gemmify-probe-") as folder:
            text = Path(folder, "cpuinfo")
            text.write_text(cpuinfo, encoding="utf-8")
            flags = cpu_flags(text)
            facts["flags"] = None if flags is None else sorted(flags)
            facts["cpu"] = cpu_model(text) if "model name" in cpuinfo else ""
    return facts


def count_cores(cpuinfo: str, status: str, quota: str) -> int | None:
    """Physical cores by the texts of /proc/cpuinfo, /proc/self/status and the control group's cpu.max."""
    fields = [line.partition(":") for line in (*cpuinfo.splitlines(), *status.splitlines())]
    found = {key.strip(): value.strip() for key, _, value in fields}
    try:
        cpus = sum(
            int(high or low) - int(low) + 1
            for low, _, high in (part.partition("-") for part in found["Cpus_allowed_list"].split(","))
        )
        cores = max(1, math.ceil(cpus * int(found.get("cpu cores", 1)) / max(1, int(found.get("siblings", 1)))))
    except (KeyError, ValueError):
        return None
    words = quota.split()
    if len(words) == 2 and words[0] != "max":
        cores = min(cores, max(1, int(words[0]) // max(1, int(words[1]))))
    return cores

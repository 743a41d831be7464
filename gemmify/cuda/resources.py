"""What a kernel takes of a multiprocessor, as the assembler reports it (`ptxas -v`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")
_SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


@dataclass(frozen=True)
class KernelResources:
    """Of one kernel on one architecture: registers of a thread, static shared memory of a block, and what a thread
    keeps in local memory (`stack`, of which spills are a part), in bytes. Dynamic shared memory is asked for at the
    launch and is not in it."""

    name: str
    arch: str
    registers: int
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def spills(self) -> bool:
        """Whether registers did not suffice."""
        return bool(self.spill_stores or self.spill_loads)


def parse_resources(said: str) -> tuple[KernelResources, ...]:
    """Every entry function in the output of `ptxas -v`, in its order; other lines are passed over."""
    found: list[KernelResources] = []
    entry: re.Match[str] | None = None
    spills = (0, 0, 0)
    for line in said.splitlines():
        if match := _ENTRY.search(line):
            entry, spills = match, (0, 0, 0)
        elif entry is not None and (match := _SPILLS.search(line)):
            spills = (int(match[1]), int(match[2]), int(match[3]))
        elif entry is not None and (match := _USED.search(line)):
            shared = _SHARED.search(match[2])
            name, arch = entry[1], entry[2].rstrip("af")
            found.append(KernelResources(name, arch, int(match[1]), int(shared[1]) if shared else 0, *spills))
            entry = None
    return tuple(found)

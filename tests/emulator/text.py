"""CUDA text to an image that the emulated driver loads: a few replacements, then g++."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .build import ARCH, HERE, BuildError, digest, headers_digest, make, run

_FLAGS = [
    "-std=c++17", "-O1", *ARCH, "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=fast", "-fno-math-errno",
    "-fvisibility=hidden", "-ftrivial-auto-var-init=pattern", "-U_FORTIFY_SOURCE",
]  # fmt: skip
_WATCHED = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
_INCLUDE = HERE / "include"
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\((\d+)\)\s*)?([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(r"__shared__\s+(?:(?:__align__|alignas)\((\d+)\)\s*)?([\w ]+?)\s+(\w+)\s*\[([^\]]+)\]\s*;")
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(\s*(\d+)[^)]*\)\s+)?(\w+)\s*\(")
_WGMMA = re.compile(r"\bgemmify_wgmma_m64n(\d+)k\d+_(f16|bf16|tf32)\b")
_NUMBERED = re.compile(r"\bgemmify_(cp_async_wait|wgmma_wait|hold)_(\d+)\b")
_KINDS = {"f16": 0, "bf16": 1, "tf32": 2}


def _shared(text: str) -> str:
    """Shared memory comes from the emulator, which fills and guards it."""
    text = _DYNAMIC.sub(r"\2* \3 = (\2*)gemmify_emulator_dynamic_shared(\1+0);", text)
    numbers = itertools.count()

    def array(match: re.Match[str]) -> str:
        alignment, dtype, name, size = match.groups()
        arguments = f"{next(numbers)}, sizeof({dtype}) * ({size}), {alignment or 16}"
        return f"{dtype}* {name} = ({dtype}*)gemmify_emulator_static_shared({arguments});"

    text = _STATIC.sub(array, text)
    if "__shared__ " in text:
        line = next(line for line in text.splitlines() if "__shared__ " in line)
        raise BuildError(f"the emulator does not know this form of shared memory: {line.strip()}")
    return text


def _numbered(text: str) -> str:
    """The device functions of schedules/cuda/intrinsics.py that have a number in their names."""
    lines = {f"#define {match[0]}(c, a, at_a, b, at_b) gemmify_emulator_wgmma("
             f"c, (const char*)(a) + (at_a), (const char*)(b) + (at_b), {match[1]}, {_KINDS[match[2]]}, __LINE__)"
             for match in _WGMMA.finditer(text)}  # fmt: skip
    for match in _NUMBERED.finditer(text):
        body = {
            "cp_async_wait": f"() gemmify_emulator_wait({match[2]})",
            "wgmma_wait": f"() gemmify_emulator_wgmma_wait({match[2]}, __LINE__)",
            "hold": "(c)",
        }[match[1]]
        lines.add(f"#define {match[0]}{body}")
    return "\n".join(sorted(lines))


def _kernels(text: str) -> str:
    """How the driver finds each kernel."""
    kernels = {name: threads or "1024" for threads, name in _KERNEL.findall(text)}
    return "\n".join(f"GEMMIFY_EMULATOR_KERNEL({name}, {threads})" for name, threads in kernels.items())


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_").rstrip("af"))


@cache
def _header(flags: tuple[str, ...]) -> Path:
    """A folder with the header of all kernels, compiled: it is most of what a small kernel takes."""

    def build(place: Path) -> None:
        place.mkdir()
        run([*flags, "-x", "c++-header", str(_INCLUDE / "cuda_emulated.h"), "-o", str(place / "cuda_emulated.h.gch")])

    return make(f"header-{digest(headers_digest(), flags)}", build)


def compile_text(text: str, archs: Sequence[str] = ("sm_90",), watched: bool = False) -> bytes:
    """An image of all kernels of CUDA `text`, loadable on `archs`. BuildError where g++ does not take the text.

    It is what nvcc's fatbin is to a real driver. A `watched` kernel tells of every access: races and exact bounds.
    """
    # The header must come first to be taken from its compiled form.
    source = "\n".join([
        '#include "cuda_emulated.h"', f"#define __CUDA_ARCH__ {10 * min(_number(arch) for arch in archs)}",
        _numbered(text), _shared(text), _kernels(text),
    ])  # fmt: skip
    flags = [*_FLAGS, *(_WATCHED if watched else ())]

    def build(path: Path) -> None:
        cpp = path.with_suffix(".cpp")
        cpp.write_text(source)
        place = path.with_suffix(".o")
        run([*flags, "-c", f"-I{_header(tuple(flags))}", f"-I{_INCLUDE}", str(cpp), "-o", str(place)])
        run(["-shared", str(place), "-o", str(path)])  # without the sanitizer's library

    final = make(f"kernel-{digest(headers_digest(), source, flags)}.so", build)
    image = final.read_bytes()
    numbers = [_number(arch) for arch in archs]
    return struct.pack(f"<8sQI{len(numbers)}i", b"GEMMIFYE", len(image), len(numbers), *numbers) + image

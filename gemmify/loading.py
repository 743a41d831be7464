"""Mapping compiled code into this process, after judging whether this machine and this TVM can run it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from . import host
from .errors import GemmifyWarning, IncompatibleError, InputError
from .manifest import Manifest
from .threads import import_tvm


def check_graph(wanted: Any, on_gpu: bool) -> bool:
    """`wanted` where it is True or False and fits the target; InputError otherwise."""
    if not isinstance(wanted, bool):
        raise InputError(f"cuda_graph must be True or False, got {wanted!r}")
    if wanted and not on_gpu:
        raise InputError("a CUDA graph was asked for, and the code is for a CPU; leave --cuda-graph (cuda_graph) out")
    return wanted


def check_host(manifest: Manifest, source: str = "this network") -> None:
    """IncompatibleError where this machine, its GPU included, cannot run what `manifest` describes; runs none of its
    code."""
    kind = manifest.target.get("kind", "llvm")
    if kind not in ("llvm", "c", "cuda") or (kind == "cuda" and not manifest.archs):
        raise IncompatibleError(f"{source} is made for target {kind}, this version runs code for CPUs and CUDA only")
    _check_cpu(manifest, source)
    if manifest.archs:
        from .cuda.device import require_archs

        require_archs(manifest.archs, source)


def _check_cpu(manifest: Manifest, source: str) -> None:
    arch = host.arch_of(manifest.triple)
    if arch != host.host_arch():
        raise IncompatibleError(
            f"{source} holds code for {arch}, this machine is {host.host_arch()}; compile it with --target for this one"
        )
    flags = host.cpu_flags()
    if flags is None:
        if manifest.cpu_features:
            warnings.warn(f"cannot tell whether this CPU has what {source} needs", GemmifyWarning, stacklevel=3)
        return
    missing = [f for f in manifest.cpu_features if f not in flags]
    if missing:
        older = "cuda -arch=sm_XX -host='llvm -mcpu=x86-64'" if manifest.archs else "llvm -mcpu=x86-64-v3"
        raise IncompatibleError(
            f"{source} needs CPU features that this machine lacks: {', '.join(missing)}; compile it on this machine, "
            f'or for an older CPU, e.g. --target "{older}"'
        )


def check_versions(tvm: Any, manifest: Manifest, source: str) -> None:
    """Two TVM releases do not share the format of the bytecode, nor the calling convention: major.minor must agree."""
    import tvm_ffi

    found = {"apache-tvm": (manifest.tvm, tvm.__version__), "apache-tvm-ffi": (manifest.tvm_ffi, tvm_ffi.__version__)}
    for package, (made, here) in found.items():
        if str(made).split(".")[:2] != str(here).split(".")[:2]:
            raise IncompatibleError(
                f"{source} was made with {package} {made}, here is {here}; install {package}=={made} or compile again"
            )


def runtime_for(manifest: Manifest) -> Any:
    """TVM, with its CUDA runtime where the code needs that; GemmifyError where it is missing."""
    if manifest.archs:
        from .cuda.device import load_runtime

        load_runtime()
    return import_tvm()


def map_library(tvm: Any, path: Path) -> Any:
    """The tvm.runtime.Module of the library at `path`."""
    # Not tvm.runtime.load_module: it goes by the file's extension, and a library may have been renamed.
    return tvm.get_global_func("ffi.Module.load_from_file.so")(str(path.resolve()), "so")


def load_module(path: str | os.PathLike[str]) -> Any:
    """The tvm.runtime.Module of a library that `export.write_library` made; where there is a GPU, with TVM's CUDA
    runtime. Raises what TVM raises for the library, GemmifyError where CUDA's own runtime library is missing."""
    from .cuda.device import gpu_here, load_runtime

    if gpu_here() is not None:
        load_runtime()
    return map_library(import_tvm(), Path(path))


def link_here(executable: Any, manifest: Manifest) -> Any:
    """The code of a compilation, mapped into this process."""
    if not manifest.archs:
        return executable.jit()
    # As an exported library: a compiler that started without a GPU's runtime holds text that TVM could not load.
    from .export import link_image

    tvm = runtime_for(manifest)
    with link_image(executable, manifest.triple, manifest.archs) as image:
        return map_library(tvm, image)

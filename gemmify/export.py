"""Writing a compiled network as one shared library, with its manifest inside it and beside it.

Everything is made in one hidden folder beside the destination, which is always removed, and moved into place by
renaming: whatever fails, and on Ctrl-C, the destination holds the old file or none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from .errors import GemmifyError, InputError
from .host import arch_of, host_arch
from .manifest import Manifest, append_manifest, read_manifest, target_archs, target_triple
from .threads import without_scope_lines

__all__ = [
    "Manifest",
    "check_destination",
    "copy_library",
    "export_executable",
    "find_linker",
    "read_manifest",
    "write_file",
    "write_library",
]

_INSTALL = "install gcc or clang (e.g. apt install gcc), or `pip install ziglang`"


def check_destination(path: str | os.PathLike[str]) -> Path:
    """`path`, after a check that a library can be written there: call it before the work, not after.

    Raises InputError where it is a folder, or its own folder is missing or not writable.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"the destination must be the path of a file, got {path!r}")
    place = Path(path)
    if place.is_dir():
        raise InputError(f"cannot write {place}: it is a folder; give the name of a file in it, e.g. {place / 'NAME'}")
    if place.exists() and not place.is_file():  # what is written takes the place of what was there
        raise InputError(f"cannot write {place}: it is a device, a pipe or a socket; give the name of a file")
    folder = place.parent
    if not folder.is_dir():
        raise InputError(f"cannot write {place}: there is no folder {folder}; create it first")
    try:
        # Asking for the permission says too little: root passes, a read-only file system too.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as err:
        said = err.strerror or err
        raise InputError(f"cannot write {place}: the folder {folder} is not writable ({said})") from err
    return place


def write_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], None]) -> Path:
    """Let `write` fill a file that takes the name `path` only when it is complete; errors as `check_destination`."""
    place = check_destination(path)
    try:
        with _workspace(place) as folder:
            with (folder / "file").open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(folder / "file", place)
    except OSError as err:
        raise _cannot_write(place, err) from err
    return place


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8, complete or not at all."""
    return write_file(path, lambda file: _write(file, text.encode()))


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)


def _cannot_write(place: Path, err: OSError) -> GemmifyError:
    return GemmifyError(f"cannot write {place}: {err.strerror or err}; free space or choose another place")


def find_linker(triple: str) -> list[str]:
    """The command that links objects for `triple` into a shared library, up to the `-o`.

    CXX or CC decide where they are set. For this machine's architecture then any C compiler that TVM finds, a bare
    linker, or the `ziglang` package; for another one its cross compiler, ld.lld, or ziglang. Raises GemmifyError,
    saying what to install, where there is none.
    """
    chosen = os.environ.get("CXX") or os.environ.get("CC")
    if chosen:
        command = shlex.split(chosen)
        if not shutil.which(command[0]):
            raise GemmifyError(f"cannot link: CXX or CC names {command[0]}, not on the PATH; unset it, or {_INSTALL}")
        return [*command, "-shared", "-fPIC"]
    arch = arch_of(triple)
    native = arch == host_arch()
    compilers = (
        ["g++", "gcc", "clang++", "clang", "c++", "cc"] if native else [f"{triple}-gcc", f"{arch}-linux-gnu-gcc"]
    )
    for name in compilers:
        if shutil.which(name):
            return [name, "-shared", "-fPIC"]
    # The objects refer to nothing of a C library's start-up files, so the linker alone can do it.
    for name in ["ld", "ld.lld"] if native else [f"{arch}-linux-gnu-ld", "ld.lld"]:
        if shutil.which(name):
            return [name, "-shared"]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu", "-shared", "-fPIC"]
    what = "a C compiler or a linker" if native else f"a cross compiler for {arch} (e.g. {arch}-linux-gnu-gcc)"
    raise GemmifyError(f"cannot link the library: {what} is needed and none is on the PATH; {_INSTALL}")


def _link(command: list[str], name: str, output: Path, objects: list[str]) -> None:
    """Run the linker for the library `name`; GemmifyError with its first complaint where it fails."""
    try:
        done = subprocess.run([*command, "-o", str(output), *objects], capture_output=True, text=True, errors="replace")
    except OSError as err:
        raise GemmifyError(f"cannot link {name}: {command[0]}: {err.strerror or err}; {_INSTALL}") from err
    if done.returncode != 0 or not output.is_file():
        words = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        full = [line for line in words if "No space left" in line or "File too large" in line or "quota" in line]
        said = (full or words or [f"exit status {done.returncode}"])[0]
        other = f"{command[0]} failed; set CXX to a compiler that can link for this target, or {_INSTALL}"
        advice = "free disk space, or export to another place" if full else other
        raise GemmifyError(f"cannot link {name}: {said}; {advice}")


@contextlib.contextmanager
def _workspace(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place`, on the same file system, removed at the end whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=".gemmify-", dir=place.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _memory_objects(folder: Path, names: tuple[str, ...]) -> Iterator[None]:
    """Let TVM write the object files `names` of `folder` into memory instead of onto the disk.

    LLVM ends the whole process ("IO failure on output stream") where a disk is full while it writes an object; in
    memory it cannot happen, and the linker, which does write to the disk, is a process of its own. Where there is no
    memfd (not Linux) the objects are ordinary files.
    """
    if not hasattr(os, "memfd_create"):
        yield
        return
    descriptors = []
    try:
        for name in names:
            descriptors.append(os.memfd_create(f"gemmify-{name}"))
            # By process id, not /proc/self: the linker opens it too.
            os.symlink(f"/proc/{os.getpid()}/fd/{descriptors[-1]}", folder / name)
        yield
    finally:
        for fd in descriptors:
            os.close(fd)


def _finish(image: Path, manifest: Manifest, place: Path) -> Path:
    """Append the manifest to `image`, write it beside too, flush both to the disk and rename them into place."""
    with image.open("r+b") as file:
        append_manifest(file, manifest)
        file.flush()
        os.fsync(file.fileno())
    beside = image.with_name("manifest.json")
    with beside.open("w", encoding="utf-8") as text:
        text.write(manifest.to_json() + "\n")
        text.flush()
        os.fsync(text.fileno())
    os.replace(image, place)
    os.replace(beside, place.with_name(place.name + ".json"))
    return place


def _pack(executable: Any, archs: Sequence[str]) -> Callable[..., str] | None:
    """TVM's hook that packs the imports of a library: with device code for `archs`; None, TVM's own way, for a CPU, and
    for a network that computes nothing: there is no object file then whose kind ours could take."""
    if not archs:
        return None
    from .cuda.packing import has_device_code, pack_imports, write_object
    from .cuda.toolchain import compile_cuda

    if not has_device_code(executable.mod):
        return None

    def pack(module: Any, _system: bool, prefix: str, folder: str) -> str:
        packed = pack_imports(module, lambda text: compile_cuda(text, tuple(archs)).image)
        place = Path(folder) / f"{prefix}devc.o"
        with place.open("wb") as file:
            write_object(Path(folder) / "lib0.o", packed.parts(), file)
        return str(place)

    return pack


def _build_image(executable: Any, triple: str, archs: Sequence[str], name: str, folder: Path) -> Path:
    """Link `executable` as a shared library in `folder`; `name` is what errors call it."""
    command, image = find_linker(triple), folder / "library.so"
    with _memory_objects(folder, ("lib0.o", "devc.o")), without_scope_lines():
        executable.mod.export_library(
            str(image),
            fcompile=lambda output, objects, **_: _link(command, name, Path(output), list(objects)),
            fpack_imports=_pack(executable, archs),
            workspace_dir=str(folder),
        )
    return image


def export_executable(executable: Any, manifest: Manifest, path: str | os.PathLike[str]) -> Path:
    """Write `executable` (Relax VMExecutable) and `manifest` as the shared library `path`, and `path`.json beside it.

    The code for a GPU goes in as machine code for the architectures of the manifest. Raises InputError for an
    impossible path, GemmifyError where compiling that code, linking or writing fails (no compiler, full disk).
    """
    place = check_destination(path)
    find_linker(manifest.triple)  # before the work, not after
    try:
        with _workspace(place) as folder:
            return _finish(
                _build_image(executable, manifest.triple, manifest.archs, place.name, folder), manifest, place
            )
    except OSError as err:
        raise _cannot_write(place, err) from err


@contextlib.contextmanager
def link_image(executable: Any, triple: str, archs: Sequence[str]) -> Iterator[Path]:
    """`executable` as a shared library in a folder that lives as long as the block; errors as `export_executable`."""
    with tempfile.TemporaryDirectory(prefix="gemmify-") as folder:
        try:
            image = _build_image(executable, triple, archs, "the network", Path(folder))
        except OSError as err:
            raise _cannot_write(Path(folder), err) from err
        yield image


def write_library(executable: Any, target: Any, path: str | os.PathLike[str]) -> Path:
    """Write what `tvm.compile` made for `target` as the shared library `path`, with no manifest: for our own processes.

    `target` is a checked tvm Target, or the LLVM triple of code for a CPU. Errors as `export_executable`.
    """
    place = check_destination(path)
    triple = target if isinstance(target, str) else target_triple(target)
    try:
        with _workspace(place) as folder:
            archs = () if isinstance(target, str) else target_archs(target)
            os.replace(_build_image(executable, triple, archs, place.name, folder), place)
            return place
    except OSError as err:
        raise _cannot_write(place, err) from err


def copy_library(source: Path, manifest: Manifest, path: str | os.PathLike[str]) -> Path:
    """Copy a loaded library (with its manifest inside) to `path`, atomically, and write `path`.json beside it."""
    place = check_destination(path)
    try:
        with _workspace(place) as folder:
            image = folder / "library"
            shutil.copyfile(source, image)
            shutil.copymode(source, image)
            with image.open("r+b") as file:
                os.fsync(file.fileno())
            beside = folder / "manifest.json"
            beside.write_text(manifest.to_json() + "\n", encoding="utf-8")
            os.replace(image, place)
            os.replace(beside, place.with_name(place.name + ".json"))
            return place
    except OSError as err:
        raise _cannot_write(place, err) from err

"""The manifest of a compiled network, and how it travels inside the exported library.

An exported file is the ELF image, then the manifest as JSON text, then a fixed trailer that says how long both are:

    [ELF image][JSON, UTF-8][image bytes u64][JSON bytes u64][crc32 of the JSON u32][b"GEMMIFY\\x01"]   little endian

The dynamic loader ignores what follows the image, so one file that was moved or renamed still runs, and the manifest
can be read and judged before any of its code is mapped.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from .errors import IncompatibleError, InputError
from .host import arch_of, elf_arch, kernel_names

FORMAT = 1
MAGIC = b"GEMMIFY\x01"
_TRAILER = struct.Struct("<QQI8s")


@dataclass(frozen=True)
class TensorSpec:
    """An input or an output: its name, its static shape, its dtype as numpy spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(s) for s in self.shape))

    def __str__(self) -> str:
        return f"{self.name}: {'x'.join(map(str, self.shape)) or 'scalar'} {self.dtype}"


@dataclass(frozen=True)
class Manifest:
    """All that is known of a compiled network without running it.

    `target` is TVM's dict, `triple` LLVM's (of the host, for a GPU); `cpu_features` are spelled as in /proc/cpuinfo.
    Each entry of `layers` holds name, op, problem, lowering, reason, gemm (m, n, k), count, macs, workspace_bytes,
    weight_bytes. `memory` holds bytes by kind (weights, arena, workspace, outputs), `plan` layer name -> lowering,
    `log_hash` names the tuning records that were used, `tuning` says how many layers they settled
    (`tuning.choice.coverage`), `threads` is the number of threads the code was made for, `cuda_graph` says that a run
    is to repeat a recorded graph of launches.
    """

    model: str
    gemmify: str
    tvm: str
    tvm_ffi: str
    target: dict[str, Any]
    triple: str
    cpu_features: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[dict[str, Any], ...]
    memory: dict[str, int]
    plan: dict[str, Any] = field(default_factory=dict)
    log_hash: str | None = None
    tuning: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    cuda_graph: bool = False
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs"):
            # The front end's own spec class is welcome too: anything with the same three attributes.
            specs = tuple(TensorSpec(s.name, s.shape, str(s.dtype)) for s in getattr(self, name))
            object.__setattr__(self, name, specs)
        object.__setattr__(self, "cpu_features", tuple(self.cpu_features))
        object.__setattr__(self, "layers", tuple(dict(layer) for layer in self.layers))

    @classmethod
    def create(
        cls,
        target: Any,
        *,
        model: str,
        inputs: Any,
        outputs: Any,
        layers: Any,
        memory: Mapping[str, int],
        plan: Mapping[str, Any] | None = None,
        log_hash: str | None = None,
        tuning: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> Manifest:
        """A manifest for `target` (tvm.target.Target); fills in the versions, the triple and the CPU features."""
        import tvm
        import tvm_ffi

        from . import __version__

        triple = target_triple(target)
        return cls(
            model=model,
            gemmify=__version__,
            tvm=str(tvm.__version__),
            tvm_ffi=str(tvm_ffi.__version__),
            target=target_dict(target),
            triple=triple,
            cpu_features=required_cpu_features(target),
            inputs=inputs,
            outputs=outputs,
            layers=layers,
            memory={k: int(v) for k, v in memory.items()},
            plan=dict(plan or {}),
            log_hash=log_hash,
            tuning=dict(tuning or {}),
            threads=int(threads),
        )

    @property
    def archs(self) -> tuple[str, ...]:
        """The GPU architectures that the code is for, lowest first; () for a CPU."""
        return archs_of(self.target)

    def to_json(self) -> str:
        """The manifest as indented JSON text."""
        return json.dumps(asdict(self), indent=1, default=_plain)

    @classmethod
    def from_json(cls, text: str, source: str = "the manifest") -> Manifest:
        """The inverse of `to_json`; IncompatibleError for another format, InputError for text that is no manifest."""
        try:
            data = json.loads(text)
        except ValueError as err:
            raise InputError(f"{source} holds a manifest that is not JSON ({err}); export it again") from err
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise IncompatibleError(
                f"{source} has manifest format {found}, this gemmify reads format {FORMAT}; "
                "compile the model again, or use the gemmify version that made it"
            )
        known = {f.name for f in fields(cls)}
        try:
            for name in ("inputs", "outputs"):
                data[name] = tuple(TensorSpec(s["name"], tuple(s["shape"]), s["dtype"]) for s in data[name])
            return cls(**{k: v for k, v in data.items() if k in known})
        except (KeyError, TypeError, AttributeError) as err:
            raise InputError(f"{source} holds an incomplete manifest ({err}); export it again") from err


def _plain(value: Any) -> Any:
    """JSON for what TVM and numpy hand out: their own numbers, maps and arrays; sets; else the text."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "items"):
        return {str(k): v for k, v in value.items()}
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return list(value)
    return int(value) if hasattr(value, "__int__") else str(value)


def target_dict(target: Any) -> dict[str, Any]:
    """A TVM target as plain JSON data: its kind, keys and attributes."""
    plain: dict[str, Any] = json.loads(json.dumps(_plain(target.export()), default=_plain))
    return plain


def cpu_target(target: Any) -> Any:
    """`target`, or the target of its host where it is a GPU's."""
    return target if target.host is None or target.kind.name == "llvm" else target.host


def target_archs(target: Any) -> tuple[str, ...]:
    """The GPU architectures of a checked target, lowest first; () for a CPU."""
    return archs_of(target_dict(target))


def archs_of(target: Mapping[str, Any]) -> tuple[str, ...]:
    """The GPU architectures of the dict of a target, lowest first; () for a CPU. As `schedules.cuda.target` writes
    them: the lowest is TVM's own `arch`, the others are among `libs`."""
    if target.get("kind") != "cuda":
        return ()
    further = [str(name) for name in target.get("libs") or () if str(name).startswith("sm_")]
    return tuple(filter(None, (str(target.get("arch", "")), *further)))


def target_triple(target: Any) -> str:
    """The LLVM triple that `target`, or its host, generates code for."""
    import tvm

    triple = dict(cpu_target(target).attrs).get("mtriple")
    return str(triple or tvm.target.codegen.llvm_get_system_triple())


def required_cpu_features(target: Any) -> tuple[str, ...]:
    """The CPU features that code for `target` or its host (mcpu and mattr) may use, as /proc/cpuinfo spells them."""
    import tvm

    features = tvm.target.codegen.llvm_get_cpu_features(cpu_target(target))
    return kernel_names(arch_of(target_triple(target)), (str(f) for f in features))


def append_manifest(file: IO[bytes], manifest: Manifest) -> None:
    """Write `manifest` and the trailer at the end of `file`, which holds the library's image."""
    file.seek(0, 2)
    image = file.tell()
    text = manifest.to_json().encode()
    file.write(text)
    file.write(_TRAILER.pack(image, len(text), zlib.crc32(text), MAGIC))


def read_manifest(path: Path) -> Manifest:
    """The manifest inside the library at `path`, read without loading it.

    InputError where the file is missing, is no library, is cut short or was not made by gemmify; IncompatibleError
    where its manifest has another format.
    """
    if not path.exists():
        raise InputError(f"there is no file {path}; give the .so that `gemmify compile` wrote")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the .so that `gemmify compile` wrote")
    try:
        elf_arch(path)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TRAILER.size))
            tail = file.read()
            image, length, crc, magic = _TRAILER.unpack(tail)
            if magic[:7] != MAGIC[:7]:
                raise InputError(
                    f"{path} holds no gemmify manifest: it was cut short, stripped, or not made by `gemmify compile`; "
                    "export it again"
                )
            if image + length + _TRAILER.size != size:
                raise InputError(f"{path} is damaged: its parts do not add up to its {size} bytes; export it again")
            file.seek(image)
            text = file.read(length)
    except OSError as err:
        raise InputError(f"cannot read {path}: {err.strerror or err}") from err
    if magic != MAGIC:
        raise IncompatibleError(f"{path} was written in another file format; use the gemmify version that made it")
    if zlib.crc32(text) != crc:
        raise InputError(f"{path} is damaged: its manifest does not match its checksum; export it again")
    return Manifest.from_json(text.decode("utf-8", errors="replace"), str(path))

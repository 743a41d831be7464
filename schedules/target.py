"""What a user writes for a target, as a checked TVM target: `"llvm"`, `"llvm -mcpu=x86-64-v3"`, `"cuda -arch=sm_90"`, a
dict, a JSON text."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import tvm
from tvm.target import Target, codegen

from .host import host_cores

_INT_OPTIONS = ("num-cores", "opt-level", "vector-width", "max_num_threads", "thread_warp_size")
_FLAGS = ("tf32",)  # options without a value
# Server cores with AVX-512, in order of age, and the features by which they are told apart.
_SERVERS = ("skylake-avx512", "cascadelake", "icelake-server", "sapphirerapids", "graniterapids", "znver4", "znver5")
_VECTOR = ("avx", "amx", "fma", "f16c")
_BEYOND_NAMES = ("avx10.1",)  # a number for features that all have names of their own


class TargetError(ValueError):
    """The target is not one that TVM can compile for, or its description cannot be read."""


@lru_cache(maxsize=1)
def host_target() -> Target:
    """This machine as an LLVM target: detected CPU, its physical cores, and only the features that it really has.

    A hypervisor may hide instructions that the CPU's name implies; those are switched off by `mattr`, so that compiled
    code never meets an illegal instruction.
    """
    mcpu, triple = str(codegen.llvm_get_system_cpu()), str(codegen.llvm_get_system_triple())
    config: dict[str, Any] = {"kind": "llvm", "mcpu": mcpu, "mtriple": triple, "num-cores": host_cores()}
    present = _host_features()
    if codegen.llvm_is_valid_cpu(mcpu, triple):
        config["mcpu"] = name_by_features(config, present)
    else:
        del config["mcpu"]
    hidden = hidden_features(_implied(config), present)
    if hidden:
        config["mattr"] = [f"-{name}" for name in hidden]
    return Target(config)


def _implied(config: dict[str, Any]) -> frozenset[str]:
    return frozenset(str(f) for f in codegen.llvm_get_cpu_features(Target(config)))


def _host_features() -> dict[str, bool]:
    """What LLVM finds by asking the CPU itself: feature -> present."""
    probe = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures", allow_missing=True)
    found = probe() if probe is not None else None
    return {str(name): bool(value) for name, value in found.items()} if found else {}


def name_by_features(config: Mapping[str, Any], present: Mapping[str, bool]) -> str:
    """The CPU's name, or the server core that its vector instructions belong to where they go beyond that name.

    A hypervisor may report the model number of a small core for a large one; LLVM goes by that number.
    """
    detected = str(config["mcpu"])
    names = [name for name in _SERVERS if codegen.llvm_is_valid_cpu(name, str(config["mtriple"]))]
    have = {name for name, found in present.items() if found and name.startswith(_VECTOR)}
    implied = {
        name: {f for f in _implied({**config, "mcpu": name}) if f in present and f.startswith(_VECTOR)}
        for name in (detected, *names)
    }
    if have <= implied[detected] | set(_BEYOND_NAMES):
        return detected
    return min((detected, *names), key=lambda name: len(have ^ implied[name]))


def hidden_features(implied: frozenset[str], present: Mapping[str, bool]) -> list[str]:
    """The features that a CPU's name implies and that the machine reports as absent, sorted."""
    return sorted(name for name in implied if present.get(name) is False)


def parse_target(spec: str | Mapping[str, Any] | Target) -> Target:
    """A checked TVM target from what a user writes.

    `"llvm"` is this machine; `"llvm -mcpu=x86-64-v3"` and `"cuda -arch=sm_80,sm_90 -tf32"` name options; a JSON text, a
    dict, one of TVM's target tags and a Target are taken too. What a cuda target takes: `schedules.cuda.target`. Raises
    TargetError for what cannot be compiled for: an unknown kind or option, a CPU name that LLVM does not know (the
    message names close ones), a GPU architecture that is unknown, or missing where no GPU is present.
    """
    if isinstance(spec, Target):
        return _checked(spec, str(spec))
    config = _parse_text(spec) if isinstance(spec, str) else dict(spec)
    if isinstance(config, Target):
        return _checked(config, str(spec))
    if config.get("kind") == "llvm" and not set(config) - {"kind", "num-cores"}:
        config = {**_config_of(host_target()), **config}
    if config.get("kind") == "llvm":
        config.setdefault("num-cores", host_cores())
    if config.get("kind") == "cuda":
        return _cuda(config, spec)
    _check_cpu_name(config, spec)
    try:
        return Target(config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise TargetError(f"target {spec!r} is not one that TVM knows: {_first_sentence(error)}") from error


def _parse_text(text: str) -> dict[str, Any] | Target:
    """`"kind -key=value ..."` (also `-key value` and `--key=value`), JSON, or a tag of TVM's."""
    text = text.strip()
    if not text:
        raise TargetError("the target is empty; try 'llvm' for this machine or 'llvm -mcpu=x86-64-v3'")
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise TargetError(f"target {text!r} is not valid JSON: {error}") from error
    kind, *rest = shlex.split(text)
    if "/" in kind:
        try:
            return Target(text)
        except (ValueError, RuntimeError) as error:
            raise TargetError(f"target {text!r} is not one of TVM's tags: {_first_sentence(error)}") from error
    config: dict[str, Any] = {"kind": kind}
    words = iter(rest)
    for word in words:
        key, sep, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not key:
            raise TargetError(f"target {text!r}: expected an option such as -mcpu=x86-64-v3, found {word!r}")
        if key in _FLAGS:
            config[key] = _flag(text, key, value)
            continue
        if not sep:
            value = next(words, "")
        if not value:
            raise TargetError(f"target {text!r}: option -{key} needs a value, as in -{key}=...")
        config[key] = _option_value(text, key, value)
    return config


def _flag(text: str, key: str, value: str) -> bool:
    if value.lower() not in ("", "1", "0", "true", "false"):
        raise TargetError(f"target {text!r}: -{key} is a switch, write -{key} or leave it out, got {value!r}")
    return value.lower() not in ("0", "false")


def _option_value(text: str, key: str, value: str) -> Any:
    if key in ("mattr", "keys", "libs"):
        return [part for part in value.split(",") if part]
    if key not in _INT_OPTIONS:
        return value
    if not value.isdigit():
        raise TargetError(f"target {text!r}: option -{key} needs a whole number, got {value!r}")
    return int(value)


def _check_cpu_name(config: Mapping[str, Any], spec: object) -> None:
    """TVM only warns of an unknown CPU and goes on with a generic one; that is an error here."""
    if config.get("kind") != "llvm":
        return
    triple = str(config.get("mtriple") or codegen.llvm_get_system_triple())
    _check_triple(triple, spec)
    mcpu = config.get("mcpu")
    if not mcpu:
        return
    if codegen.llvm_is_valid_cpu(str(mcpu), triple):
        return
    known = [str(name) for name in codegen.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": triple}))]
    close = difflib.get_close_matches(str(mcpu), known, n=4, cutoff=0.5) or known[:4]
    raise TargetError(
        f"target {spec!r}: LLVM knows no CPU {str(mcpu)!r} for {triple}; did you mean {', '.join(close)}?"
    )


def _check_triple(triple: str, spec: object) -> None:
    """A triple of an unknown architecture crashes inside LLVM: refuse it before TVM sees it."""
    arch = triple.split("-")[0].lower()
    known = [str(name) for name in codegen.llvm_get_targets()]
    aliases = ("amd64", "arm64", "i486", "i586", "i686")
    if arch in known or arch in aliases or arch.startswith(("arm", "thumb")):
        return
    close = difflib.get_close_matches(arch, known, n=3, cutoff=0.5) or known[:4]
    raise TargetError(f"target {spec!r}: LLVM knows no architecture {arch!r}; did you mean {', '.join(close)}?")


def _cuda(config: Mapping[str, Any], spec: object) -> Target:
    from .cuda.target import cuda_target

    return cuda_target(config, spec)


def _checked(target: Target, text: str) -> Target:
    if str(target.kind) == "cuda":
        host = {} if target.host is None else {"host": target.host}
        return _cuda({"kind": "cuda", **{str(k): v for k, v in target.attrs.items()}, **host}, text)
    _check_cpu_name({"kind": str(target.kind), **{str(k): v for k, v in target.attrs.items()}}, text)
    return target


def _config_of(target: Target) -> dict[str, Any]:
    keep = ("mcpu", "mtriple", "mattr", "num-cores")
    config = {key: target.attrs[key] for key in keep if key in target.attrs}
    if "mattr" in config:
        config["mattr"] = [str(item) for item in config["mattr"]]
    return {"kind": str(target.kind), **config}


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[-1].split(". ")[0][:200]

"""The machine that a bundle runs on: what it is, and whether it can run the code."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any, NoReturn


def fail(text: str) -> NoReturn:
    """End with exit code 2 and a sentence."""
    print("error: " + text, file=sys.stderr)
    raise SystemExit(2)


def cpuinfo() -> tuple[dict[str, str], set[str] | None]:
    """The fields of /proc/cpuinfo, and the features that all cores have, or None where they are not published."""
    fields, flags = {}, None
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
        if key.strip() in ("flags", "Features"):
            flags = set(value.split()) if flags is None else flags & set(value.split())
    return fields, flags


def cpu_model(fields: dict[str, str]) -> str:
    """The CPU's name, as gemmify writes it into its logs."""
    family = ""
    if "cpu family" in fields and "model" in fields:
        family = " (family {}, model {})".format(fields["cpu family"], fields["model"])
    if "model name" in fields:
        return fields["model name"] + family
    return platform.processor() or platform.machine()


def core_of(cpu: int) -> Any:
    """What the hardware threads of one core share."""
    folder = f"/sys/devices/system/cpu/cpu{cpu}/topology/"
    try:
        with open(folder + "physical_package_id") as package, open(folder + "core_id") as core:
            return package.read().strip(), core.read().strip()
    except OSError:
        return cpu


def physical_cores() -> int:
    """Physical cores that this process may use, within the control group's limit."""
    cores = max(1, len({core_of(cpu) for cpu in os.sched_getaffinity(0)}))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()[:2]
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def check_machine(bundle: Any) -> dict[str, Any]:
    """Refuse a machine that cannot run the code: an illegal instruction would end every candidate."""
    names = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}
    arch = names.get(platform.machine().lower(), platform.machine().lower())
    if arch != bundle["arch"]:
        fail(
            "this bundle holds code for {}, this machine is {}; make one with --target for it".format(
                bundle["arch"], arch
            )
        )
    fields, flags = cpuinfo()
    missing = [] if flags is None else [name for name in bundle["needs"] if name not in flags]
    if missing:
        wants = "this bundle needs CPU features that this machine lacks: " + ", ".join(missing)
        fail(wants + '; make one with --target for this CPU, e.g. "llvm -mcpu=x86-64-v3"')
    if len(os.sched_getaffinity(0)) < bundle["threads"]:
        has = len(os.sched_getaffinity(0))
        fail(f"this bundle runs {bundle['threads']} threads, this process may use {has} CPUs")
    return {**bundle["machine"], "cpu": cpu_model(fields), "cores": physical_cores()}


def load_runtime(bundle: Any) -> Any:
    """TVM's runtime without its compiler, of a version that the code can be used with."""
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    wanted = "pip install apache-tvm=={} apache-tvm-ffi=={}".format(bundle["tvm"], bundle["tvm_ffi"])
    try:
        import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy; TVM needs it too)
        import tvm
        import tvm_ffi
    except ImportError as err:
        fail(f"TVM's runtime cannot be imported ({err}); {wanted}")
    for name, made, here in (
        ("apache-tvm", bundle["tvm"], str(tvm.__version__)),
        ("apache-tvm-ffi", bundle["tvm_ffi"], str(tvm_ffi.__version__)),
    ):
        if made.split(".")[:2] != here.split(".")[:2]:
            fail(f"the bundle was made with {name} {made}, here is {here}; {wanted}")
    return tvm

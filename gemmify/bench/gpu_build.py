"""The GPU suite's layers as libraries: many entries in one, so that nvcc reads its headers once for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tvm

from gemmify.accuracy import expected_error
from gemmify.bench.gpu_problems import Wanted, described
from gemmify.bench.suites import compulsory_bytes
from gemmify.kernels import LayerKernels, layer_kernels, multiplied_in, on_machine, operand_shape, too_large
from gemmify.pipeline_build import TIR_PIPELINE
from lowering import catalogue
from lowering.base import operand_shapes, output_shape
from schedules import Gpu, parse_target
from schedules.cuda.device import with_tf32

ENTRIES = 8
"""Entries in a library."""
SLACK = 4.0
"""An output is wrong where its error exceeds this many times what is expected; a misplaced element does by far."""
Entry = dict[str, Any]
Report = Callable[[str], None]


@dataclass
class Built:
    """What became of the entries: those that are in a library, and (id, why) of those that are not."""

    entries: list[Entry] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)


def build_all(
    wanted: Sequence[Wanted],
    target: str,
    folder: Path,
    progress: Report = lambda line: None,
    workers: int | None = None,
) -> Built:
    """Build every entry for `target` into `folder`/libraries; one that fails is recorded, the others go on.

    The entries come back in the order of `wanted`. `workers` processes build at once (default: one a CPU; 0: none but
    this one).
    """
    (folder / "libraries").mkdir(exist_ok=True)
    groups = [list(wanted[i : i + ENTRIES]) for i in range(0, len(wanted), ENTRIES)]
    if workers == 0:
        units = [build_unit(group, target, str(folder), f"{number}") for number, group in enumerate(groups)]
        return Built([e for unit in units for e in unit.entries], [f for unit in units for f in unit.failures])
    count = max(1, min(len(groups), workers or len(os.sched_getaffinity(0))))
    done = Built()
    pending: dict[Future[Built], list[Wanted]] = {}
    pool = _pool(count)
    try:
        left = [(number, group) for number, group in enumerate(groups)]
        while left or pending:
            while left and len(pending) < 2 * count:
                number, group = left.pop(0)
                pending[pool.submit(build_unit, group, target, str(folder), f"{number}")] = group
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            broken = False
            for future in finished:
                broken |= _collect(future, pending.pop(future), done)
            if broken:  # one process died and took the pool along: what was under way cannot be told apart
                for future in list(pending):
                    _collect(future, pending.pop(future), done)
                pool = _pool(count)
            built = len(done.entries) + len(done.failures)
            progress(f"{built} of {len(wanted)} layers built, {len(done.failures)} failed")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    order = {item.id: number for number, item in enumerate(wanted)}
    done.entries.sort(key=lambda entry: order[entry["id"]])
    return done


def _pool(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def _collect(future: Future[Built], group: Sequence[Wanted], done: Built) -> bool:
    """Add what a future found; whether its process died."""
    try:
        found = future.result()
    except BrokenProcessPool:
        done.failures += [(item.id, "the process that built it died, or one beside it") for item in group]
        return True
    except Exception as err:
        done.failures += [(item.id, _said(err)) for item in group]
        return False
    done.entries += found.entries
    done.failures += found.failures
    return False


def build_unit(group: Sequence[Wanted], target: str, folder: str, name: str) -> Built:
    """Build the entries of `group` into one library; where that fails, each into one of its own."""
    done, made = Built(), list[tuple[Wanted, Entry, dict[str, Any]]]()
    for number, item in enumerate(group):
        try:
            made.append((item, *entry_of(item, target, f"e{number}")))
        except Exception as err:  # whatever one lowering does, the others are still to be built
            done.failures.append((item.id, _said(err)))
    try:
        _link(made, target, Path(folder), f"libraries/{name}.so")
        done.entries += [entry for _, entry, _ in made]
    except Exception:
        for number, one in enumerate(made):
            try:
                _link([one], target, Path(folder), f"libraries/{name}_{number}.so")
                done.entries.append(one[1])
            except Exception as err:
                done.failures.append((one[0].id, _said(err)))
    return done


def _link(made: Sequence[tuple[Wanted, Entry, dict[str, Any]]], target: str, folder: Path, library: str) -> None:
    if not made:
        return
    funcs = {name: func for _, _, group in made for name, func in group.items()}
    compile_library(funcs, target, folder / library)
    for _, entry, _ in made:
        entry["library"] = library


def compile_library(funcs: dict[str, Any], target: str, path: Path) -> None:
    """Write scheduled functions as the shared library `path`; each can be called by its name."""
    from gemmify.export import write_library

    resolved = parse_target(target)
    mod = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in funcs.items()})
    with resolved:
        executable = tvm.compile(mod, target=resolved, tir_pipeline=TIR_PIPELINE)
    write_library(executable, resolved, path)


def entry_of(item: Wanted, target: str, prefix: str) -> tuple[Entry, dict[str, Any]]:
    """How the runner runs a layer, and its functions by the names that they have in the library.

    Raises ValueError where the lowering does not apply, and whatever building it raises.
    """
    machine = with_tf32(Gpu.from_target(parse_target(target)), item.precision == "tf32")
    lowering, problem = catalogue()[item.lowering], on_machine(item.problem, machine)
    reason = lowering.applicable(problem)
    if reason is not None:
        raise ValueError(f"{item.lowering} does not apply: {reason}")
    kernels = layer_kernels(lowering, problem, machine, item.epilogue)
    if (reason := too_large(lowering, problem, kernels.cost)) is not None:
        raise ValueError(f"{item.lowering} does not apply: {reason}")
    growth = expected_error(kernels.cost, problem.dtype, multiplied_in(lowering, problem.dtype, machine))
    entry: Entry = {
        "id": item.id,
        "section": item.section,
        "name": item.name,
        "lowering": item.lowering,
        "variant": item.variant,
        "precision": item.precision,
        "batch": item.batch,
        "problem": described(item.problem),
        "macs": item.problem.macs,
        "bytes": compulsory_bytes(item.problem),
        "limit": SLACK * growth,
        "layout": lowering.layout if "size" in described(item.problem) else "NHWC",
    }
    steps, functions = call_steps(kernels, item, prefix)
    return entry | steps, functions


def call_steps(kernels: LayerKernels, item: Wanted, prefix: str) -> tuple[Entry, dict[str, Any]]:
    """The tensors of a layer, the calls that are made once and those of a run, and the functions that they call."""
    lowering, problem, dtype = kernels.lowering, kernels.problem, item.problem.dtype
    tensors: dict[str, Any] = {n: [list(s), dtype] for n, s in operand_shapes(problem, lowering.layout).items()}
    operands = {op.operand: op for op in item.epilogue if op.operand is not None}
    names = [operands[i].kind for i in sorted(operands)]
    for op in operands.values():
        tensors[op.kind] = [list(operand_shape(op, problem, lowering.layout)), dtype]
    functions: dict[str, Any] = {}
    once: list[Entry] = []
    calls: list[Entry] = []
    workspace = 0
    for number, kernel in enumerate(kernels.kernels):
        symbol, scratch = f"{prefix}_k{number}", []
        functions[symbol] = kernel.func
        for i, (shape, kind) in enumerate(kernel.scratch):
            scratch.append(f"{kernel.name} scratch {i}")
            tensors[scratch[-1]] = [list(shape), kind]
        tensors[kernel.name] = [list(kernel.shape), kernel.dtype]
        arguments = [*kernel.reads, *(names if kernel.kind == "output" else ()), *scratch, kernel.name]
        writes = list(range(len(arguments) - 1 - len(scratch), len(arguments)))
        call = {"symbol": symbol, "arguments": arguments, "writes": writes}
        (once if kernel.kind == "weight" else calls).append(call)
        workspace += kernel.scratch_bytes + (kernel.bytes if kernel.kind == "workspace" else 0)
    activations = ["data", *(op.kind for op in operands.values() if op.kind in ("add", "mul"))]
    steps = {
        "tensors": tensors,
        "once": once,
        "calls": calls,
        "output": kernels.kernels[-1].name,
        "output_shape": list(output_shape(problem, lowering.layout)),
        "activations": activations,
        "epilogue": [[op.kind, op.kind if op.operand is not None else None, list(op.params)] for op in item.epilogue],
        "workspace_bytes": workspace,
    }
    assert all(prod(shape) for shape, _ in tensors.values()), f"an empty tensor in {item.id}"
    return steps, functions


def _said(err: BaseException) -> str:
    return f"{type(err).__name__}: {' '.join(str(err).split())[:400]}"

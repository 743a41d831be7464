"""The whole compilation, top to bottom: model -> Relax -> layers as GEMMs -> scheduled kernels -> executable."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, s_tir, tirx

import lowering.graph
from lowering.graph.epilogue import LayerSite
from schedules import TargetError, machine_of, parse_target, schedule_module

from .cuda.build import compile_imports, cuda_text
from .cuda.resources import KernelResources
from .cuda.toolchain import check_toolchain
from .errors import GemmifyError, InputError
from .export import check_destination
from .frontend import ImportedModel, import_model
from .layer import LayerKernel, compile_layer
from .loading import check_graph
from .lower import LoweredLayer, choose_layers, kernels_of, lower_layers
from .manifest import Manifest, target_archs
from .memory import MemoryPlan
from .pipeline_build import build_executable
from .plan import Plan
from .scratch import allocate_scratch
from .select import Choice, Policy, make_policy
from .threads import default_threads, require_one_thread
from .tuning.choice import Chooser, log_hash
from .tuning.use import open_logs

__all__ = ["Compilation", "LayerKernel", "compile_layer", "compile_model"]

Progress = Callable[[str, float], None]
_OPAQUE = 8  # relax.OpPatternKind.kOpaque: our kernels are finished, FuseOps must leave them alone


@dataclass
class Compilation:
    """The executable of the Relax VM and all that is known of it; `resources` of the kernels where they are a GPU's."""

    executable: Any
    manifest: Manifest
    layers: list[LoweredLayer]
    memory: MemoryPlan
    resources: tuple[KernelResources, ...] = ()


@dataclass(frozen=True)
class Planned:
    """What `compile_model` would do with a model, layer by layer, with nothing compiled."""

    model: str
    plan: Plan
    layers: list[dict[str, Any]]
    tuning: dict[str, Any]


def plan_model(
    model: Any,
    *,
    target: Any = "llvm",
    lowering: Any = "auto",
    strict: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    plan: Plan | str | PathLike[str] | None = None,
    threads: int | None = None,
    max_workspace: int | str | None = None,
    max_error: float | str | None = None,
    logs: Any = None,
    frozen: bool = False,
) -> Planned:
    """Choose the lowering of every layer of `model` as `compile_model` does with the same arguments; same errors."""
    resolved = resolve_target(target)
    count = threads_for(resolved, threads)
    policy = user_policy(lowering, strict, max_workspace, max_error, plan)
    chooser = Chooser(machine_of(resolved), policy, open_logs(resolved, count, logs), frozen)
    name, chosen = chosen_layers(model, shapes, chooser, dtype)
    choices = {site.name: choice for site, choice in chosen}
    layers = [_describe(site, choice, count) for site, choice in chosen]
    if resolved.kind.name == "cuda":  # as in `describe`: of the kernels
        made = [kernels_of(site, choice, chooser) for site, choice in chosen]
        layers = [{**layer, "workspace_bytes": k.cost.scratch(count)} for layer, k in zip(layers, made, strict=True)]
    return Planned(name, Plan.of(choices), layers, chooser.coverage(choices))


def chosen_layers(
    model: Any, shapes: Mapping[str, Sequence[int]] | None, chooser: Chooser, dtype: str | None = None
) -> tuple[str, list[tuple[LayerSite, Choice]]]:
    """The model's name, and what `chooser` takes for each of its layers, in the order in which they run."""
    imported = import_model(model, shapes, dtype)
    return imported.name, list(choose_layers(lowering_graph(imported.mod), chooser).values())


def resolve_target(target: Any) -> tvm.target.Target:
    """The checked TVM target of what the user gave; InputError for one that cannot be compiled for."""
    if not isinstance(target, str | Mapping | tvm.target.Target):
        raise InputError(f'the target must be text such as "llvm", a dict or a tvm Target, got {target!r}')
    try:
        parsed = parse_target(target)
    except TargetError as err:
        raise InputError(str(err)) from err
    if parsed.kind.name not in ("llvm", "cuda"):
        raise InputError(f"target {parsed.kind.name} is not supported; use llvm, or cuda -arch=sm_XX")
    return parsed


def threads_for(target: tvm.target.Target, threads: int | None) -> int:
    """How many CPU threads code for `target` is made for: `threads`, by default this machine's; 1, which launches the
    kernels, for a GPU. InputError where more were asked for."""
    if target.kind.name != "cuda":
        return threads or default_threads()
    require_one_thread(threads)
    return 1


def compile_model(
    model: Any,
    *,
    target: Any = "llvm",
    lowering: Any = "auto",
    strict: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    plan: Plan | str | PathLike[str] | None = None,
    threads: int | None = None,
    max_workspace: int | str | None = None,
    max_error: float | str | None = None,
    logs: Any = None,
    frozen: bool = False,
    cuda_graph: bool = False,
    progress: Progress | None = None,
    dump_dir: str | PathLike[str] | None = None,
) -> Compilation:
    """Compile `model` for `target`; see `gemmify.compile` for the arguments and the errors."""
    resolved = resolve_target(target)
    on_gpu = resolved.kind.name == "cuda"
    check_graph(cuda_graph, on_gpu)
    if on_gpu:
        check_toolchain(target_archs(resolved))  # before minutes of work, not after
    threads, machine = threads_for(resolved, threads), machine_of(resolved)
    policy = user_policy(lowering, strict, max_workspace, max_error, plan)
    chooser = Chooser(machine, policy, open_logs(resolved, threads, logs), frozen)
    stages = _Stages(progress, dump_dir)

    with stages("import"):
        imported = import_model(model, shapes, dtype)
    mod = stages.dump("imported", imported.mod)
    with stages("canonicalize"):
        mod = lowering_graph(mod)
    stages.dump("canonical", mod)
    with stages("lower"):
        mod, layers = lower_layers(mod, chooser)
    stages.dump("lowered", mod)
    with stages("fuse"):
        mod = fuse_rest(mod, resolved)
    with stages("schedule"):
        mod = allocate_scratch(schedule_module(mod, machine))
    stages.dump("scheduled", mod)
    with stages("build"):
        executable, memory = build_executable(mod, resolved, threads)
    resources: tuple[KernelResources, ...] = ()
    if on_gpu:
        stages.dump_text("kernels.cu", cuda_text(executable.mod))
        with stages("nvcc"):
            resources = compile_imports(executable.mod, target_archs(resolved))
    tuning = chooser.coverage({layer.site.name: layer.choice for layer in layers})
    manifest = _manifest(imported, resolved, layers, memory, threads, tuning)
    return Compilation(executable, replace(manifest, cuda_graph=cuda_graph), layers, memory, resources)


def lowering_graph(mod: tvm.IRModule) -> tvm.IRModule:
    """Batch norms folded, layout chosen, epilogues gathered behind their layers: same numbers."""
    return lowering.graph.normalize(mod)


def fuse_rest(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Everything that is not a lowered layer: legalised to tensor expressions, neighbours fused into one kernel."""
    for gvar, func in list(mod.functions_items()):
        if isinstance(func, tirx.PrimFunc):
            mod.update_func(gvar, func.with_attr("op_pattern", _OPAQUE))
    t = relax.transform
    with target:
        return tvm.transform.Sequential(
            [
                t.InlinePrivateFunctions(),
                t.LegalizeOps(),
                t.AnnotateTIROpPattern(),
                t.FoldConstant(),
                t.FuseOps(fuse_opt_level=2),
                t.FuseTIR(),
                _reshapes_are_views,
                t.DeadCodeElimination(),
            ]
        )(mod)


@tvm.transform.module_pass(opt_level=0, name="ReshapesAreViews")
def _reshapes_are_views(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """A reshape that is a kernel of its own moves nothing. Scheduled, it would not be recognised any more.

    TVM's pass takes every function for one that is a root block: those of a GPU, which are not, look empty to it.
    """
    nothing = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", tirx.Evaluate(0)))
    found = [(gv, f) for gv, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)]
    hidden = [(gv, f) for gv, f in found if not isinstance(f.body, s_tir.SBlockRealize)]
    mod = mod.clone()
    for gvar, func in hidden:
        mod.update_func(gvar, func.with_body(nothing))
    mod = relax.transform.RewriteDataflowReshape()(mod)
    for gvar, func in hidden:
        mod.update_func(gvar, func)
    return mod


def user_policy(
    lowering_arg: Any, strict: bool, max_workspace: int | str | None, max_error: float | str | None, plan: Any
) -> Policy:
    """The policy that the arguments of `compile_model` make; InputError where they contradict or make no sense."""
    if plan is None:
        return make_policy(lowering_arg, strict, max_workspace, max_error)
    if lowering_arg != "auto":
        raise InputError("both a plan and a lowering were given; a plan already names the lowering of each layer")
    if isinstance(plan, Plan):
        policy = make_policy(plan.layers, strict, max_workspace, max_error)
        return replace(policy, held=True, points=plan.points)
    found = Plan.load(Path(plan))
    try:
        policy = make_policy(found.layers, strict, max_workspace, max_error)
    except InputError as err:
        raise InputError(f"the plan {plan}: {err}") from err
    return replace(policy, origin=f"the plan {plan}", held=True, points=found.points)


class _Stages:
    """Times each stage, tells the caller, and writes the module after it where a dump was asked for."""

    def __init__(self, progress: Progress | None, dump_dir: str | PathLike[str] | None) -> None:
        self.progress, self.count = progress, 0
        self.dump_dir = Path(dump_dir) if dump_dir is not None else None
        if self.dump_dir is not None:
            try:
                self.dump_dir.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                raise InputError(f"cannot dump into {self.dump_dir}: {err.strerror or err}; give a folder") from err
            check_destination(self.dump_dir / "x")

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.progress is not None:
            self.progress(name, time.perf_counter() - start)

    def dump(self, name: str, mod: tvm.IRModule) -> tvm.IRModule:
        if self.dump_dir is not None:
            self.dump_text(f"{name}.py", mod.script(show_meta=False))
        return mod

    def dump_text(self, name: str, text: str) -> None:
        if self.dump_dir is None:
            return
        self.count += 1
        try:
            (self.dump_dir / f"{self.count}_{name}").write_text(text)
        except OSError as err:
            said = err.strerror or err
            raise GemmifyError(f"cannot dump into {self.dump_dir}: {said}; free space or drop the dump") from err


def _manifest(
    imported: ImportedModel,
    target: tvm.target.Target,
    layers: list[LoweredLayer],
    memory: MemoryPlan,
    threads: int,
    tuning: dict[str, Any],
) -> Manifest:
    return Manifest.create(
        target,
        model=imported.name,
        inputs=imported.inputs,
        outputs=imported.outputs,
        layers=[describe(layer, threads) for layer in layers],
        memory={
            "weights": memory.weight_bytes,
            "arena": memory.arena_bytes,
            "workspace": memory.workspace_peak,
            "outputs": memory.output_bytes,
            "kernels": max(memory.kernel_workspace.values(), default=0),
        },
        plan=Plan.of({layer.site.name: layer.choice for layer in layers}).to_dict(),
        log_hash=log_hash(layer.choice for layer in layers),
        tuning=tuning,
        threads=threads,
    )


def describe(layer: LoweredLayer, threads: int) -> dict[str, Any]:
    """What `m.layers` says of one layer that `threads` threads work on."""
    described = _describe(layer.site, layer.choice, threads)
    # Of the kernels as they are: the formula does not know what a GPU's need between their launches.
    return {**described, "workspace_bytes": layer.kernels.cost.scratch(threads), "kernels": layer.functions}


def _describe(site: LayerSite, choice: Choice, threads: int) -> dict[str, Any]:
    problem, cost = site.problem, choice.cost
    gemm = cost.gemms[0]
    return {
        "name": site.name,
        "op": problem.op,
        "problem": asdict(problem),
        "lowering": choice.lowering.key,
        "reason": choice.why,
        "gemm": [gemm.m, gemm.n, gemm.k],
        "count": gemm.count,
        "tile": [choice.tile.mr, choice.tile.nr],
        "sizes": dict(choice.lowering.sizes),
        "schedule": dict(choice.schedule),
        "tuned": choice.tuning,
        "macs": problem.macs,
        "workspace_bytes": cost.scratch(threads),
        "weight_bytes": cost.weight_bytes,
        "epilogue": [op.kind for op in site.epilogue],
    }

"""Layer functions -> kernels: each call of a `gemmify.layer` function becomes the `call_tir`s of its lowering.

Weights are transformed here, once, and stay as constants. Activations stay channels last; a lowering that works
channels first gets explicit conversions around it.
"""

from __future__ import annotations

import difflib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import tvm
from tvm import relax, te

from lowering import ConvProblem, Lowering
from lowering.base import activation_shape, output_shape
from lowering.graph._rewrite import Emitter, Graph, substitute
from lowering.graph.epilogue import LayerSite, describe_layer
from lowering.graph.gather_epilogues import LAYER_ATTR
from schedules import Gpu

from .dtypes import require_dtype
from .errors import InputError
from .fold import evaluate
from .kernels import Kernel, LayerKernels, ScheduleKnobs, layer_kernels
from .scratch import call_kernel
from .select import Choice, Policy
from .tuning.choice import Chooser
from .tuning.point import knobs
from .tuning.task import Task


@dataclass
class LoweredLayer:
    """One layer of the result: where it stood, what it was given, and the kernels that it calls, in order."""

    site: LayerSite
    choice: Choice
    kernels: LayerKernels
    functions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    site: LayerSite
    choice: Choice
    kernels: LayerKernels


def lower_layers(mod: tvm.IRModule, chooser: Chooser) -> tuple[tvm.IRModule, list[LoweredLayer]]:
    """Replace every layer function that a lowering can express; the others stay Relax. Raises InputError (strict keys,
    layer names of the policy that the model does not have, layers that a frozen chooser finds no record of)."""
    plans = _plan_layers(mod, chooser)
    packed = _pack_weights(plans)
    rewriter = _Rewriter(mod, plans, packed)
    return rewriter.run(), rewriter.layers


def layer_functions(mod: tvm.IRModule) -> dict[str, relax.Function]:
    """The functions of layers by name, in the order in which `main` calls them."""
    found = {
        gv.name_hint: func
        for gv, func in mod.functions_items()
        if isinstance(func, relax.Function) and func.attrs is not None and LAYER_ATTR in func.attrs
    }
    values = [binding.value for block in mod["main"].body.blocks for binding in block.bindings]
    called = [str(getattr(v.op, "name_hint", "")) for v in values if isinstance(v, relax.Call)]
    order = [name for name in dict.fromkeys(called) if name in found]
    return {name: found[name] for name in [*order, *sorted(set(found) - set(order))]}


def choose_layers(mod: tvm.IRModule, chooser: Chooser) -> dict[str, tuple[LayerSite, Choice]]:
    """The site and the chosen lowering of every layer function that a lowering can express, by function name.

    Compiles nothing (a point of a log or a plan is built as TIR, to see that it can be). Raises InputError for a strict
    key that does not apply, for a layer name of the policy that the model does not have, and for layers that a frozen
    chooser finds no record of; UnsupportedError for a layer in a dtype that is not compiled for the machine.
    """
    chosen: dict[str, tuple[LayerSite, Choice]] = {}
    for name, site in layer_sites(mod, chooser.policy).items():
        require_dtype(f"layer {site.name}", site.problem.dtype, chooser.machine)
        choice = chooser.choose(site.name, Task(site.problem, site.epilogue))
        chosen[name] = (site, within_bound(site, choice, chooser))
    chooser.settle({site.name: choice for site, choice in chosen.values()})
    return chosen


def within_bound(site: LayerSite, choice: Choice, chooser: Chooser) -> Choice:
    """`choice`; on a GPU its reductions are not split where their partial sums, which no formula knows, are above the
    policy's bound."""
    bound = chooser.policy.max_workspace
    if bound is None or not isinstance(chooser.machine, Gpu):
        return choice
    if kernels_of(site, choice, chooser).cost.scratch(1) <= bound:
        return choice
    schedule = knobs(dict(choice.schedule) | {"split_k": 1})
    whole = replace(choice, schedule=cast(ScheduleKnobs, schedule))
    whole = replace(whole, point=whole.as_point(), why=f"{choice.why}; not split, its sums are above the bound")
    if (scratch := kernels_of(site, whole, chooser).cost.scratch(1)) > bound:
        raise InputError(
            f"layer {site.name}: the kernels of {choice.lowering.key} need {scratch} bytes between their launches, the "
            f"workspace bound is {bound}; raise it, or choose another lowering for this layer"
        )
    return whole


def layer_sites(mod: tvm.IRModule, policy: Policy) -> dict[str, LayerSite]:
    """The site of every layer function that a lowering can express, by function name. Raises InputError for a layer
    name of the policy that the model does not have."""
    described = {name: describe_layer(func) for name, func in layer_functions(mod).items()}
    sites = {name: site for name, site in described.items() if site is not None}
    known = [site.name for site in sites.values()]
    for asked in policy.layers or {}:
        if asked not in known:
            raise unknown_layer(asked, known, policy.origin)
    return sites


def unknown_layer(asked: str, known: list[str], origin: str | None = None) -> InputError:
    """The error of a layer name that the model does not have: it says which names there are, or which are close, and
    the file `origin` that the name comes from."""
    where = "" if origin is None else f"{origin}: "
    return InputError(f"{where}no layer is named {asked!r}; {_known_layers(asked, known)}")


def _known_layers(asked: str, known: list[str]) -> str:
    if len(known) <= 12:
        return f"the layers are {', '.join(known) or 'none'}"
    close = difflib.get_close_matches(asked, known, n=3, cutoff=0.3) or known[:3]
    return f"close ones of the {len(known)} layers are {', '.join(close)} (`gemmify inspect` lists all)"


def _plan_layers(mod: tvm.IRModule, chooser: Chooser) -> dict[str, _Plan]:
    return {
        name: _Plan(site, choice, kernels_of(site, choice, chooser))
        for name, (site, choice) in choose_layers(mod, chooser).items()
    }


def kernels_of(site: LayerSite, choice: Choice, chooser: Chooser) -> LayerKernels:
    """The kernels that `choice` makes of `site`."""
    return layer_kernels(choice.lowering, site.problem, chooser.machine, site.epilogue, choice.tile, choice.schedule)


def _pack_weights(plans: dict[str, _Plan]) -> dict[str, dict[str, np.ndarray]]:
    """The weight stages whose weight is known now, folded; by layer function, the constants by stage name.

    Layers fold side by side: numpy leaves the interpreter's lock while it copies.
    """
    with ThreadPoolExecutor() as pool:
        return dict(zip(plans, pool.map(_pack_layer, plans.values()), strict=True))


def _pack_layer(plan: _Plan) -> dict[str, np.ndarray]:
    # A table of offsets reads nothing: it is known even where the weight is not.
    arrays = {"weight": plan.site.weight} if isinstance(plan.site.weight, np.ndarray) else {}
    for stage in plan.choice.lowering.stages(plan.kernels.problem, plan.choice.tile):
        if stage.kind == "weight" and all(r in arrays for r in stage.reads):
            inputs = [te.placeholder(arrays[r].shape, str(arrays[r].dtype), name=r) for r in stage.reads]
            known = {t: arrays[r] for t, r in zip(inputs, stage.reads, strict=True)}
            arrays[stage.name] = evaluate(stage.compute(*inputs), known)
    return {name: array for name, array in arrays.items() if name != "weight"}


class _Rewriter:
    """Walks `main` and emits each layer's kernels in place of the call of its function."""

    def __init__(self, mod: tvm.IRModule, plans: dict[str, _Plan], packed: dict[str, dict[str, Any]]) -> None:
        self.mod, self.plans, self.packed = mod, plans, packed
        self.layers: list[LoweredLayer] = []
        self.constants: dict[tuple[str, str], relax.Constant] = {}
        self.globals: dict[int, Any] = {}
        kept = {gv: f for gv, f in mod.functions_items() if gv.name_hint != "main" and gv.name_hint not in plans}
        self.functions = relax.BlockBuilder(tvm.IRModule(kept, attrs=mod.attrs))

    def run(self) -> tvm.IRModule:
        # Not a PyExprMutator: TVM never frees one, and with it the module and every weight.
        graph, out = Graph(self.mod["main"]), Emitter()
        for var, value in graph.bindings:
            callee = value.op if isinstance(value, relax.Call) else None
            name = callee.name_hint if isinstance(callee, tvm.ir.GlobalVar) else None
            if name in self.plans:
                out.env[var] = self.emit(out, name, [substitute(arg, out.lookup) for arg in value.args])
            else:
                out.env[var] = out.default(var, value)
        mod = self.functions.get()
        mod["main"] = out.finish(graph, [substitute(o, out.lookup) for o in graph.outputs])
        return relax.transform.Normalize()(mod)

    def emit(self, bb: Emitter, name: str, args: list[relax.Expr]) -> relax.Expr:
        """Emit the kernels of layer function `name` called with `args`; returns its output, channels last."""
        plan = self.plans[name]
        site, lowering = plan.site, plan.choice.lowering
        layer = LoweredLayer(site, plan.choice, plan.kernels)
        tensors: dict[str, relax.Expr] = {"data": self._data(bb, args[site.data], site, lowering)}
        if not isinstance(site.weight, np.ndarray):
            tensors["weight"] = args[site.weight]
        for stage, value in self.packed.get(name, {}).items():
            tensors[stage] = self._shared_constant(name, stage, value)
        operands = [self._operand(bb, o, args, site, lowering) for o in site.operands]
        for kernel in plan.kernels.kernels:
            if kernel.name in tensors:
                continue
            gvar = self._global(kernel, lowering)
            inputs = [tensors[r] for r in kernel.reads] + (operands if kernel.kind == "output" else [])
            hint = site.name if kernel.kind == "output" else f"{site.name}_{kernel.name}"
            call, last = call_kernel(kernel.func, gvar, inputs, [relax.TensorType(kernel.shape, kernel.dtype)])
            if last >= 0:
                call = relax.TupleGetItem(bb.emit(call, f"{hint}_all"), last)
            tensors[kernel.name] = bb.emit(call, hint)
            layer.functions.append(gvar.name_hint)
        self.layers.append(layer)
        return self._restore(bb, tensors[plan.kernels.kernels[-1].name], plan)

    def _global(self, kernel: Kernel, lowering: Lowering) -> Any:
        if id(kernel.func) not in self.globals:
            hint = f"{lowering.key}_{kernel.name}".replace("-", "_")
            gvar = self.functions.add_func(kernel.func.without_attr("global_symbol"), hint)
            self.globals[id(kernel.func)] = gvar
        return self.globals[id(kernel.func)]

    def _shared_constant(self, name: str, stage: str, value: Any) -> relax.Constant:
        key = (name, stage)
        if key not in self.constants:
            self.constants[key] = relax.const(value, str(value.dtype))  # without a dtype float64 is narrowed
        return self.constants[key]

    def _data(self, bb: Emitter, value: relax.Expr, site: LayerSite, lowering: Lowering) -> relax.Expr:
        """The layer's input as the lowering reads it: a matrix where a product has several axes of rows."""
        shape = activation_shape(site.problem)
        if tuple(int(s) for s in value.ty.shape) != shape:
            value = bb.emit(relax.op.reshape(value, shape))
        return self._convert(bb, value, site, lowering)

    def _convert(self, bb: Emitter, value: relax.Expr, site: LayerSite, lowering: Lowering) -> relax.Expr:
        """A channels-last activation in the layout that the lowering reads."""
        if lowering.layout == "NHWC" or not isinstance(site.problem, ConvProblem):
            return value
        rank = site.problem.dims + 2
        return bb.emit(relax.op.permute_dims(value, [0, rank - 1, *range(1, rank - 1)]))

    def _operand(
        self, bb: Emitter, operand: Any, args: list[relax.Expr], site: LayerSite, lowering: Lowering
    ) -> relax.Expr:
        if isinstance(operand, np.ndarray):
            return relax.const(operand, str(operand.dtype))
        value = args[operand]
        shape = output_shape(site.problem)
        if tuple(int(s) for s in value.ty.shape) != shape:
            value = bb.emit(relax.op.reshape(value, shape))
        return self._convert(bb, value, site, lowering)

    def _restore(self, bb: Emitter, value: relax.Expr, plan: _Plan) -> relax.Expr:
        """The output kernel's tensor in the layer's own shape, channels last."""
        site, lowering = plan.site, plan.choice.lowering
        shape = output_shape(site.problem, lowering.layout)
        if plan.kernels.kernels[-1].shape != shape:
            value = bb.emit(relax.op.reshape(value, shape))
        if lowering.layout == "NCHW" and isinstance(site.problem, ConvProblem):
            rank = len(shape)
            value = bb.emit(relax.op.permute_dims(value, [0, *range(2, rank), 1]))
        if output_shape(site.problem) != tuple(site.out_shape):
            value = bb.emit(relax.op.reshape(value, site.out_shape))
        return value

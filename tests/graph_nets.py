"""Small Relax networks for the tests of the graph passes, and what those tests measure."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "2")

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

from lowering.graph import describe_layer, normalize
from lowering.graph._rewrite import Graph, op_name

nn = op.nn
Body = Callable[..., Any]


class Net:
    """Builds `main` one named operator at a time, with seeded constants."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def const(self, *shape: int, low: float = -1.0) -> Any:
        return relax.const(self.rng.uniform(low, 1.0, shape).astype("float32"))

    def __call__(self, body: Body, *shapes: Sequence[int]) -> tvm.IRModule:
        bb = relax.BlockBuilder()
        params = [relax.Var(f"x{i}", relax.TensorType(tuple(s), "float32")) for i, s in enumerate(shapes)]
        with bb.function("main", params):
            with bb.dataflow():
                result = body(bb.emit, *params)
                out = bb.emit_output(relax.Tuple(result) if isinstance(result, list) else result)
            bb.emit_func_output(out)
        return bb.get()

    def conv(self, emit: Any, x: Any, m: int, k: int = 3, name: str = "conv", **attrs: Any) -> Any:
        c = int(x.ty.shape[1]) // attrs.get("groups", 1)
        attrs.setdefault("padding", k // 2)
        return emit(nn.conv2d(x, self.const(m, c, k, k), **attrs), name)

    def batch_norm(self, emit: Any, x: Any, axis: int = 1) -> Any:
        c = int(x.ty.shape[axis])
        stats = [self.const(c), self.const(c), self.const(c), self.const(c, low=0.1)]
        return emit(relax.TupleGetItem(emit(nn.batch_norm(x, *stats, axis=axis, training=False)), 0))

    def dense(self, emit: Any, x: Any, m: int, name: str = "fc") -> Any:
        weight = emit(op.permute_dims(self.const(m, int(x.ty.shape[-1])), [1, 0]))
        return emit(op.add(emit(op.matmul(x, weight), name), self.const(m)))


def run(mod: tvm.IRModule, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [[int(d) for d in p.ty.shape] for p in mod["main"].params]
    vm = relax.VirtualMachine(relax.build(mod, "llvm"), tvm.cpu())
    out = vm["main"](*[tvm.runtime.tensor(rng.standard_normal(s).astype("float32")) for s in shapes])
    return [o.numpy() for o in out] if not hasattr(out, "numpy") else [out.numpy()]


def ops(mod: tvm.IRModule) -> list[str]:
    return [op_name(value) for _, value in Graph(mod["main"]).bindings]


def sites(mod: tvm.IRModule) -> dict[str, Any]:
    found = [describe_layer(f) for gv, f in mod.functions.items() if "gemmify.layer" in (f.attrs or {})]
    return {site.name: site for site in found if site is not None}


def kinds(mod: tvm.IRModule) -> dict[str, tuple[str, ...]]:
    return {name: tuple(step.kind for step in site.epilogue) for name, site in sites(mod).items()}


def same(before: tvm.IRModule, after: tvm.IRModule, tolerance: float = 2e-5) -> None:
    relax.analysis.well_formed(after)
    for want, got in zip(run(before), run(after), strict=True):
        assert want.shape == got.shape
        assert np.abs(want - got).max() <= tolerance * max(1.0, np.abs(want).max())


def check(mod: tvm.IRModule) -> tvm.IRModule:
    """`normalize(mod)`, its numbers compared with those of `mod`."""
    out = normalize(mod)
    same(mod, out)
    return out

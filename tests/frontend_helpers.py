"""Importing and running a model in tests, with TVM's own lowering: independent of everything that gemmify lowers."""

from __future__ import annotations

import os

os.environ.setdefault("TVM_NUM_THREADS", "2")

import numpy as np
import onnx
import tvm
from onnx.reference import ReferenceEvaluator
from tvm import relax

from gemmify.frontend import ImportedModel, import_model
from gemmify.frontend.layers import layer_bindings

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def run(imported: ImportedModel, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run with TVM's own lowering: legalizes every operator, so it also shows that `main` can be."""
    vm = relax.VirtualMachine(tvm.compile(imported.mod, "llvm"), tvm.cpu())
    out = vm["main"](*[tvm.runtime.tensor(inputs[s.name]) for s in imported.inputs])
    return [o.numpy() for o in out] if len(imported.outputs) > 1 else [out.numpy()]


def check(model: onnx.ModelProto, tol: float = 1e-4, **overrides: np.ndarray) -> ImportedModel:
    """Import, run, compare with onnx's reference on the same float32 inputs."""
    imported = import_model(model)
    feeds = {s.name: overrides.get(s.name, normal(*s.shape).astype(s.dtype)) for s in imported.inputs}
    wanted = ReferenceEvaluator(model).run(None, feeds)
    for spec, got, want in zip(imported.outputs, run(imported, feeds), wanted, strict=True):
        assert got.shape == want.shape == spec.shape
        assert str(got.dtype) == str(want.dtype) == spec.dtype
        np.testing.assert_allclose(got, want, rtol=tol, atol=tol)
    return imported


def layer_names(imported: ImportedModel) -> list[str]:
    return [b.var.name for b in layer_bindings(imported.mod["main"])]


def op_names(imported: ImportedModel) -> list[str]:
    return [
        b.value.op.name
        for block in imported.mod["main"].body.blocks
        for b in block.bindings
        if isinstance(getattr(b.value, "op", None), tvm.ir.Op)
    ]

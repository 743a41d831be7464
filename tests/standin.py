"""A small compiled network that needs neither a front end nor a lowering: for tests of the runtime and of exporting.

data [1, 8, 64] -> hidden = relu(data W) [1, 8, 64] (one parallel kernel) -> total = sum over the last axis [1, 8]
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tvm
from tvm import relax, te

from gemmify.host import usable_cpus
from gemmify.manifest import Manifest, TensorSpec
from gemmify.runtime import Model

ROWS, WIDTH = 8, 64
TARGET = {"kind": "llvm"}
THREADS = min(2, usable_cpus())  # more than the CPUs of this process are refused


def weight(width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((width, width)).astype(np.float32)


def reference(x: np.ndarray) -> list[np.ndarray]:
    """The two outputs in float64."""
    hidden = np.maximum(x.astype(np.float64) @ weight(x.shape[-1]).astype(np.float64), 0)
    return [hidden, hidden.sum(axis=-1)]


def module(rows: int = ROWS, width: int = WIDTH) -> tvm.IRModule:
    """The network as a Relax module whose product runs in parallel over the rows."""

    def product(x: te.Tensor, w: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, width), "k")
        return te.compute((1, rows, width), lambda n, i, j: te.sum(x[n, i, k] * w[k, j], axis=k), name="product")

    x = relax.Var("data", relax.TensorType((1, rows, width), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_te(product, x, relax.const(weight(width)), primfunc_name_hint="parallel_product")
            hidden = builder.emit(relax.op.nn.relu(y))
            total = builder.emit(relax.op.sum(hidden, axis=-1))
            out = builder.emit_output(relax.Tuple([hidden, total]))
        builder.emit_func_output(out)
    mod = builder.get()
    schedule = tvm.s_tir.Schedule(mod["parallel_product"])
    schedule.parallel(schedule.get_loops(schedule.get_sblock("product"))[1])
    mod["parallel_product"] = schedule.mod["main"].with_attr("global_symbol", "parallel_product")
    return mod


@functools.lru_cache
def compiled(rows: int = ROWS, width: int = WIDTH, threads: int = THREADS) -> tuple[Any, Manifest]:
    """The executable and its manifest."""
    target = tvm.target.Target(TARGET)
    executable = relax.build(module(rows, width), target)
    manifest = Manifest.create(
        target,
        model="standin",
        inputs=[TensorSpec("data", (1, rows, width), "float32")],
        outputs=[TensorSpec("hidden", (1, rows, width), "float32"), TensorSpec("total", (1, rows), "float32")],
        layers=[
            {
                "name": "product",
                "op": "dense",
                "lowering": "dense",
                "gemm": [rows, width, width],
                "macs": rows * width**2,
            }
        ],
        memory={"weights": 4 * width * width, "arena": 0, "workspace": 0, "outputs": 4 * rows * (width + 1)},
        plan={"format": 1, "layers": {"product": "dense"}},
        threads=threads,
    )
    return executable, manifest


def model(threads: int = THREADS) -> Model:
    executable, manifest = compiled()
    return Model(manifest, threads, executable=executable)


def data(seed: int = 0, rows: int = ROWS, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, rows, width)).astype(np.float32)

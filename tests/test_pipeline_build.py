"""What kernels allocate inside themselves: on the stack, or from the workspace pool and then reported."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, s_tir, te

from gemmify.pipeline_build import (
    LOCAL_STACK_BYTES,
    TIR_PIPELINE,
    TVM_STACK_BYTES,
    build_executable,
    kernel_workspace_bytes,
)

TARGET = tvm.target.Target("llvm")


def staged_kernel(columns, scope, parallel):
    """Rows of `columns` values staged through a buffer of one row."""
    a = te.placeholder((8, columns), name="a")
    b = te.compute(a.shape, lambda i, j: a[i, j] * 2.0, name="b")
    c = te.compute(a.shape, lambda i, j: b[i, columns - 1 - j] + 1.0, name="c")
    sch = s_tir.Schedule(te.create_prim_func([a, c]))
    row, _ = sch.get_loops(sch.get_sblock("c"))
    if parallel:
        sch.parallel(row)
    sch.compute_at(sch.get_sblock("b"), row)
    sch.set_scope(sch.get_sblock("b"), 0, scope)
    return tvm.IRModule({"staged": sch.mod["main"].with_attr("global_symbol", "staged")})


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    "scope, size, on_stack",
    [
        ("global", TVM_STACK_BYTES - 4, True),
        ("global", TVM_STACK_BYTES, False),
        ("local", 64, True),
        ("local", 2048, True),
        ("local", LOCAL_STACK_BYTES, True),
        ("local", LOCAL_STACK_BYTES + 4, False),
    ],
)
def test_kernel_workspace_is_what_the_library_asks_for(scope, size, on_stack, parallel):
    mod = staged_kernel(size // 4, scope, parallel)
    want = {} if on_stack else {"staged": size * (3 if parallel else 1)}
    assert kernel_workspace_bytes(mod, TARGET, threads=3) == want
    library = tvm.tirx.build(mod, target=TARGET, pipeline=TIR_PIPELINE)
    assert ("TVMBackendAllocWorkspace" in library.inspect_source("ll")) != on_stack
    x = np.random.default_rng(0).standard_normal((8, size // 4)).astype("float32")
    out = tvm.runtime.tensor(np.zeros_like(x))
    library["staged"](tvm.runtime.tensor(x), out)
    np.testing.assert_allclose(out.numpy(), x[:, ::-1].astype("float64") * 2 + 1, rtol=1e-6)


def test_the_build_reports_kernel_workspace():
    kernel = staged_kernel(512, "global", True)["staged"]
    x = relax.Var("x", relax.TensorType((8, 512), "float32"))
    bb = relax.BlockBuilder()
    gvar = bb.add_func(kernel, "staged")
    with bb.function("main", [x]):
        with bb.dataflow():
            out = bb.emit_output(relax.call_tir(gvar, relax.Tuple([x]), x.ty))
        bb.emit_func_output(out)
    _, plan = build_executable(bb.get(), TARGET, threads=2)
    assert plan.kernel_workspace == {"staged": 2 * 2048}

"""The emulated device itself: threads, memory and numbers; wrong kernels are found out."""

from __future__ import annotations

from typing import Any

import emulator
import ml_dtypes
import numpy as np
import pytest
from emulator import BuildError
from emulator.launch import LaunchError, launch
from hand_written import INPUT, POISON, SHIFT, N, both_orders, kernel
from tvm.script import tirx as T

pytestmark = pytest.mark.usefixtures("only_emulated")


# --- through TVM ------------------------------------------------------------------------------------------------------


@T.prim_func(s_tir=True)
def elementwise(A: T.Buffer((N,), "float32"), B: T.Buffer((N,), "float32")):
    T.func_attr({"global_symbol": "main", "tirx.noalias": True})
    block = T.launch_thread("blockIdx.x", 4)
    thread = T.launch_thread("threadIdx.x", 16)
    for i in T.vectorized(4):
        B[block * 64 + thread * 4 + i] = T.max(A[block * 64 + thread * 4 + i], T.float32(0)) * T.float32(2)


def reversing(scope: str) -> Any:
    """B = A backwards, through shared memory; TVM puts the barrier."""

    @T.prim_func(s_tir=True)
    def func(A: T.Buffer((N,), "float32"), B: T.Buffer((N,), "float32")):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        thread = T.launch_thread("threadIdx.x", N)
        shared = T.alloc_buffer((N,), "float32", scope=scope)
        shared[thread] = A[thread]
        B[thread] = shared[N - 1 - thread]

    return func


def test_a_kernel_of_tvm(run_kernel):
    (result,) = run_kernel(elementwise, INPUT, None)
    np.testing.assert_array_equal(result, np.maximum(INPUT, 0) * 2)


@pytest.mark.parametrize("scope", ["shared.dyn", "shared"])
def test_shared_memory_of_tvm(scope, run_kernel):
    (result,) = run_kernel(reversing(scope), INPUT, None, orders=(0, 1, 2, 3))
    np.testing.assert_array_equal(result, INPUT[::-1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arithmetic_of_halves_is_rounded_after_each_operation(dtype, run_kernel):
    @T.prim_func(s_tir=True)
    def func(
        A: T.Buffer((N,), dtype), B: T.Buffer((N,), dtype), C: T.Buffer((N,), dtype), D: T.Buffer((N,), "float32")
    ):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        thread = T.launch_thread("threadIdx.x", N // 8)
        for i in T.vectorized(8):
            C[thread * 8 + i] = T.max(A[thread * 8 + i] * B[thread * 8 + i] + A[thread * 8 + i], B[thread * 8 + i])
        for i in T.vectorized(4):
            D[thread * 8 + i] = T.Cast("float32", A[thread * 8 + i])
        for i in T.serial(4):
            D[thread * 8 + 4 + i] = T.Cast("float32", A[thread * 8 + 4 + i])

    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    a, b = INPUT.astype(numpy_dtype), INPUT[::-1].astype(numpy_dtype)
    c, d = run_kernel(func, a, b, None, None)
    np.testing.assert_array_equal(c.astype("float32"), np.maximum(a * b + a, b).astype("float32"))
    np.testing.assert_array_equal(d, a.astype("float32"))


def test_conversions_to_halves():
    """Every kind of float32: subnormals, ties, overflow, infinity, NaN."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**32, 1 << 16, dtype="uint64").astype("uint32").view("float32")
    special = [0, -0.0, 65504, 65519.99, 65520, 1e9, -1e9, 2**-24, 2**-25, 2**-25 * 1.0001, 6e-5, 1 + 2**-11, 1 + 2**-8]
    values[np.isnan(values)] = np.nan
    values = np.concatenate([values, np.array([*special, 3 + 2**-7, np.inf, -np.inf, np.nan], "float32")])
    values = np.concatenate([values, rng.uniform(-7e4, 7e4, 4096), rng.uniform(-1e-4, 1e-4, 4096)]).astype("float32")
    body = (
        "  for (int i = t; i < count[0]; i += 256) { h[i] = __float2half_rn(in[i]); b[i] = __float2bfloat16(in[i]); }"
    )
    text = kernel(body, "const float* in, const int* count, half* h, nv_bfloat16* b")
    halves = np.zeros(values.size, "float16"), np.zeros(values.size, ml_dtypes.bfloat16)
    *_, f16, bf16 = launch(text, 1, N, values, np.array([values.size], "int32"), *halves)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(f16, values.astype("float16"))
        np.testing.assert_array_equal(bf16.astype("float32"), values.astype(ml_dtypes.bfloat16).astype("float32"))


# --- threads that need one another ------------------------------------------------------------------------------------


def test_a_barrier_makes_both_orders_right():
    for result in both_orders(kernel(SHIFT.format(between="  __syncthreads();")), INPUT, POISON, shared=4 * N):
        np.testing.assert_array_equal(result, np.roll(INPUT, -32))


def test_a_missing_barrier_gives_poison():
    for result in both_orders(kernel(SHIFT.format(between="")), INPUT, POISON, shared=4 * N):
        assert np.isnan(result).any()


def test_a_missing_second_barrier_shows_in_one_order():
    """Nothing keeps a warp from writing the second phase while another still reads the first."""
    phase = "  s[t] = in[t] * {by};\n  __syncthreads();\n  sum += s[(t + 32) % 256];\n"
    body = f"  float sum = 0;\n{phase.format(by=1)}{phase.format(by=2)}  out[t] = sum;"
    expected = np.roll(INPUT, -32) * np.float32(3)
    results = both_orders(kernel(body), INPUT, POISON, shared=4 * N)
    assert not all(np.array_equal(result, expected) for result in results)
    fixed = body.replace("  sum += s[(t + 32) % 256];", "  sum += s[(t + 32) % 256];\n  __syncthreads();")
    for result in both_orders(kernel(fixed), INPUT, POISON, shared=4 * N):
        np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("  if (t < 100) __syncthreads();", r"100 of 256 threads wait at a barrier in line \d+ .*156 have ended"),
        ("  if (t < 100) __syncthreads();\n  else\n    __syncthreads();", "wait at the barriers of line"),
        ("  if (t % 2) __syncwarp();", "16 of 256 threads wait at __syncwarp|128 of 256 threads wait at __syncwarp"),
        ("  out[t] = t < 7 ? __shfl_xor_sync(0xffffffff, in[t], 1) : 0;", "7 of 256 threads wait at a shuffle"),
    ],
)
def test_threads_that_wait_for_ever_are_an_error(body, message):
    with pytest.raises(LaunchError, match=message):
        launch(kernel(body), 1, N, INPUT, POISON)
    assert launch(kernel("  out[t] = 1;"), 1, N, INPUT, POISON)[1].sum() == N, "the device works on"


def test_shuffles():
    body = """
  float a = __shfl_xor_sync(0xffffffff, in[t], 5, 32), b = __shfl_down_sync(0xffffffff, in[t], 3, 8);
  float c = __shfl_up_sync(0xffffffff, in[t], 2, 32), d = __shfl_sync(0xffffffff, in[t], 9, 32);
  out[t] = a; out[256 + t] = b; out[512 + t] = c; out[768 + t] = d;"""
    for result in both_orders(kernel(body), INPUT, np.zeros(4 * N, "float32")):
        xor, down, up, same = result.reshape(4, 8, 32)
        warps, lane = INPUT.reshape(8, 32), np.arange(32)
        np.testing.assert_array_equal(xor, warps[:, lane ^ 5])
        np.testing.assert_array_equal(down, warps[:, np.where(lane % 8 < 5, lane + 3, lane)])
        np.testing.assert_array_equal(up, warps[:, np.where(lane < 2, lane, lane - 2)])
        np.testing.assert_array_equal(same, np.repeat(warps[:, 9:10], 32, 1))


def test_a_shuffle_of_a_part_of_a_warp():
    body = "  out[t] = -2;\n  if (t < 16) out[t] = __shfl_down_sync(0x0000ffff, in[t], 8, 16);"
    result = launch(kernel(body), 1, N, INPUT, POISON)[1]
    np.testing.assert_array_equal(result[:8], INPUT[8:16])
    assert (result[16:] == -2).all()


def test_blocks_and_dimensions():
    body = """
  int block = blockIdx.y * gridDim.x + blockIdx.x;
  out[block * 64 + threadIdx.y * blockDim.x + t] = in[blockIdx.x * 4 + threadIdx.y];"""
    result = launch(kernel(body), (2, 2), (16, 4), INPUT, POISON)[1]
    expected = np.tile(np.repeat(INPUT[:8], 16), 2)
    np.testing.assert_array_equal(result, expected)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("  out[t + 100000] = 1;", r"block \(0, 0, 0\), thread \(0, 0, 0\): byte 400000 of an allocation of 1024"),
        ("  out[t] = in[t + (t == 77 ? 256 : 0)];", r"thread \(77, 0, 0\): byte 1332 of an allocation of 1024 bytes"),
        ("  out[-1000 + t] = 1;", r"CUDA_ERROR_ILLEGAL_ADDRESS.*byte -4000 of an allocation of 1024"),
        ("  s[t + 256 + (t == 3) * 100000] = 1;", r"byte 40\d+ of 1024 of dynamic shared memory|byte 1024 of"),
        ("  s[t + 1] = 1;", r"thread \(255, 0, 0\): byte 1024 of 1024 of dynamic shared memory"),
        ("  __shared__ float small[4];\n  small[t % 5] = 1;", "behind a shared array of 16 bytes"),
        ("  out[t] = int(in[t]) / (t - 5 - int(in[0]) * 0);", "divided by zero"),
        ("  __trap();", "a trap"),
    ],
)
def test_an_access_that_is_wrong_is_an_error(body, message):
    with pytest.raises(LaunchError, match=message):
        launch(kernel(body), 1, N, INPUT, POISON, shared=4 * N)
    assert launch(kernel("  out[t] = 1;"), 1, N, INPUT, POISON)[1].sum() == N, "the device works on"


def test_a_write_into_what_alignment_leaves_is_seen():
    with pytest.raises(LaunchError, match="written beside"):
        launch(kernel("  if (t == 0) out[200] = 1;"), 1, N, INPUT, np.zeros(200, "float32"))


def test_a_write_behind_shared_memory_that_ends_anywhere_is_seen():
    with pytest.raises(LaunchError, match="beside the 1000 bytes of dynamic shared memory"):
        launch(kernel("  s[t % 251] = 1;"), 1, N, INPUT, POISON, shared=1000)


def test_registers_that_were_never_written_show():
    body = "  float r[8];\n  if (in[0] > 1e30f) for (int i = 0; i < 8; ++i) r[i] = in[i];\n  out[t] = r[t % 8];"
    assert (np.abs(launch(kernel(body), 1, N, INPUT, POISON)[1]) > 1e30).all()


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        (1, 512, 0, "512 threads a block, __launch_bounds__ promised 256"),
        (1, 2048, 0, "impossible size"),
        ((1, 70000), 32, 0, "impossible size"),
        (1, 32, 300000, "300000 bytes of shared memory, a block may have 232448"),
    ],
)
def test_a_launch_that_a_gpu_refuses(grid, block, shared, message):
    with pytest.raises(LaunchError, match=message):
        launch(kernel("  out[t] = 1;"), grid, block, INPUT, POISON, shared=shared)


def test_code_for_another_architecture_is_refused():
    with pytest.raises(LaunchError, match=r"NO_BINARY_FOR_GPU.*sm_90"):
        launch(kernel("  out[t] = 1;"), 1, N, INPUT, POISON, archs=("sm_75", "sm_80"))
    emulator.set_capability("sm_86")
    assert launch(kernel("  out[t] = 1;"), 1, N, INPUT, POISON, archs=("sm_75", "sm_80"))[1].sum() == N


def test_text_that_does_not_compile_names_the_error():
    with pytest.raises(BuildError, match="nonsense"):
        launch(kernel("  nonsense(t);"), 1, N, INPUT, POISON)

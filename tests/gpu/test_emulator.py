"""The emulated device itself: right kernels run, wrong ones are found out. Kernels are written by hand."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import textwrap
from typing import Any

import emulator
import ml_dtypes
import numpy as np
import pytest
from emulator import BuildError
from emulator.launch import LaunchError, launch
from tvm.script import tirx as T

N = 256
INPUT = np.random.default_rng(7).standard_normal(N).astype("float32")
POISON = np.full(N, -1, "float32")


@pytest.fixture(autouse=True)
def only_emulated(emulated: bool) -> None:
    if not emulated:
        pytest.skip("about the emulator, and this is a real GPU")


def kernel(body: str, parameters: str = "const float* in, float* out") -> str:
    """CUDA text of one kernel; `t` is the thread, `s` dynamic shared memory of floats."""
    head = f'extern "C" __global__ void __launch_bounds__(256) kernel({parameters}) {{\n'
    return f"{head}  extern __shared__ float s[];\n  int t = threadIdx.x;\n{body}\n}}\n"


def both_orders(text: str, *arrays: np.ndarray, **options: Any) -> list[np.ndarray]:
    """The last array after the kernel, in each of the two orders of threads."""
    results = []
    for order in (0, 1):
        emulator.set_order(order)
        results.append(launch(text, 1, N, *arrays, **options)[-1])
    return results


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

SHIFT = "  s[t] = in[t];\n{between}\n  out[t] = s[(t + 32) % 256];"


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


# --- asynchronous copies ----------------------------------------------------------------------------------------------

COPY = """
  gemmify_cp_async_16(s + 4 * (t % 64), in + 4 * (t % 64), t < 60 ? 1 : t >= 64);
  gemmify_cp_async_commit();
{wait}
  __syncthreads();
  out[t] = s[t];"""


def copying(wait: str) -> str:
    return kernel(
        COPY.format(wait=wait)
        .replace("t % 64", "t")
        .replace("  gemmify_cp_async_16", "  if (t < 64) gemmify_cp_async_16")
    )


def test_an_asynchronous_copy_and_its_zeros():
    for result in both_orders(copying("  gemmify_cp_async_wait_0();"), INPUT, POISON, shared=4 * N):
        np.testing.assert_array_equal(result, np.where(np.arange(N) < 240, INPUT, 0))


@pytest.mark.parametrize("wait", ["", "  gemmify_cp_async_wait_1();"], ids=["none", "too few"])
def test_a_copy_that_is_not_waited_for_is_not_there(wait):
    late, early = both_orders(copying(wait), INPUT, POISON, shared=4 * N)
    assert np.isnan(late).all() and not np.isnan(early).any()


def test_a_copy_into_a_stage_that_others_still_read_shows():
    body = """
  s[t] = in[t];
  __syncthreads();
  float mine = s[(t + 128) % 256];
  if (t < 64) gemmify_cp_async_16(s + 4 * t, in + 4 * t + 256, 1);
  gemmify_cp_async_commit();
  gemmify_cp_async_wait_0();
  out[t] = mine;"""
    late, early = both_orders(kernel(body), np.concatenate([INPUT, INPUT + 9]), POISON, shared=4 * N)
    assert not (np.array_equal(late, np.roll(INPUT, 128)) and np.array_equal(early, np.roll(INPUT, 128)))


def test_a_misaligned_copy_is_an_error():
    with pytest.raises(LaunchError, match=r"cp\.async of 16 bytes from or to an address that is no multiple"):
        launch(kernel("  gemmify_cp_async_16(s + 4 * t, in + t, 1);"), 1, 32, INPUT, POISON, shared=4 * N)


# --- kernels that are watched -----------------------------------------------------------------------------------------

RACES = {
    "write before read": (
        "s[t] = in[t]; out[t] = s[t ^ 1];",
        r"race: a (read|write) of byte \d+ of 1024 of dynamic shared memory",
    ),
    "read before write": (
        "s[t] = 1; __syncthreads(); float x = s[t ^ 1]; s[t] = x;",
        r"race: a (read|write) of byte \d+ of 1024",
    ),
    "two writes": ("s[t / 2] = t;", "race: a write of byte .* has written since the last barrier"),
    "two warps": (
        "s[t] = in[t]; __syncwarp(); out[t] = s[(t + 32) % 256];",
        r"race: a (read|write) of byte \d+ of 1024",
    ),
    "output": ("out[t / 2] = 1;", r"race: a write of byte \d+ of an allocation of 1024 bytes"),
    "copy not waited for": (
        "if (t < 64) gemmify_cp_async_16(s + 4 * t, in + 4 * t, 1); gemmify_cp_async_commit(); __syncthreads();"
        "float x = s[t]; gemmify_cp_async_wait_0(); out[t] = x;",
        r"race: a (read|write) of byte \d+ of 1024 of dynamic",
    ),
    "beyond by one": ("if (t == 0) out[255] = in[256 - (t > 0)] + in[256];", "byte 1024 of an allocation of 1024"),
}


@pytest.mark.parametrize("case", RACES)
def test_a_race_is_found_whatever_the_values(case):
    body, message = RACES[case]
    for order in (0, 1):
        emulator.set_order(order)
        with pytest.raises(LaunchError, match=message):
            launch(kernel("  " + body), 1, N, INPUT, POISON, shared=4 * N, watched=True)


def test_blocks_that_write_the_same_place_race():
    text = kernel("  if (t == 0) out[0] = 1;")
    with pytest.raises(LaunchError, match="thread 0 of block 0 has written"):
        launch(text, 2, N, INPUT, POISON, watched=True)
    launch(text, 1, N, INPUT, POISON, watched=True)


@pytest.mark.parametrize(
    "body",
    [
        SHIFT.format(between="  __syncthreads();"),
        "  s[t] = in[t];\n  __syncwarp();\n  out[t] = s[t ^ 1];\n  __syncwarp();\n  s[t] = 1;",
        "  atomicAdd(out + t / 4, 1.0f);",
        "  __shared__ float x[256];\n  x[255 - t] = in[t];\n  __syncthreads();\n  out[t] = x[t];",
    ],
)
def test_what_barriers_order_is_no_race(body):
    for order in (0, 1, 2):
        emulator.set_order(order)
        launch(kernel(body), 1, N, INPUT, POISON, shared=4 * N, watched=True)


def test_shared_memory_of_two_blocks_is_not_the_same():
    text = kernel("  s[t] = in[t];\n  __syncthreads();\n  out[256 * blockIdx.x + t] = s[(t + 32) % 256];")
    result = launch(text, 3, N, INPUT, np.zeros(3 * N, "float32"), shared=4 * N, watched=True)[1]
    np.testing.assert_array_equal(result, np.tile(np.roll(INPUT, -32), 3))


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


# --- tensor cores -----------------------------------------------------------------------------------------------------

DTYPES = {"f16": np.dtype("float16"), "bf16": np.dtype(ml_dtypes.bfloat16), "tf32": np.dtype("float32")}


def small(rows: int, columns: int, seed: int) -> np.ndarray:
    """Numbers that each of the types holds, and whose sums of products float32 holds."""
    return np.random.default_rng(seed).integers(-8, 9, (rows, columns)).astype("float32")


@pytest.mark.parametrize("kind", DTYPES)
def test_mma_with_ldmatrix(kind):
    k = 8 if kind == "tf32" else 16
    body = f"""
  char* bytes = (char*)s;
  for (int i = t; i < 128; i += 32) {{ s[i] = a[i]; if (i < 64) s[128 + i] = b[i]; }}
  __syncwarp();
  unsigned x[4], y[2];
  float z[4] = {{1, 1, 1, 1}};
  gemmify_ldmatrix_x4(x, bytes + (t % 16) * 32 + t / 16 * 16);
  gemmify_ldmatrix_x2(y, bytes + 512 + (t % 8) * 32 + t / 8 % 2 * 16);
  gemmify_mma_m16n8k{k}_{kind}(z, x, y);
  for (int i = 0; i < 4; ++i) out[(t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = z[i];"""
    a, b = small(16, k, 1), small(8, k, 2)
    text = kernel(body, "const float* a, const float* b, float* out")
    words = [operand.astype(DTYPES[kind]).view("float32") for operand in (a, b)]
    for order in (0, 1):
        emulator.set_order(order)
        result = launch(text, 1, 32, *words, np.zeros((16, 8), "float32"), shared=1024)[-1]
        np.testing.assert_array_equal(result, a @ b.T + 1)


def test_tf32_is_rounded_and_cut():
    body = "  unsigned x = __float_as_uint(in[t]);\n  gemmify_round_tf32(&x);\n  out[t] = __uint_as_float(x);"
    values = np.array([1 + 2**-10, 1 + 2**-11, 1 + 2**-11 - 2**-20, -(1 + 2**-11), 1e38, np.inf] + [0] * 26, "float32")
    result = launch(kernel(body), 1, 32, values, np.zeros(32, "float32"))[1]
    np.testing.assert_array_equal(result[:4], np.float32([1 + 2**-10, 1 + 2**-10, 1, -(1 + 2**-10)]))
    assert np.isinf(result[5])


WGMMA = """
  char* bytes = (char*)s;
  for (int i = t; i < 8 * (64 + n); i += 128) {{
    int row = i / 8, chunk = i % 8;
    const float* from = row < 64 ? a + row * 32 : b + (row - 64) * 32;
    gemmify_cp_async_16(bytes + row * 128 + (chunk ^ row % 8) * 16, from + chunk * 4, 1);
  }}
  gemmify_cp_async_commit();
  gemmify_cp_async_wait_0();
  {fence}
  __syncthreads();
  float c[{n} / 2];
  for (int i = 0; i < {n} / 2; ++i) c[i] = 0;
  gemmify_wgmma_fence();
  for (int step = 0; step < 4; ++step)
    gemmify_wgmma_m64n{n}k{k}_{kind}(c, bytes, 32 * step, bytes + 8192, 32 * step);
  gemmify_wgmma_commit();
  {wait}
  for (int i = 0; i < {n} / 2; ++i)
    out[(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * {n} + i / 4 * 8 + t % 4 * 2 + i % 2] = c[i];"""


def warp_group(
    kind: str, n: int, fence: str = "gemmify_fence_proxy_async();", wait: str = "gemmify_wgmma_wait_0();"
) -> Any:
    """What wgmma gives in both orders, and what it should: 128 bytes of 64 rows by as much of n rows."""
    k = 128 // DTYPES[kind].itemsize
    a, b = small(64, k, 3), small(n, k, 4)
    words = [operand.astype(DTYPES[kind]).view("float32") for operand in (a, b)]
    body = WGMMA.format(n=n, k=k // 4, kind=kind, fence=fence, wait=wait).replace("64 + n", f"64 + {n}")
    results = []
    for order in (0, 1):
        emulator.set_order(order)
        text = kernel(body, "const float* a, const float* b, float* out")
        results.append(launch(text, 1, 128, *words, np.zeros((64, n), "float32"), shared=128 * (64 + n))[-1])
    return results, a @ b.T


@pytest.mark.parametrize(("kind", "n"), [("f16", 8), ("bf16", 72), ("tf32", 256)])
def test_wgmma(kind, n):
    results, expected = warp_group(kind, n)
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_wgmma_that_is_not_waited_for_has_not_happened():
    (_, late), expected = warp_group("f16", 16, wait="")
    assert not np.array_equal(late, expected)


def test_a_uniform_value_that_is_none():
    launch(kernel("  int warp = t / 32;\n  gemmify_uniform(&warp);\n  out[t] = warp;"), 1, N, INPUT, POISON)
    with pytest.raises(LaunchError, match="not the same in all lanes"):
        launch(kernel("  int warp = t / 48;\n  gemmify_uniform(&warp);\n  out[t] = warp;"), 1, N, INPUT, POISON)


def test_wgmma_needs_the_proxy_fence():
    with pytest.raises(LaunchError, match="without gemmify_fence_proxy_async"):
        warp_group("f16", 16, fence="")


# --- the host's side --------------------------------------------------------------------------------------------------


def fresh(code: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run Python `code` in a fresh process under the emulated driver."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = emulator.environment(**settings)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_a_fresh_process_finds_the_device():
    done = fresh("import tvm; d = tvm.cuda(0); print(d.exist, d.compute_version, tvm.cuda(1).exist)", capability=80)
    assert done.stdout.split() == ["True", "8.0", "False"], done.stderr


def test_a_driver_without_a_device():
    done = fresh("import tvm; print(tvm.cuda(0).exist)", devices=0)
    assert done.stdout.split() == ["False"], done.stderr


def test_host_code_cannot_follow_a_device_pointer():
    code = """
        import ctypes
        import emulator
        runtime = ctypes.CDLL(str(emulator.libraries() / "libcudart.so.13"))
        place = ctypes.c_void_p()
        assert runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(64)) == 0
        print(flush=True, end="reading ")
        print(ctypes.cast(place, ctypes.POINTER(ctypes.c_float))[0])
    """
    done = fresh(code)
    assert done.stdout == "reading " and done.returncode == -signal.SIGSEGV
    done = fresh(code, host_access=1)
    assert done.stdout == "reading nan\n", done.stderr


def test_modules_that_live_together_are_not_mixed_up():
    texts = [kernel(f"  out[t] = {value};") for value in range(8)]
    modules, functions = [], []
    for text in texts:
        module = ctypes.c_void_p()
        assert emulator.driver().cuModuleLoadData(ctypes.byref(module), emulator.compile_text(text)) == 0
        modules.append(module)
        function = ctypes.c_void_p()
        assert emulator.driver().cuModuleGetFunction(ctypes.byref(function), module, b"kernel") == 0
        functions.append(function)
    for value, text in enumerate(texts):
        assert (launch(text, 1, N, INPUT, POISON)[1] == value).all()
    for module in modules:
        assert emulator.driver().cuModuleUnload(module) == 0


class Captured:
    """A stream of the runtime API, and what is called while it is captured."""

    def __init__(self) -> None:
        self.runtime = ctypes.CDLL(str(emulator.libraries() / "libcudart.so.13"))
        self.stream, self.graph, self.place = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        assert self.runtime.cudaMalloc(ctypes.byref(self.place), ctypes.c_size_t(INPUT.nbytes)) == 0
        assert self.runtime.cudaStreamCreate(ctypes.byref(self.stream)) == 0
        assert self.runtime.cudaStreamBeginCapture(self.stream, 0) == 0

    def copy(self, source: np.ndarray, stream: ctypes.c_void_p | None) -> int:
        size, pointer = ctypes.c_size_t(source.nbytes), ctypes.c_void_p(source.ctypes.data)
        return self.runtime.cudaMemcpyAsync(self.place, pointer, size, 1, stream)

    def content(self) -> np.ndarray:
        result = np.empty_like(INPUT)
        pointer = ctypes.c_void_p(result.ctypes.data)
        assert self.runtime.cudaMemcpy(pointer, self.place, ctypes.c_size_t(result.nbytes), 2) == 0
        return result

    def end(self) -> int:
        return self.runtime.cudaStreamEndCapture(self.stream, ctypes.byref(self.graph))


def test_a_capture_records_and_a_graph_replays():
    captured, source = Captured(), INPUT.copy()
    assert captured.copy(source, captured.stream) == 0 and captured.end() == 0
    assert np.isnan(captured.content()).all(), "nothing is done while it is captured"
    executable = ctypes.c_void_p()
    assert captured.runtime.cudaGraphInstantiate(ctypes.byref(executable), captured.graph, ctypes.c_ulonglong(0)) == 0
    for by in (1, 2):
        source[:] = INPUT * by
        assert captured.runtime.cudaGraphLaunch(executable, captured.stream) == 0
        np.testing.assert_array_equal(captured.content(), source)
    assert captured.runtime.cudaFree(captured.place) == 0


UNSUPPORTED, INVALIDATED, IMPLICIT = 900, 901, 906


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaStreamSynchronize", "another stream"])
def test_a_capture_is_spoilt_by_what_it_does_not_allow(call):
    captured = Captured()
    if call == "another stream":
        assert captured.copy(INPUT, None) == IMPLICIT
    elif call == "cudaMalloc":
        assert captured.runtime.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4)) == UNSUPPORTED
    else:
        assert captured.runtime.cudaStreamSynchronize(captured.stream) == UNSUPPORTED
    assert captured.end() == INVALIDATED
    assert captured.runtime.cudaFree(captured.place) == 0


def test_a_copy_beyond_its_allocation_and_a_wrong_kind_are_refused():
    captured = Captured()
    assert captured.end() == 0
    assert captured.copy(np.zeros(N + 1, "float32"), None) == 1
    assert "copy to the device of 1028 bytes" in emulator.last_error()
    size, pointer = ctypes.c_size_t(INPUT.nbytes), ctypes.c_void_p(INPUT.ctypes.data)
    assert captured.runtime.cudaMemcpy(pointer, captured.place, size, 1) == 1
    assert "the pointer of the other" in emulator.last_error()
    assert captured.runtime.cudaFree(captured.place) == 0
    assert captured.runtime.cudaFree(captured.place) == 1, "freed twice"


def test_memory_ends():
    done = fresh("import tvm; tvm.runtime.empty((1 << 20,), 'float32', tvm.cuda(0)).numpy()", memory_mib=3)
    assert done.returncode != 0 and "4194304 bytes asked for" in done.stderr, done.stderr
    assert fresh("import tvm; tvm.runtime.empty((1 << 18,), 'float32', tvm.cuda(0))", memory_mib=3).returncode == 0

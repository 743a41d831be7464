"""The emulated device itself: asynchronous copies, tensor cores, and kernels that are watched for races."""

from __future__ import annotations

from typing import Any

import emulator
import ml_dtypes
import numpy as np
import pytest
from emulator.launch import LaunchError, launch
from hand_written import INPUT, POISON, SHIFT, N, both_orders, kernel

pytestmark = pytest.mark.usefixtures("only_emulated")


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

"""Device functions: the instructions of PTX that CUDA C++ has no name for, each as one small function of its own.

Every function here returns a call expression for `T.evaluate`. Its C source is emitted once at the top of the CUDA
text that holds the call, between `#ifndef GEMMIFY_EMULATED` and `#endif`: an emulator defines that macro and functions
of the same names and signatures. All are `void`; pointers are ordinary C pointers (shared memory by its generic
address). sm_75 and later have the functions of the first two groups unless a line says otherwise.

The list, as an emulator must supply it (`lane` is threadIdx.x % 32, g = lane / 4, t = lane % 4):

Asynchronous copies. B is 16, 8 or 4, both pointers are aligned to B bytes.
    gemmify_cp_async_B(void* shared, const void* global, int valid)
        Copies B bytes; where valid == 0 writes B zero bytes and does not read `global`. Nothing is written before this
        thread has waited for the group (sm_75 copies at once).
    gemmify_cp_async_commit()
        The copies of this thread since the last commit become a group (an empty one counts).
    gemmify_cp_async_wait_N(), N = 0 .. 7
        Returns when all groups of this thread but the last N have been written.

Tensor cores of a warp. All 32 lanes call together with the same instruction. Registers are arrays of `unsigned` that
hold 4 bytes each: two halves, the lower index in the lower 16 bits, or one float.
    gemmify_ldmatrix_x4(unsigned* d, const void* row), gemmify_ldmatrix_x2(unsigned* d, const void* row)
        Matrix i (of 4 or 2) is 8 rows of 16 bytes, its row r at the `row` of lane 8 i + r, aligned to 16 bytes. d[i] is
        the 4 bytes t of row g of matrix i. (x2 does not look at the `row` of lanes 16 .. 31.)
    gemmify_mma_m16n8k16_f16(float* c, const unsigned* a, const unsigned* b), .._bf16 (sm_80)
        C[16][8] += A[16][16] B[8][16]^T, summed in float32.
        a[0] = A[g][2t, 2t+1]     a[1] = A[g+8][2t, 2t+1]    a[2] = A[g][2t+8, 2t+9]    a[3] = A[g+8][2t+8, 2t+9]
        b[0] = B[g][2t, 2t+1]     b[1] = B[g][2t+8, 2t+9]
        c[0] = C[g][2t]           c[1] = C[g][2t+1]          c[2] = C[g+8][2t]          c[3] = C[g+8][2t+1]
    gemmify_mma_m16n8k8_tf32(float* c, const unsigned* a, const unsigned* b) (sm_80)
        C[16][8] += A[16][8] B[8][8]^T of float32 of which the lower 13 bits are not looked at.
        a[0] = A[g][t]            a[1] = A[g+8][t]           a[2] = A[g][t+4]           a[3] = A[g+8][t+4]
        b[0] = B[g][t]            b[1] = B[g][t+4]           c as above.
    gemmify_round_tf32(unsigned* x) (sm_80)
        x[0], a float's bits, rounded to 10 bits of mantissa, to nearest, ties away from zero. Of one thread.

Warp groups (sm_90a alone). The 128 threads of an aligned group of 4 warps call together.
    gemmify_wgmma_m64nNk16_f16(float* c, const void* a, int at_a, const void* b, int at_b), .._bf16, N = 8, 16 .. 256
    gemmify_wgmma_m64nNk8_tf32(float* c, const void* a, int at_a, const void* b, int at_b)
        Starts C[64][N] += A[64][k] B[N][k]^T in float32; TF32 does not look at the lower 13 bits of an operand. The
        operands start `at_a` and `at_b` bytes (multiples of 16) behind `a` and `b`, which are the same in all threads.
        Both are K-major under the 128-byte swizzle: a row takes 128 bytes, a row's 16-byte chunk c lies at chunk
        c ^ (row % 8), rows 0 .. 7 start at a multiple of 1024 bytes: the hardware XORs bits 4 .. 6 of the address with
        its bits 7 .. 9. Byte j < 32 of row r of A is therefore read at swizzle(a + at_a + 128 r + j); an operand may
        start at byte 0, 32, 64 or 96 of row 0, as if unswizzled.
        With w = (threadIdx.x / 32) % 4:   c[4 i + 2 h + e] = C[16 w + g + 8 h][8 i + 2 t + e],  h, e in 0 .. 1.
        Shared memory is read, and c written, at any time up to the wait: c must not be touched before.
    gemmify_wgmma_fence()         before the first wgmma, and wherever c was written by other instructions.
    gemmify_wgmma_commit()        the multiplications since the last commit become a group.
    gemmify_wgmma_wait_N(), N = 0 .. 7   returns when all groups of the warp group but the last N are done.
    gemmify_hold_R(float* c), R a multiple of 4
        Nothing at run time: keeps the compiler from moving an access of c[0 .. R) over it.
    gemmify_uniform(int* value)
        Nothing that shows: *value is the same in all lanes of the warp before, and so it stays.
    gemmify_fence_proxy_async()
        This thread's earlier writes to shared memory (cp.async that was waited for, too) become visible to wgmma; a
        barrier must follow before another thread's wgmma reads them.
"""

from __future__ import annotations

from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import tirx as T

COPY_BYTES = (16, 8, 4)
"""What one asynchronous copy can move."""
MAX_GROUPS = 7
"""The largest number of groups that a wait can leave in flight."""
_HALVES = {"float16": "f16", "bfloat16": "bf16"}


def keep_size(buffer: Any, elements: int) -> None:
    """Emit what keeps TVM from cutting off the end of a flat buffer that only device functions touch.

    TVM narrows every allocation to the elements whose addresses it sees; what lies behind such an address, up to the
    last element, it does not know. The statement itself comes to nothing.
    """
    T.evaluate(T.address_of(buffer[elements - 1]))


def _device(name: str, parameters: str, body: str) -> str:
    """The source of one device function, which an emulator replaces by its own."""
    text = f"__forceinline__ __device__ void {name}({parameters}) {{\n{body.rstrip()}\n}}"
    return f"#ifndef GEMMIFY_EMULATED\n{text}\n#endif\n"


def _call(name: str, parameters: str, body: str, *args: Any) -> Any:
    return cuda_func_call(name, *args, source_code=_device(name, parameters, body))


def cp_async(size: int, shared: Any, global_: Any, valid: Any) -> Any:
    """Copy `size` (16, 8 or 4) bytes from `global_` to `shared`, or write zeros where the int `valid` is 0.

    Where cp.async is missing (sm_75) the copy is done at once; the calls around it are then empty.
    """
    assert size in COPY_BYTES, size
    kind = "cg" if size == 16 else "ca"
    vector = {16: "uint4", 8: "uint2", 4: "unsigned"}[size]
    zero = {16: "make_uint4(0, 0, 0, 0)", 8: "make_uint2(0, 0)", 4: "0u"}[size]
    body = f"""\
#if __CUDA_ARCH__ >= 800
  unsigned to = (unsigned)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.{kind}.shared.global.L2::128B [%0], [%1], {size}, %2;"
               :: "r"(to), "l"(global), "r"(valid ? {size} : 0) : "memory");
#else
  *({vector}*)shared = valid ? *(const {vector}*)global : {zero};
#endif"""
    return _call(
        f"gemmify_cp_async_{size}", "void* shared, const void* global, int valid", body, shared, global_, valid
    )


def _from_sm_80(instruction: str) -> str:
    return f'#if __CUDA_ARCH__ >= 800\n  asm volatile("{instruction}" ::: "memory");\n#endif'


def cp_async_commit() -> Any:
    """Close this thread's group of asynchronous copies."""
    return _call("gemmify_cp_async_commit", "", _from_sm_80("cp.async.commit_group;"))


def cp_async_wait(groups: int) -> Any:
    """Wait until at most the last `groups` groups of this thread's asynchronous copies are still under way."""
    assert 0 <= groups <= MAX_GROUPS, groups
    return _call(f"gemmify_cp_async_wait_{groups}", "", _from_sm_80(f"cp.async.wait_group {groups};"))


def ldmatrix(count: int, fragment: Any, row: Any) -> Any:
    """Load `count` (4 or 2) matrices of 8 rows x 16 bytes: `fragment` is the address of as many uint32 registers, `row`
    that of the row in shared memory which this lane names."""
    assert count in (2, 4), count
    outputs = ", ".join(f"%{i}" for i in range(count))
    registers = ", ".join(f'"=r"(d[{i}])' for i in range(count))
    body = f"""\
  unsigned from = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{outputs}}}, [%{count}];"
               : {registers} : "r"(from) : "memory");"""
    return _call(f"gemmify_ldmatrix_x{count}", "unsigned* d, const void* row", body, fragment, row)


def _mma(shape: str, kind: str, a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """The statement of one mma.sync on the registers `a` and `b` of the fragments."""
    placeholders = [f"%{i}" for i in range(4 + len(a) + len(b))]
    groups = (placeholders[:4], placeholders[4 : 4 + len(a)], placeholders[4 + len(a) :])
    c_text, a_text, b_text = ("{" + ", ".join(group) + "}" for group in groups)
    c_operands = ", ".join(f'"+f"(c[{i}])' for i in range(4))
    operands = ", ".join([f'"r"(a[{i}])' for i in a] + [f'"r"(b[{i}])' for i in b])
    return (
        f'  asm volatile("mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "\n'
        f'               "{c_text}, {a_text}, {b_text}, {c_text};"\n'
        f"               : {c_operands} : {operands});"
    )


def mma(operand: str, c: Any, a: Any, b: Any) -> Any:
    """C[16][8] += A[16][k] B[8][k]^T of one warp, 32 bytes of `operand` a row: k = 16 of "float16" or "bfloat16", 8 of
    "float32" taken as TF32. `c`, `a`, `b` are the addresses of 4 float32, 4 and 2 uint32 registers."""
    if operand == "float32":
        name, body = "gemmify_mma_m16n8k8_tf32", _mma("m16n8k8", "tf32", (0, 1, 2, 3), (0, 1))
    else:
        kind = _HALVES[operand]
        name, body = f"gemmify_mma_m16n8k16_{kind}", _mma("m16n8k16", kind, (0, 1, 2, 3), (0, 1))
        if operand == "float16":  # sm_75 multiplies 8 deep: the halves of the fragments are its fragments
            steps = [_mma("m16n8k8", kind, (2 * i, 2 * i + 1), (i,)) for i in range(2)]
            body = "\n".join(["#if __CUDA_ARCH__ >= 800", body, "#else", *steps, "#endif"])
    return _call(name, "float* c, const unsigned* a, const unsigned* b", body, c, a, b)


def round_tf32(register: Any) -> Any:
    """Round the float32 in the uint32 register at address `register` to TF32, to nearest."""
    body = '  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(x[0]) : "f"(__uint_as_float(x[0])));'
    return _call("gemmify_round_tf32", "unsigned* x", body, register)


def wgmma_k(operand: str) -> int:
    """How deep one wgmma on `operand` is: 32 bytes of every row."""
    return 8 if operand == "float32" else 16


def wgmma(operand: str, n: int, c: Any, a: Any, at_a: int, b: Any, at_b: int) -> Any:
    """Start C[64][n] += A[64][k] B[n][k]^T of a warp group, k = `wgmma_k(operand)`.

    `c` is the address of n / 2 float32 registers, `a` and `b` those of the operands' first rows in shared memory, in
    the layout that the module's list states.
    """
    assert n % 8 == 0 and 8 <= n <= 256, n
    kind = "tf32" if operand == "float32" else _HALVES[operand]
    name = f"gemmify_wgmma_m64n{n}k{wgmma_k(operand)}_{kind}"
    count = n // 2
    outputs = ", ".join(f"%{i}" for i in range(count))
    registers = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    # The immediates are: scale A, scale B, and for 16-bit types whether A and B are transposed.
    immediates = "1, 1" if operand == "float32" else "1, 1, 0, 0"
    # Descriptor: address / 16 in bits 0 .. 13 (shared memory ends below 2^18); 1024 / 16, from 8 rows to the next 8,
    # in bits 32 .. 45; 1 in bits 62 .. 63 is the 128-byte swizzle; the field at bit 16 is not used under one along k.
    body = f"""\
  const unsigned long long layout = (1ull << 62) | (64ull << 32) | (1ull << 16);
  unsigned long long from_a = (layout | ((unsigned)__cvta_generic_to_shared(a) >> 4)) + (at_a >> 4);
  unsigned long long from_b = (layout | ((unsigned)__cvta_generic_to_shared(b) >> 4)) + (at_b >> 4);
  asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k{wgmma_k(operand)}.f32.{kind}.{kind} "
               "{{{outputs}}}, %{count}, %{count + 1}, 1, {immediates};"
               : {registers}
               : "l"(from_a), "l"(from_b));"""
    return _call(name, "float* c, const void* a, int at_a, const void* b, int at_b", body, c, a, at_a, b, at_b)


def uniform(value: Any) -> Any:
    """Tell the compiler that the int32 register at address `value` is the same in all lanes of the warp, which it is:
    what follows from it then takes registers and instructions of the warp, and descriptors need no move."""
    return _call("gemmify_uniform", "int* value", "  *value = __shfl_sync(0xFFFFFFFFu, *value, 0);", value)


def _plain(name: str, instruction: str) -> Any:
    return _call(name, "", f'  asm volatile("{instruction}" ::: "memory");')


def wgmma_fence() -> Any:
    """Order the accumulators' earlier writes before the warp group's next multiplications."""
    return _plain("gemmify_wgmma_fence", "wgmma.fence.sync.aligned;")


def wgmma_commit() -> Any:
    """Close the warp group's group of multiplications."""
    return _plain("gemmify_wgmma_commit", "wgmma.commit_group.sync.aligned;")


def wgmma_wait(groups: int) -> Any:
    """Wait until at most the last `groups` groups of multiplications are still under way."""
    assert 0 <= groups <= MAX_GROUPS, groups
    return _plain(f"gemmify_wgmma_wait_{groups}", f"wgmma.wait_group.sync.aligned {groups};")


def hold(count: int, c: Any) -> Any:
    """Keep the compiler from moving accesses of the `count` float32 registers at address `c` over this point."""
    lines = [
        '  asm volatile("" : '
        + ", ".join(f'"+f"(c[{i}])' for i in range(first, min(first + 16, count)))
        + ' :: "memory");'
        for first in range(0, count, 16)
    ]
    return _call(f"gemmify_hold_{count}", "float* c", "\n".join(lines), c)


def fence_proxy_async() -> Any:
    """Make this thread's earlier writes to shared memory visible to the asynchronous proxy (wgmma, bulk copies)."""
    return _plain("gemmify_fence_proxy_async", "fence.proxy.async.shared::cta;")

// ldmatrix, mma.sync and wgmma: fragments as PTX lays them out, sums in float32.
#include <cmath>
#include <cstring>

#include "block.h"
#include "races.h"
#include "include/numbers.h"

namespace emulator {
namespace {

enum Kind { F16, BF16, TF32 };

float half_of(unsigned word, int which, int kind) {
  auto bits = static_cast<unsigned short>(word >> (16 * which));
  return kind == F16 ? gemmify_float_of_half(bits) : gemmify_float_of_bfloat16(bits);
}

float tf32_of(unsigned bits) {
  bits &= ~0x1FFFu;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Load {
  unsigned* d;
  const unsigned char* row;
};

template <int COUNT>
void load_matrices(void** payloads) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < COUNT; ++i) {
      auto from = static_cast<Load*>(payloads[8 * i + lane / 4])->row;
      std::memcpy(static_cast<Load*>(payloads[lane])->d + i, from + 4 * (lane % 4), 4);
    }
}

struct Fragments {
  float* c;
  const unsigned *a, *b;
};

// C[16][8] += A[16][K] B[8][K]^T with the operands of all lanes as floats.
template <int K>
void accumulate(void** payloads, const float (&a)[16][K], const float (&b)[8][K]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[column][k];
      static_cast<Fragments*>(payloads[lane])->c[i] += sum;
    }
}

template <int KIND>
void multiply_halves(void** payloads) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    auto fragment = static_cast<Fragments*>(payloads[lane]);
    int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = half_of(fragment->a[i], e, KIND);
      for (int i = 0; i < 2; ++i) b[g][2 * t + e + 8 * i] = half_of(fragment->b[i], e, KIND);
    }
  }
  accumulate(payloads, a, b);
}

void multiply_tf32(void** payloads) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    auto fragment = static_cast<Fragments*>(payloads[lane]);
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32_of(fragment->a[i]);
    for (int i = 0; i < 2; ++i) b[g][t + 4 * i] = tf32_of(fragment->b[i]);
  }
  accumulate(payloads, a, b);
}

// Row `r` of a K-major operand under the 128-byte swizzle, 32 bytes, as floats; the number of them.
int swizzled_row(const unsigned char* operand, int r, int kind, float* values) {
  int count = kind == TF32 ? 8 : 16, bytes = 32 / count;
  for (int k = 0; k < count; ++k) {
    auto address = reinterpret_cast<uintptr_t>(operand + 128 * r + bytes * k);
    address ^= (address >> 7 & 7) << 4;
    unsigned word = 0;
    std::memcpy(&word, reinterpret_cast<const void*>(address), bytes);
    values[k] = kind == TF32 ? tf32_of(word) : half_of(word, 0, kind);
  }
  return count;
}

// The rows of both operands are read at this time, or may be.
void watch_operands(const Multiplication& m) {
  watch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(m.a) / 1024 * 1024), 128 * 64, false);
  watch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(m.b) / 1024 * 1024), 128 * m.n, false);
}

void perform(const Multiplication& m) {
  static float b[256][16];
  for (int n = 0; n < m.n; ++n) swizzled_row(m.b, n, m.kind, b[n]);
  for (int row = 0; row < 64; ++row) {
    float a[16];
    int depth = swizzled_row(m.a, row, m.kind, a), warp = row / 16, g = row % 8, h = row % 16 / 8;
    for (int n = 0; n < m.n; ++n) {
      float sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[k] * b[n][k];
      int lane = 32 * warp + 4 * g + n % 8 / 2;
      m.c[lane][4 * (n / 8) + 2 * h + n % 2] += sum;
    }
  }
}

struct Start {
  float* c;
  const void *a, *b;
  int n, kind;
};

WarpGroup& warp_group() { return block.warp_groups[current().number / WARP_GROUP]; }

void check_operand(const void* operand, int rows, const char* name) {
  auto address = reinterpret_cast<uintptr_t>(operand);
  auto first = reinterpret_cast<const unsigned char*>(address / 1024 * 1024);
  auto refuse = [=](const std::string& why) { fail(std::string("wgmma's ") + name + why); };
  if (address % 1024 > 96 || address % 32) refuse(" does not start at a multiple of 1024 bytes, or 32, 64, 96 behind");
  if (!in_shared(first, 128 * rows)) refuse(" is not all in shared memory: " + describe_shared(operand));
  watch(first, 128 * rows, false);
  for (int chunk = 0; chunk < rows * 8; ++chunk)
    if (is_unfenced(first + 16 * chunk))
      refuse(" was written by cp.async without gemmify_fence_proxy_async after the wait");
}

void start_multiplication(void** payloads) {
  const Start& first = *static_cast<Start*>(payloads[0]);
  auto a = static_cast<const unsigned char*>(first.a), b = static_cast<const unsigned char*>(first.b);
  Multiplication m{{}, a, b, first.n, first.kind};
  for (unsigned i = 0; i < WARP_GROUP; ++i) {
    const Start& one = *static_cast<Start*>(payloads[i]);
    if (one.a != first.a || one.b != first.b) fail("wgmma's operands are not the same in all threads");
    m.c[i] = one.c;
  }
  check_operand(first.a, 64, "A");
  check_operand(first.b, first.n, "B");
  warp_group().started.push_back(m);
  // Copies late, products at once: a copy that nobody waited for shows. The reverse: a stage overwritten too early.
  if (!block.copies_at_once) perform(m);
}

void commit(void**) {
  WarpGroup& group = warp_group();
  size_t grouped = 0;
  for (size_t count : group.groups) grouped += count;
  group.groups.push_back(group.started.size() - grouped);
}

void wait(void** payloads) {
  WarpGroup& group = warp_group();
  unsigned left = *static_cast<unsigned*>(payloads[0]);
  if (group.groups.size() <= left) return;
  size_t groups = group.groups.size() - left, count = 0;
  for (size_t i = 0; i < groups; ++i) count += group.groups[i];
  for (size_t i = 0; i < count; ++i) {
    watch_operands(group.started[i]);
    if (block.copies_at_once) perform(group.started[i]);
  }
  group.started.erase(group.started.begin(), group.started.begin() + count);
  group.groups.erase(group.groups.begin(), group.groups.begin() + groups);
}

constexpr unsigned ALL = 0xFFFFFFFFu;

}  // namespace
}  // namespace emulator

using namespace emulator;

extern "C" {

void gemmify_emulator_ldmatrix(unsigned* d, const void* row, int count, int line) {
  if (current().number % WARP < 8u * count) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an address that is no multiple of 16");
    if (!in_shared(row, 16)) fail("ldmatrix from outside of shared memory");
    watch(row, 16, false);
  }
  Load load{d, static_cast<const unsigned char*>(row)};
  auto operation = count == 4 ? load_matrices<4> : load_matrices<2>;
  gemmify_emulator_together(ALL, false, line, "ldmatrix", &load, operation, false);
}

void gemmify_emulator_mma(float* c, const unsigned* a, const unsigned* b, int kind, int line) {
  Fragments fragments{c, a, b};
  auto operation = kind == F16 ? multiply_halves<F16> : kind == BF16 ? multiply_halves<BF16> : multiply_tf32;
  gemmify_emulator_together(ALL, false, line, "mma", &fragments, operation, false);
}

void gemmify_emulator_wgmma(float* c, const void* a, const void* b, int n, int kind, int line) {
  if (!current().wgmma_fenced) fail("wgmma before any wgmma.fence");
  Start start{c, a, b, n, kind};
  gemmify_emulator_together(ALL, true, line, "wgmma", &start, start_multiplication, false);
}

void gemmify_emulator_wgmma_fence() { current().wgmma_fenced = true; }

void gemmify_emulator_wgmma_commit(int line) {
  int nothing = 0;
  gemmify_emulator_together(ALL, true, line, "wgmma.commit_group", &nothing, commit, false);
}

void gemmify_emulator_wgmma_wait(unsigned groups, int line) {
  gemmify_emulator_together(ALL, true, line, "wgmma.wait_group", &groups, wait, false);
}

}  // extern "C"

// What CUDA text made by TVM needs to be compiled by g++ and run by the emulator. Threads are fibers of one OS thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../device_api.h"
#include "vector_types.h"
#include "halves.h"

#define GEMMIFY_EMULATED 1
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static
#define __grid_constant__

#define threadIdx (*gemmify_emulator_thread)
#define blockIdx gemmify_emulator_block
#define blockDim gemmify_emulator_block_size
#define gridDim gemmify_emulator_grid_size
constexpr int warpSize = 32;

// Every call names its line, so that threads that meet at different calls are told apart.
#define __syncthreads() gemmify_emulator_barrier(__LINE__)
#define __syncwarp(...) gemmify_sync_warp(gemmify_mask(__VA_ARGS__), __LINE__)
#define __activemask() 0xFFFFFFFFu
#define __trap() gemmify_emulator_trap("a trap")
#define __shfl_sync(mask, value, lane, ...) \
  gemmify_shuffle(mask, value, GemmifyShuffle::TO, lane, gemmify_width(__VA_ARGS__), __LINE__)
#define __shfl_up_sync(mask, value, delta, ...) \
  gemmify_shuffle(mask, value, GemmifyShuffle::UP, delta, gemmify_width(__VA_ARGS__), __LINE__)
#define __shfl_down_sync(mask, value, delta, ...) \
  gemmify_shuffle(mask, value, GemmifyShuffle::DOWN, delta, gemmify_width(__VA_ARGS__), __LINE__)
#define __shfl_xor_sync(mask, value, lanes, ...) \
  gemmify_shuffle(mask, value, GemmifyShuffle::XOR, lanes, gemmify_width(__VA_ARGS__), __LINE__)

inline int gemmify_width(int width = 32) { return width; }
inline unsigned gemmify_mask(unsigned mask = 0xFFFFFFFFu) { return mask; }

inline void gemmify_sync_warp(unsigned mask, int line) {
  int nothing = 0;
  gemmify_emulator_together(mask, false, line, "__syncwarp", &nothing, [](void**) {}, true);
}

enum class GemmifyShuffle { TO, UP, DOWN, XOR };

// The lane's own value where the source is outside of its group of `width` lanes.
template <typename T>
T gemmify_shuffle(unsigned mask, T value, GemmifyShuffle kind, int by, int width, int line) {
  struct Payload {
    T given, taken;
    GemmifyShuffle kind;
    int by, width;
  } payload{value, value, kind, by, width};
  gemmify_emulator_together(mask, false, line, "a shuffle", &payload, [](void** payloads) {
    for (int lane = 0; lane < 32; ++lane) {
      auto mine = static_cast<Payload*>(payloads[lane]);
      if (mine == nullptr) continue;
      int first = lane / mine->width * mine->width, in_group = lane - first, source = in_group;
      if (mine->kind == GemmifyShuffle::TO) source = mine->by & (mine->width - 1);
      if (mine->kind == GemmifyShuffle::UP) source = in_group - mine->by;
      if (mine->kind == GemmifyShuffle::DOWN) source = in_group + mine->by;
      if (mine->kind == GemmifyShuffle::XOR) source = in_group ^ mine->by;
      if (source < 0 || source >= mine->width) continue;
      auto other = static_cast<Payload*>(payloads[first + source]);
      if (other == nullptr) {  // undefined on a GPU: a value that shows
        std::memset(static_cast<void*>(&mine->taken), 0xFF, sizeof(T));
      } else {
        mine->taken = other->given;
      }
    }
  }, false);
  return payload.taken;
}

template <typename T>
inline T __ldg(const T* pointer) { return *pointer; }

// One fiber runs at a time and switches at barriers alone, so plain code is atomic.
template <typename T, typename V>
__attribute__((noinline, no_sanitize("thread"))) T atomicAdd(T* place, V value) {
  T old = *place;
  *place = old + static_cast<T>(value);
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

#define GEMMIFY_MIN_MAX(type)                                       \
  inline type max(type a, type b) { return a > b ? a : b; }         \
  inline type min(type a, type b) { return a < b ? a : b; }
GEMMIFY_MIN_MAX(int)
GEMMIFY_MIN_MAX(unsigned)
GEMMIFY_MIN_MAX(long)
GEMMIFY_MIN_MAX(unsigned long)
GEMMIFY_MIN_MAX(long long)
GEMMIFY_MIN_MAX(unsigned long long)
#undef GEMMIFY_MIN_MAX
inline float max(float a, float b) { return a > b || b != b ? a : b; }  // a number rather than NaN, as fmaxf
inline float min(float a, float b) { return a < b || b != b ? a : b; }
inline double max(double a, double b) { return a > b || b != b ? a : b; }
inline double min(double a, double b) { return a < b || b != b ? a : b; }

inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __log10f(float x) { return std::log10(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanf(float x) { return std::tan(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline unsigned __float_as_uint(float x) { return gemmify_bits_of_float(x); }
inline int __float_as_int(float x) { return static_cast<int>(gemmify_bits_of_float(x)); }
inline float __uint_as_float(unsigned x) { return gemmify_float_of_bits(x); }
inline float __int_as_float(int x) { return gemmify_float_of_bits(static_cast<unsigned>(x)); }
inline double __longlong_as_double(long long x) {
  double value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<long long>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
#define CUDART_INF_F __builtin_inff()
#define CUDART_INF __builtin_inf()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_NAN __builtin_nan("")
using std::isfinite;
using std::isinf;
using std::isnan;

#include "gemmify_intrinsics.h"

// How the driver calls a kernel: its arguments by address, and their sizes ended by 0.
template <typename... Parameters, std::size_t... I>
inline void gemmify_call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[I])...);
}
template <typename... Parameters>
inline void gemmify_call_kernel(void (*kernel)(Parameters...), void** arguments) {
  gemmify_call(kernel, arguments, std::index_sequence_for<Parameters...>());
}
template <typename... Parameters>
struct GemmifySizes {
  std::size_t values[sizeof...(Parameters) + 1];
};
template <typename... Parameters>
constexpr GemmifySizes<Parameters...> gemmify_sizes(void (*)(Parameters...)) { return {{sizeof(Parameters)..., 0}}; }

#ifdef __SANITIZE_THREAD__
#define GEMMIFY_WATCHED(name) extern "C" __global__ const bool name##__watched = true;
#else
#define GEMMIFY_WATCHED(name)
#endif

#define GEMMIFY_EMULATOR_KERNEL(name, threads)                                                          \
  extern "C" __global__ void name##__entry(void** arguments) { gemmify_call_kernel(name, arguments); }  \
  extern "C" __global__ const auto name##__sizes = gemmify_sizes(name);                                 \
  extern "C" __global__ const unsigned name##__max_threads = threads;                          \
  GEMMIFY_WATCHED(name)

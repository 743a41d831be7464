// half and nv_bfloat16: each operation in float, rounded, which is what the correctly rounded operation gives.
#pragma once

#include <cmath>

#include "numbers.h"

// `Self` is the class, `To` and `From` turn float into its bits and back. Conversions are implicit, as CUDA's are.
#define GEMMIFY_NUMBER(Self, To, From)                                                                   \
  struct Self {                                                                                          \
    unsigned short bits;                                                                                 \
    Self() = default;                                                                                    \
    Self(float value) : bits(To(value)) {}                                                               \
    Self(double value) : bits(To(static_cast<float>(value))) {}                                          \
    Self(int value) : bits(To(static_cast<float>(value))) {}                                             \
    Self(unsigned value) : bits(To(static_cast<float>(value))) {}                                        \
    Self(long value) : bits(To(static_cast<float>(value))) {}                                            \
    Self(unsigned long value) : bits(To(static_cast<float>(value))) {}                                   \
    Self(long long value) : bits(To(static_cast<float>(value))) {}                                       \
    Self(unsigned long long value) : bits(To(static_cast<float>(value))) {}                              \
    Self(short value) : bits(To(static_cast<float>(value))) {}                                           \
    Self(unsigned short value) : bits(To(static_cast<float>(value))) {}                                  \
    operator float() const { return From(bits); }                                                        \
    Self& operator+=(Self b) { return *this = Self(float(*this) + float(b)); }                           \
    Self& operator-=(Self b) { return *this = Self(float(*this) - float(b)); }                           \
    Self& operator*=(Self b) { return *this = Self(float(*this) * float(b)); }                           \
    Self& operator/=(Self b) { return *this = Self(float(*this) / float(b)); }                           \
  };                                                                                                     \
  inline Self operator-(Self a) { return Self(-float(a)); }                                              \
  inline Self operator+(Self a) { return a; }                                                            \
  inline Self operator+(Self a, Self b) { return Self(float(a) + float(b)); }                            \
  inline Self operator-(Self a, Self b) { return Self(float(a) - float(b)); }                            \
  inline Self operator*(Self a, Self b) { return Self(float(a) * float(b)); }                            \
  inline Self operator/(Self a, Self b) { return Self(float(a) / float(b)); }                            \
  inline bool operator==(Self a, Self b) { return float(a) == float(b); }                                \
  inline bool operator!=(Self a, Self b) { return float(a) != float(b); }                                \
  inline bool operator<(Self a, Self b) { return float(a) < float(b); }                                  \
  inline bool operator>(Self a, Self b) { return float(a) > float(b); }                                  \
  inline bool operator<=(Self a, Self b) { return float(a) <= float(b); }                                \
  inline bool operator>=(Self a, Self b) { return float(a) >= float(b); }                                \
  inline bool __heq(Self a, Self b) { return a == b; }                                                   \
  inline bool __hne(Self a, Self b) { return a != b; }                                                   \
  inline bool __hlt(Self a, Self b) { return a < b; }                                                    \
  inline bool __hgt(Self a, Self b) { return a > b; }                                                    \
  inline bool __hle(Self a, Self b) { return a <= b; }                                                   \
  inline bool __hge(Self a, Self b) { return a >= b; }                                                   \
  inline bool __hisnan(Self a) { return a != a; }                                                        \
  inline Self __hadd(Self a, Self b) { return a + b; }                                                   \
  inline Self __hsub(Self a, Self b) { return a - b; }                                                   \
  inline Self __hmul(Self a, Self b) { return a * b; }                                                   \
  inline Self __hdiv(Self a, Self b) { return a / b; }                                                   \
  inline Self __hneg(Self a) { return -a; }                                                              \
  inline Self __hfma(Self a, Self b, Self c) { return Self(std::fma(float(a), float(b), float(c))); }    \
  inline Self __habs(Self a) { return Self(std::fabs(float(a))); }                                       \
  inline Self __hmax(Self a, Self b) { return Self(std::fmax(float(a), float(b))); }                     \
  inline Self __hmin(Self a, Self b) { return Self(std::fmin(float(a), float(b))); }                     \
  inline Self hexp(Self a) { return Self(std::exp(float(a))); }                                          \
  inline Self hexp2(Self a) { return Self(std::exp2(float(a))); }                                        \
  inline Self hexp10(Self a) { return Self(std::pow(10.0f, float(a))); }                                 \
  inline Self hlog(Self a) { return Self(std::log(float(a))); }                                          \
  inline Self hlog2(Self a) { return Self(std::log2(float(a))); }                                        \
  inline Self hlog10(Self a) { return Self(std::log10(float(a))); }                                      \
  inline Self hsqrt(Self a) { return Self(std::sqrt(float(a))); }                                        \
  inline Self hrsqrt(Self a) { return Self(1.0f / std::sqrt(float(a))); }                                \
  inline Self hrcp(Self a) { return Self(1.0f / float(a)); }                                             \
  inline Self hsin(Self a) { return Self(std::sin(float(a))); }                                          \
  inline Self hcos(Self a) { return Self(std::cos(float(a))); }                                          \
  inline Self htanh(Self a) { return Self(std::tanh(float(a))); }                                        \
  inline Self hfloor(Self a) { return Self(std::floor(float(a))); }                                      \
  inline Self hceil(Self a) { return Self(std::ceil(float(a))); }                                        \
  inline Self htrunc(Self a) { return Self(std::trunc(float(a))); }                                      \
  inline Self hrint(Self a) { return Self(std::nearbyint(float(a))); }

GEMMIFY_NUMBER(__nv_bfloat16, gemmify_bfloat16_of_float, gemmify_float_of_bfloat16)

GEMMIFY_NUMBER(__half, gemmify_half_of_float, gemmify_float_of_half)
#undef GEMMIFY_NUMBER

using half = __half;
using nv_bfloat16 = __nv_bfloat16;

template <typename T>
struct alignas(4) GemmifyPair {
  T x, y;
  GemmifyPair() = default;
  GemmifyPair(T x, T y) : x(x), y(y) {}
};
using half2 = GemmifyPair<half>;
using __half2 = half2;
using nv_bfloat162 = GemmifyPair<nv_bfloat16>;
using __nv_bfloat162 = nv_bfloat162;

template <typename T>
inline GemmifyPair<T> __hadd2(GemmifyPair<T> a, GemmifyPair<T> b) { return {a.x + b.x, a.y + b.y}; }
template <typename T>
inline GemmifyPair<T> __hmul2(GemmifyPair<T> a, GemmifyPair<T> b) { return {a.x * b.x, a.y * b.y}; }
template <typename T>
inline GemmifyPair<T> __hfma2(GemmifyPair<T> a, GemmifyPair<T> b, GemmifyPair<T> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

inline half2 make_half2(half x, half y) { return {x, y}; }
inline half __float2half(float value) { return half(value); }
inline half __float2half_rn(float value) { return half(value); }
inline float __half2float(half value) { return float(value); }
inline float2 __half22float2(half2 v) { return {float(v.x), float(v.y)}; }
inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
inline half2 __float22half2_rn(float2 v) { return {half(v.x), half(v.y)}; }
inline half2 __half2half2(half v) { return {v, v}; }
inline nv_bfloat16 __float2bfloat16(float value) { return nv_bfloat16(value); }
inline nv_bfloat16 __float2bfloat16_rn(float value) { return nv_bfloat16(value); }
inline float __bfloat162float(nv_bfloat16 value) { return float(value); }
inline float2 __bfloat1622float2(nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {nv_bfloat16(x), nv_bfloat16(y)}; }
inline nv_bfloat162 __float22bfloat162_rn(float2 v) { return {nv_bfloat16(v.x), nv_bfloat16(v.y)}; }

// float16 and bfloat16 as bits, to and from float, rounding to nearest, ties to even.
#pragma once

#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

static inline float gemmify_float_of_bits(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline unsigned gemmify_bits_of_float(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

#ifdef __F16C__

static inline float gemmify_float_of_half(unsigned short bits) { return _cvtsh_ss(bits); }
static inline unsigned short gemmify_half_of_float(float value) { return _cvtss_sh(value, 0); }

#else

static inline float gemmify_float_of_half(unsigned short bits) {
  unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3FFu;
  if (exponent == 31) return gemmify_float_of_bits(sign | 0x7F800000u | fraction << 13);
  if (exponent == 0) {  // fraction / 2^24, exact
    float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  return gemmify_float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

static inline unsigned short gemmify_half_of_float(float value) {
  unsigned bits = gemmify_bits_of_float(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<unsigned short>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<unsigned short>(sign | 0x7C00u);  // 65520 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: in units of 2^-24, which the addition rounds to
    float shifted = gemmify_float_of_bits(magnitude) + 0.5f;
    return static_cast<unsigned short>(sign | (gemmify_bits_of_float(shifted) - 0x3F000000u));
  }
  unsigned rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
  return static_cast<unsigned short>(sign | (rounded - 0x38000000u) >> 13);
}

#endif

static inline float gemmify_float_of_bfloat16(unsigned short bits) {
  return gemmify_float_of_bits(static_cast<unsigned>(bits) << 16);
}

static inline unsigned short gemmify_bfloat16_of_float(float value) {
  unsigned bits = gemmify_bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<unsigned short>(bits >> 16 | 0x40u);
  return static_cast<unsigned short>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

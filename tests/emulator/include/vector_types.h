// CUDA's vector types: members x, y, z, w and make_*, aligned as on a GPU.
#pragma once

#define GEMMIFY_VECTORS(name, type, align2, align4)                                                      \
  struct name##1 { type x; };                                                                            \
  struct alignas(align2) name##2 { type x, y; };                                                         \
  struct name##3 { type x, y, z; };                                                                      \
  struct alignas(align4) name##4 { type x, y, z, w; };                                                   \
  inline name##1 make_##name##1(type x) { return {x}; }                                                  \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                       \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

GEMMIFY_VECTORS(char, signed char, 2, 4)
GEMMIFY_VECTORS(uchar, unsigned char, 2, 4)
GEMMIFY_VECTORS(short, short, 4, 8)
GEMMIFY_VECTORS(ushort, unsigned short, 4, 8)
GEMMIFY_VECTORS(int, int, 8, 16)
GEMMIFY_VECTORS(uint, unsigned, 8, 16)
GEMMIFY_VECTORS(long, long, 16, 16)
GEMMIFY_VECTORS(ulong, unsigned long, 16, 16)
GEMMIFY_VECTORS(longlong, long long, 16, 16)
GEMMIFY_VECTORS(ulonglong, unsigned long long, 16, 16)
GEMMIFY_VECTORS(float, float, 8, 16)
GEMMIFY_VECTORS(double, double, 16, 16)
#undef GEMMIFY_VECTORS

struct dim3 {
  unsigned x, y, z;
};

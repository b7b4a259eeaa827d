// sigmoid and tanh of vectors. float32: polynomial and exponent bits (Cephes), within 2 units in the last place;
// float64: the C library, number by number.
#pragma once

#include <cape/isa/tile.h>

namespace cape {
namespace CAPE_ISA {

template <typename scalar>
struct Activations {
  using T = Tile<scalar>;
  typedef typename T::Vector Vector;

  static CAPE_INLINE Vector sigmoid(Vector x) {
    for (int q = 0; q < T::kWidth; ++q) x[q] = 1.0 / (1.0 + __builtin_exp(-x[q]));
    return x;
  }
  static CAPE_INLINE Vector tanh(Vector x) {
    for (int q = 0; q < T::kWidth; ++q) x[q] = __builtin_tanh(x[q]);
    return x;
  }
};

template <>
struct Activations<float> {
  using T = Tile<float>;
  typedef T::Vector Vector;
  typedef int32_t Bits __attribute__((vector_size(CAPE_VECTOR_BYTES)));
  typedef float Plain __attribute__((vector_size(CAPE_VECTOR_BYTES)));

  static CAPE_INLINE Plain exp(Plain x) {
    const Plain low = Plain{} - 87.0f, high = Plain{} + 88.0f;
    x = x < low ? low : x;  // a NaN compares false and stays
    x = x > high ? high : x;
    const Plain magic = Plain{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Plain n = (x * 1.44269504088896341f + magic) - magic;
    const Plain r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Plain p = Plain{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Bits power = (__builtin_convertvector(n, Bits) + 127) << 23;
    return p * (Plain)power;
  }

  static CAPE_INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exp(-(Plain)x)); }

  static CAPE_INLINE Vector tanh(Vector value) {
    const Plain x = value, zero = {}, size = x < zero ? -x : x;
    const Plain far = 1.0f - 2.0f / (exp(2.0f * size) + 1.0f);
    const Plain z = x * x;
    Plain p = zero - 5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const Plain near = p * z * x + x;
    const Plain signed_far = x < zero ? -far : far;
    return size < (zero + 0.625f) ? near : signed_far;
  }
};

}  // namespace CAPE_ISA
}  // namespace cape

// Sums over a run of numbers, in float64.
#pragma once

#include <cape/isa/tile.h>

namespace cape {
namespace CAPE_ISA {

// out[0] = sum |x|, out[1] = sum x^2. Four vectors of float64 sums each, in a fixed order: repeatable bit for bit.
template <typename scalar>
void size_sums(const scalar* x, int64_t n, double* out) {
  using Wide = typename Tile<scalar>::Wide;
  constexpr int kLanes = CAPE_VECTOR_BYTES / int(sizeof(double)), kSums = 4;
  typedef scalar Part __attribute__((vector_size(kLanes * sizeof(scalar)), aligned(sizeof(scalar)), may_alias));
  Wide sizes[kSums] = {}, squares[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
    for (int q = 0; q < kSums; ++q) {
      const Wide value = __builtin_convertvector(*reinterpret_cast<const Part*>(x + i + q * kLanes), Wide);
      sizes[q] += value < 0.0 ? -value : value;
      squares[q] += value * value;
    }
  }
  out[0] = Tile<scalar>::sum((sizes[0] + sizes[1]) + (sizes[2] + sizes[3]));
  out[1] = Tile<scalar>::sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) {
    const double value = double(x[i]);
    out[0] += value < 0.0 ? -value : value;
    out[1] += value * value;
  }
}

}  // namespace CAPE_ISA
}  // namespace cape

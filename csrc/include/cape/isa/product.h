// Rows times a matrix that is packed once and used many times (the recurrent weights, step after step).
#pragma once

#include <cape/isa/tile.h>

namespace cape {
namespace CAPE_ISA {

// w(k, n) at w[k * k_step + n * n_step], k < depth, n < columns, as panels [block of kCols columns][depth][kCols].
template <typename scalar>
void pack_matrix(const scalar* w, int64_t k_step, int64_t n_step, int64_t depth, int64_t columns, scalar* panels) {
  using T = Tile<scalar>;
  for (int64_t j = 0; j < columns; j += T::kCols) {
    T::pack(w + j * n_step, k_step, n_step, depth, least(T::kCols, columns - j), T::kCols, panels + j * depth);
  }
}

// out[i, n] = add[i, n] + sum_k a[i, k] w(k, n) for `rows` rows; rows of a, add and out are `*_row` numbers apart.
// scratch: round_up(rows, kWidth) * depth numbers and depth offsets.
template <typename scalar>
void multiply_rows(const scalar* a, int64_t a_row, int64_t rows, int64_t depth, const scalar* panels, int64_t columns,
                   const scalar* add, int64_t add_row, scalar* out, int64_t out_row, Scratch<scalar> scratch) {
  using T = Tile<scalar>;
  scalar* packed = scratch.values;  // [block of kWidth rows][depth][kWidth]
  int64_t* offset = scratch.offsets;
  for (int64_t k = 0; k < depth; ++k) offset[k] = k * T::kWidth;
  for (int64_t i = 0; i < rows; i += T::kWidth) {
    T::pack(a + i * a_row, 1, a_row, depth, least(T::kWidth, rows - i), T::kWidth, packed + i * depth);
  }
  alignas(64) scalar c[T::kRows * T::kCols];
  for (int64_t j = 0; j < columns; j += T::kCols) {
    const int64_t count = least(T::kCols, columns - j);
    const int v = count > T::kWidth ? 2 : 1, width = v * T::kWidth;
    for (int64_t i = 0; i < rows; i += T::kRows) {
      const int r = T::cover(least(T::kRows, rows - i));
      const scalar* left = packed + i / T::kWidth * T::kWidth * depth + i % T::kWidth;
      T::multiply(r, v, left, offset, panels + j * depth, T::kCols, depth, c);
      for (int64_t q = 0; q < least(r, rows - i); ++q) {
        const scalar* from = add + (i + q) * add_row + j;
        scalar* to = out + (i + q) * out_row + j;
        for (int64_t n = 0; n < count; ++n) to[n] = from[n] + c[q * width + n];
      }
    }
  }
}

}  // namespace CAPE_ISA
}  // namespace cape

// || A^T G_k ||_F^2 (and biases) of one sample for K cotangents that share A. Direct form: tiles of A^T G, squared in
// place. Gram form: tiles of A A^T, kept, against those of every G_k G_k^T; only tiles that touch the lower triangle
// exist.
#pragma once

#include <cape/isa/tile.h>
#include <cape/shapes.h>

namespace cape {
namespace CAPE_ISA {

// One row block of the lower triangle: the tiles of rows [row, row + r) cover the columns [0, row + r).
template <typename scalar>
inline int tile_columns(int64_t row, int r, int64_t column) {
  return row + r - column > Tile<scalar>::kWidth ? 2 : 1;
}

// Weigh a tile of a symmetric matrix, [r, width] at (row, column): below the diagonal twice, on it once, above not.
template <typename scalar>
void weigh_triangle(scalar* c, int64_t row, int r, int64_t column, int width) {
  if (column + width <= row) {
    for (int e = 0; e < r * width; ++e) c[e] += c[e];
    return;
  }
  for (int i = 0; i < r; ++i) {
    for (int j = 0; j < width; ++j) {
      scalar& value = c[i * width + j];
      value = column + j < row + i ? value + value : column + j == row + i ? value : scalar(0);
    }
  }
}

template <typename scalar>
void linear_direct(const LinearShape& s, Strided<scalar> a, Strided<scalar> g, int64_t g_step, Scratch<scalar> scratch,
                   double* total) {
  using T = Tile<scalar>;
  scalar* panels = scratch.values;  // [block of kRows features][t][kRows]
  scalar* right = panels + round_up(s.d, T::kRows) * s.t;
  int64_t* offset = scratch.offsets;
  for (int64_t x = 0; x < s.t; ++x) offset[x] = x * T::kRows;
  for (int64_t i = 0; i < s.d; i += T::kRows) {
    T::pack(a.data + i * a.col, a.row, a.col, s.t, least(T::kRows, s.d - i), T::kRows, panels + i * s.t);
  }
  alignas(64) scalar c[T::kRows * T::kCols];
  for (int64_t k = 0; k < s.cotangents; ++k) {
    double sum = 0.0;
    for (int64_t j = 0; j < s.p; j += T::kCols) {
      const int64_t count = least(T::kCols, s.p - j);
      const int v = count > T::kWidth ? 2 : 1, width = v * T::kWidth;
      T::pack(g.data + k * g_step + j * g.col, g.row, g.col, s.t, count, width, right);
      for (int64_t i = 0; i < s.d; i += T::kRows) {
        const int r = T::cover(least(T::kRows, s.d - i));
        T::multiply(r, v, panels + i * s.t, offset, right, width, s.t, c);
        sum += T::dot(c, c, r * width);
      }
      if (s.biases) {
        for (int q = 0; q < v; ++q) {
          typename T::Vector column = {};
          for (int64_t start = 0; start < s.t; start += 32) {  // two levels: rounding grows with neither
            typename T::Vector part = {};
            for (int64_t x = start; x < least(s.t, start + 32); ++x) part += T::load(right + x * width + q * T::kWidth);
            column += part;
          }
          T::store(c + q * T::kWidth, column);
        }
        sum += double(s.biases) * T::dot(c, c, width);
      }
    }
    total[k] = sum;
  }
}

template <typename scalar>
void linear_gram(const LinearShape& s, Strided<scalar> a, Strided<scalar> g, int64_t g_step, Scratch<scalar> scratch,
                 double* total) {
  using T = Tile<scalar>;
  const int64_t columns = round_up(s.t, T::kCols), deepest = s.d > s.p ? s.d : s.p;
  scalar* panels = scratch.values;            // [block of kCols positions][feature][kCols]
  scalar* kept = panels + columns * deepest;  // the tiles of A A^T, weighed, one after the other
  int64_t* offset = scratch.offsets;
  alignas(64) scalar e[T::kRows * T::kCols];
  // One position behind full panels (a class token before 64 patches) is not worth a panel of its own.
  const bool single = s.t > T::kCols && s.t % T::kCols == 1;
  const int64_t packed = s.t - single;

  // Visit the tiles of one operand's Gram matrix in a fixed order; `take(tile values, row, r, column, width)`.
  const auto visit = [&](Strided<scalar> m, int64_t depth, auto take, scalar* into, bool advance) {
    for (int64_t j = 0; j < packed; j += T::kCols) {
      T::pack(m.data + j * m.row, m.col, m.row, depth, least(T::kCols, packed - j), T::kCols, panels + j * depth);
    }
    for (int64_t x = 0; x < depth; ++x) offset[x] = x * T::kCols;
    for (int64_t row = 0; row < packed;) {
      const int r = T::fill(s.t - row);
      for (int64_t column = 0; column < row + r; column += T::kCols) {
        const int v = tile_columns<scalar>(row, r, column), width = v * T::kWidth;
        // Rows are read from the same panels: positions lie side by side there, whatever the strides.
        const scalar* left = panels + row / T::kCols * T::kCols * depth + row % T::kCols;
        T::multiply(r, v, left, offset, panels + column * depth, T::kCols, depth, into);
        take(into, row, r, column, width);
        if (advance) into += r * width;
      }
      row += r;
    }
    if (!single) return;
    const scalar* last = m.data + packed * m.row;
    for (int64_t column = 0; column < packed; column += T::kCols) {
      T::row(last, m.col, panels + column * depth, depth, into);
      take(into, packed, 1, column, T::kCols);
      if (advance) into += T::kCols;
    }
    for (int j = 0; j < T::kWidth; ++j) into[j] = scalar(0);
    into[0] = T::square(last, m.col, depth);
    take(into, packed, 1, packed, T::kWidth);
  };

  visit(
      a, s.d,
      [&](scalar* tile, int64_t row, int r, int64_t column, int width) {
        if (s.biases) {  // a bias is one more feature, always one
          for (int x = 0; x < r * width; ++x) tile[x] += scalar(s.biases);
        }
        weigh_triangle(tile, row, r, column, width);
      },
      kept, true);
  for (int64_t k = 0; k < s.cotangents; ++k) {
    double sum = 0.0;
    const scalar* tile = kept;
    visit(
        {g.data + k * g_step, g.row, g.col}, s.p,
        [&](scalar* other, int64_t, int r, int64_t, int width) {
          sum += T::dot(tile, other, r * width);
          tile += r * width;
        },
        e, false);
    total[k] = sum > 0.0 || sum != sum ? sum : 0.0;  // rounding of a vanishing sum must not turn it negative
  }
}

}  // namespace CAPE_ISA
}  // namespace cape

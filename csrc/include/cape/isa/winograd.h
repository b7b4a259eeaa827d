// Winograd's F(3x3, 2x2) for the weight gradient of a 3x3 convolution of stride 1: 16 products per 2x2 block of output
// gradients and its 4x4 window instead of 36. dW = A^T [ sum over blocks of (B^T x B) . (G g G^T) ] A.
#pragma once

#include <cape/isa/conv.h>

namespace cape {
namespace CAPE_ISA {

// dst[(4 i + j) * step] = B^T x B for the window whose pixel (i, j) is at x + i * row + j * pixel.
template <typename scalar>
CAPE_INLINE void winograd_input(const scalar* x, int64_t row, int64_t pixel, scalar* dst, int64_t step) {
  using T = Tile<scalar>;
  typename T::Vector v[4][4];
  for (int j = 0; j < 4; ++j) {
    typename T::Vector d[4];
    for (int i = 0; i < 4; ++i) d[i] = T::load(x + i * row + j * pixel);
    v[0][j] = d[0] - d[2], v[1][j] = d[1] + d[2], v[2][j] = d[2] - d[1], v[3][j] = d[3] - d[1];
  }
  for (int i = 0; i < 4; ++i) {
    T::store(dst + (4 * i + 0) * step, v[i][0] - v[i][2]);
    T::store(dst + (4 * i + 1) * step, v[i][1] + v[i][2]);
    T::store(dst + (4 * i + 2) * step, v[i][2] - v[i][1]);
    T::store(dst + (4 * i + 3) * step, v[i][3] - v[i][1]);
  }
}

// dst[(4 i + j) * step] = G g G^T for a 2x2 block; a missing row or column is zero.
template <typename scalar>
CAPE_INLINE void winograd_gradient(const scalar* g, int64_t row, int64_t pixel, bool second_row, bool second_column,
                                   scalar* dst, int64_t step) {
  using T = Tile<scalar>;
  const scalar half = scalar(0.5);
  const typename T::Vector zero = {};
  const typename T::Vector a = T::load(g), b = second_column ? T::load(g + pixel) : zero;
  const typename T::Vector c = second_row ? T::load(g + row) : zero;
  const typename T::Vector d = second_row && second_column ? T::load(g + row + pixel) : zero;
  const typename T::Vector left[4] = {a, half * (a + c), half * (a - c), c};
  const typename T::Vector right[4] = {b, half * (b + d), half * (b - d), d};
  for (int i = 0; i < 4; ++i) {
    T::store(dst + (4 * i + 0) * step, left[i]);
    T::store(dst + (4 * i + 1) * step, half * (left[i] + right[i]));
    T::store(dst + (4 * i + 2) * step, half * (left[i] - right[i]));
    T::store(dst + (4 * i + 3) * step, right[i]);
  }
}

// Sum of squares of A^T M A over n positions; M_f at m + f * step. Again with `wide` squares where those of `scalar`
// overflow or vanish.
template <typename scalar, bool wide = false>
double winograd_squares(const scalar* m, int64_t step, int64_t n) {
  using T = Tile<scalar>;
  double sums[T::kWidth] = {};
  for (int64_t e = 0; e < n; e += T::kWidth) {
    typename T::Vector v[3][4], acc = {};
    for (int j = 0; j < 4; ++j) {
      typename T::Vector d[4];
      for (int i = 0; i < 4; ++i) d[i] = T::load(m + (4 * i + j) * step + e);
      const typename T::Vector both = d[1] + d[2];
      v[0][j] = d[0] + both, v[1][j] = d[1] - d[2], v[2][j] = both + d[3];
    }
    for (int i = 0; i < 3; ++i) {
      const typename T::Vector both = v[i][1] + v[i][2];
      const typename T::Vector y0 = v[i][0] + both, y1 = v[i][1] - v[i][2], y2 = both + v[i][3];
      if constexpr (wide) {
        const typename T::Vector ys[] = {y0, y1, y2};
        for (const typename T::Vector& y : ys) {
          for (int q = 0; q < T::kWidth; ++q) sums[q] += double(y[q]) * double(y[q]);
        }
      } else {
        acc += y0 * y0 + y1 * y1 + y2 * y2;
      }
    }
    for (int q = 0; q < T::kWidth; ++q) sums[q] += double(acc[q]);
  }
  double total = 0.0;
  for (int q = 0; q < T::kWidth; ++q) total += sums[q];
  if constexpr (!wide) {
    if (!T::in_range(total)) return winograd_squares<scalar, true>(m, step, n);
  }
  return total;
}

template <typename scalar>
void conv_winograd(const ConvShape& s, const scalar* x, const scalar* g, int64_t g_step, Scratch<scalar> scratch,
                   double* total) {
  using T = Tile<scalar>;
  const int64_t c = s.group_channels(), p = s.group_outputs(), blocks = (c + T::kWidth - 1) / T::kWidth;
  const int64_t down = winograd_tiles(s.out[1]), across = winograd_tiles(s.out[2]), n = down * across;
  const int64_t p1 = 2 * down + 2, p2 = 2 * across + 2, t = s.positions();
  scalar* image = scratch.values;                         // [p1, p2, kWidth]
  scalar* inputs = image + p1 * p2 * T::kWidth;           // [block][16][n][kWidth]
  scalar* packed = inputs + 16 * n * blocks * T::kWidth;  // [t][kCols]
  scalar* right = packed + 4 * n * T::kCols;              // [16][n][kCols]
  scalar* products = right + 16 * n * T::kCols;           // [16][kRows * kCols]
  int64_t* offset = scratch.offsets;
  for (int64_t k = 0; k < n; ++k) offset[k] = k * T::kWidth;
  for (int64_t group = 0; group < s.groups; ++group) {
    for (int64_t b = 0; b < blocks; ++b) {
      blocked_images(s, x, group * c + b * T::kWidth, least(T::kWidth, c - b * T::kWidth), 1, p1, p2, image);
      scalar* to = inputs + b * 16 * n * T::kWidth;
      for (int64_t i = 0; i < down; ++i)
        for (int64_t j = 0; j < across; ++j, to += T::kWidth)
          winograd_input(image + (2 * i * p2 + 2 * j) * T::kWidth, p2 * T::kWidth, T::kWidth, to, n * T::kWidth);
    }
    for (int64_t k = 0; k < s.cotangents; ++k) {
      double sum = 0.0;
      for (int64_t o = 0; o < p; o += T::kCols) {
        const int64_t count = least(T::kCols, p - o);
        const int v = count > T::kWidth ? 2 : 1, width = v * T::kWidth;
        T::pack(g + k * g_step + (group * p + o) * t, 1, t, t, count, width, packed);
        scalar* to = right;
        for (int64_t i = 0; i < down; ++i)
          for (int64_t j = 0; j < across; ++j, to += width) {
            const bool second_row = 2 * i + 1 < s.out[1], second_column = 2 * j + 1 < s.out[2];
            const scalar* from = packed + (2 * i * s.out[2] + 2 * j) * width;
            for (int q = 0; q < v; ++q) {
              winograd_gradient(from + q * T::kWidth, s.out[2] * width, width, second_row, second_column,
                                to + q * T::kWidth, n * width);
            }
          }
        for (int64_t i = 0; i < c; i += T::kRows) {
          const int r = T::cover(least(T::kRows, c - i));
          const scalar* left = inputs + i / T::kWidth * 16 * n * T::kWidth + i % T::kWidth;
          for (int64_t f = 0; f < 16; ++f) {
            T::multiply(r, v, left + f * n * T::kWidth, offset, right + f * n * width, width, n,
                        products + f * T::kRows * T::kCols);
          }
          sum += winograd_squares(products, T::kRows * T::kCols, r * width);
        }
      }
      total[k] += sum;
    }
  }
}

}  // namespace CAPE_ISA
}  // namespace cape

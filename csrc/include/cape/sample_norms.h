// || A^T G ||_F^2 of one sample of a linear map or of one group of a convolution, out of register tiles. No torch.
//
// Direct form: G is packed into column panels once; every kRows columns of A meet every panel. Gram form: positions
// become columns of two dense matrices, and only tiles that touch the lower triangle are computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <cape/tiles.h>

namespace cape {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Grown, never shrunk, per thread: no allocation per sample once the largest layer has been seen.
template <typename scalar>
struct Scratch {
  std::vector<scalar> a, g;
  std::vector<int64_t> a_offset, g_offset;
  scalar* grow(std::vector<scalar>& v, int64_t n) {
    if (int64_t(v.size()) < n) v.resize(size_t(n));
    return v.data();
  }
  const int64_t* steps(std::vector<int64_t>& v, int64_t n, int64_t stride) {
    v.resize(size_t(n));
    for (int64_t k = 0; k < n; ++k) v[size_t(k)] = k * stride;
    return v.data();
  }
};

// dst[k * width + c] = src[k * k_stride + c * c_stride] for c < count, zero up to width. Blocked: either side may be
// the one that is contiguous.
template <typename scalar>
void pack(const scalar* src, int64_t k_stride, int64_t c_stride, int64_t depth, int64_t count, int64_t width,
          scalar* dst) {
  constexpr int64_t kBlock = 16;
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
    const int64_t k1 = std::min(depth, k0 + kBlock);
    if (c_stride == 1) {
      for (int64_t k = k0; k < k1; ++k) std::copy(src + k * k_stride, src + k * k_stride + count, dst + k * width);
    } else {
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t k = k0; k < k1; ++k) dst[k * width + c] = src[k * k_stride + c * c_stride];
      }
    }
    if (count < width) {
      for (int64_t k = k0; k < k1; ++k) std::fill(dst + k * width + count, dst + (k + 1) * width, scalar(0));
    }
  }
}

// Pack G [t, p] (any strides) into panels [panel][t][cols].
template <typename scalar>
void pack_panels(const scalar* g, int64_t t_stride, int64_t p_stride, int64_t t, int64_t p, int64_t cols, scalar* dst) {
  for (int64_t j = 0; j < p; j += cols) {
    pack(g + j * p_stride, t_stride, p_stride, t, std::min(cols, p - j), cols, dst + (j / cols) * t * cols);
  }
}

// Sum of squares of A^T G for columns [0, d_padded) of A, whose row k starts at a + offset[k]; d_padded is a multiple
// of the tile's rows and the padding columns are zero.
template <typename scalar>
double direct_squares(const Tiles<scalar>& tile, const scalar* a, const int64_t* offset, int64_t d_padded,
                      const scalar* panels, int64_t t, int64_t p) {
  double total = 0.0;
  for (int64_t i = 0; i < d_padded; i += tile.rows) {
    for (int64_t j = 0; j < p; j += tile.cols) {
      total += tile.squares(a + i, offset, panels + (j / tile.cols) * t * tile.cols, tile.cols, t);
    }
  }
  return total;
}

// Sum over positions of (X^T X) o (G^T G) for x [dx, ld], g [dg, ld] with one position per column (t of them; columns
// up to ld are zero; ld is a multiple of the tile's columns and of its rows).
template <typename scalar>
double gram_squares(const Tiles<scalar>& tile, Scratch<scalar>& scratch, const scalar* x, int64_t dx, const scalar* g,
                    int64_t dg, int64_t ld, int64_t t) {
  const int64_t* x_offset = scratch.steps(scratch.a_offset, dx, ld);
  const int64_t* g_offset = scratch.steps(scratch.g_offset, dg, ld);
  double total = 0.0;
  for (int64_t i = 0; i < t; i += tile.rows) {
    for (int64_t j = 0; j < t && j < i + tile.rows; j += tile.cols) {
      total += tile.gram(x, x_offset, dx, g, g_offset, dg, ld, i, j);
    }
  }
  return std::max(total, 0.0);
}

// Columns that the Gram form needs: a multiple of both tile sides, so that no tile reads past a row.
template <typename scalar>
int64_t gram_stride(const Tiles<scalar>& tile, int64_t t) {
  return std::max(round_up(t, tile.rows), round_up(t, tile.cols));
}

}  // namespace cape

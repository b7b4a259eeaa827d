// One register tile of a product, reduced in place: what the direct and the Gram form are made of. No torch.
//
// A tile is the kRows x kCols block  C[i][j] = sum_k a[offset[k] + i] * b[k * ldb + j].  It never leaves the registers
// unreduced: `squares` gives sum C^2 (direct form, k runs over positions), `gram` gives sum C * D over the lower
// triangle of two such tiles (k runs over features, i and j over positions). The offsets make a convolution's windows
// readable in place, with no unfolded copy.
//
// This header is compiled once per instruction set, in a namespace of its own (CAPE_ISA), by translation units that
// include nothing of the standard library that could be shared between them.
#include <cstdint>

namespace cape {
namespace CAPE_ISA {

template <typename scalar>
struct Tile {
  static constexpr int kWidth = CAPE_VECTOR_BYTES / int(sizeof(scalar));
  static constexpr int kVectors = 2;
  static constexpr int kRows = CAPE_TILE_ROWS;
  static constexpr int kCols = kVectors * kWidth;
  typedef scalar Vector __attribute__((vector_size(CAPE_VECTOR_BYTES), aligned(sizeof(scalar)), may_alias));

  static inline __attribute__((always_inline)) void product(const scalar* a, const int64_t* offset, const scalar* b,
                                                            int64_t ldb, int64_t depth, scalar* c) {
    Vector acc[kRows][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const scalar* row = a + offset[k];
      Vector right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + k * ldb + v * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) acc[i][v] += row[i] * right[v];
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(c + i * kCols + v * kWidth) = acc[i][v];
    }
  }

  static double squares(const scalar* a, const int64_t* offset, const scalar* b, int64_t ldb, int64_t depth) {
    scalar c[kRows * kCols];
    product(a, offset, b, ldb, depth, c);
    double sums[8] = {};
    for (int e = 0; e < kRows * kCols; e += 8) {
      for (int q = 0; q < 8; ++q) sums[q] += double(c[e + q]) * double(c[e + q]);
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  }

  // x [dx, ld] and g [dg, ld] hold one position per column; the tile's corner is (i0, j0).
  static double gram(const scalar* x, const int64_t* x_offset, int64_t dx, const scalar* g, const int64_t* g_offset,
                     int64_t dg, int64_t ld, int64_t i0, int64_t j0) {
    scalar c[kRows * kCols], e[kRows * kCols];
    product(x + i0, x_offset, x + j0, ld, dx, c);
    product(g + i0, g_offset, g + j0, ld, dg, e);
    double total = 0.0;
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kCols; ++j) {
        const double weight = i0 + i > j0 + j ? 2.0 : (i0 + i == j0 + j ? 1.0 : 0.0);
        total += weight * (double(c[i * kCols + j]) * double(e[i * kCols + j]));
      }
    }
    return total;
  }
};

}  // namespace CAPE_ISA
}  // namespace cape

// Register tiles: what every product of the probe is made of. No torch, nothing of the standard library.
//
// Everything under isa/ is compiled once per instruction set, in a namespace of its own (CAPE_ISA), by cpu/isa_*.cpp;
// those files must not instantiate templates of the standard library, which the linker could share between them.
#pragma once

#include <cape/shapes.h>

namespace cape {
namespace CAPE_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <typename scalar>
struct Tile {
  static constexpr int kWidth = CAPE_VECTOR_BYTES / int(sizeof(scalar));
  // Rows of the largest tile: 2, 4 or 8, and no more than the channels of a blocked image (windows.h).
  static constexpr int kRows = CAPE_TILE_ROWS < kWidth ? CAPE_TILE_ROWS : kWidth;
  static constexpr int kCols = 2 * kWidth;
  typedef scalar Vector __attribute__((vector_size(CAPE_VECTOR_BYTES), aligned(sizeof(scalar)), may_alias));

  static CAPE_INLINE Vector load(const scalar* p) { return *reinterpret_cast<const Vector*>(p); }
  static CAPE_INLINE void store(scalar* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

  // Float64 sums of a vector's lanes, pair by pair, and the sum of those.
  typedef double Wide __attribute__((vector_size(CAPE_VECTOR_BYTES)));
  static CAPE_INLINE Wide widen(Vector v) {
    constexpr int kLanes = CAPE_VECTOR_BYTES / int(sizeof(double));
    Wide sums = {};
    if constexpr (sizeof(scalar) == sizeof(double)) {
      __builtin_memcpy(&sums, &v, sizeof(sums));
    } else {
      typedef scalar Half __attribute__((vector_size(kLanes * sizeof(scalar))));
      Half halves[kWidth / kLanes];
      __builtin_memcpy(halves, &v, sizeof(v));
      for (const Half& half : halves) sums += __builtin_convertvector(half, Wide);
    }
    return sums;
  }
  static CAPE_INLINE double sum(Wide v) {
    constexpr int kLanes = CAPE_VECTOR_BYTES / int(sizeof(double));
    double lanes[kLanes];
    __builtin_memcpy(lanes, &v, sizeof(v));
    for (int n = kLanes / 2; n > 0; n /= 2) {
      for (int q = 0; q < n; ++q) lanes[q] += lanes[q + n];
    }
    return lanes[0];
  }

  // c[i * v * kWidth + j] = sum_k a[offset[k] + i] * b[k * ldb + j] for i < r, j < v * kWidth.
  template <int r, int v>
  static void product(const scalar* a, const int64_t* offset, const scalar* b, int64_t ldb, int64_t depth, scalar* c) {
    Vector acc[r][v] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const scalar* row = a + offset[k];
      Vector right[v];
      for (int q = 0; q < v; ++q) right[q] = load(b + k * ldb + q * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < r; ++i) {
        for (int q = 0; q < v; ++q) acc[i][q] += row[i] * right[q];
      }
    }
    for (int i = 0; i < r; ++i) {
      for (int q = 0; q < v; ++q) store(c + (i * v + q) * kWidth, acc[i][q]);
    }
  }

  static CAPE_INLINE void multiply(int r, int v, const scalar* a, const int64_t* offset, const scalar* b, int64_t ldb,
                                   int64_t depth, scalar* c) {
    if (v == 2) {
      if (r == kRows) return product<kRows, 2>(a, offset, b, ldb, depth, c);
      if (r == 4) return product<4, 2>(a, offset, b, ldb, depth, c);
      if (r == 2) return product<2, 2>(a, offset, b, ldb, depth, c);
      return product<1, 2>(a, offset, b, ldb, depth, c);
    }
    if (r == kRows) return product<kRows, 1>(a, offset, b, ldb, depth, c);
    if (r == 4) return product<4, 1>(a, offset, b, ldb, depth, c);
    if (r == 2) return product<2, 1>(a, offset, b, ldb, depth, c);
    return product<1, 1>(a, offset, b, ldb, depth, c);
  }

  // c[j] = sum_k a[k * step] * b[k * kCols + j] for j < kCols; four sums of each hide the latency.
  static CAPE_INLINE void row(const scalar* a, int64_t step, const scalar* b, int64_t depth, scalar* c) {
    Vector acc[4][2] = {};
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        for (int q = 0; q < 2; ++q) acc[i][q] += a[(k + i) * step] * load(b + (k + i) * kCols + q * kWidth);
      }
    }
    for (; k < depth; ++k) {
      for (int q = 0; q < 2; ++q) acc[0][q] += a[k * step] * load(b + k * kCols + q * kWidth);
    }
    for (int q = 0; q < 2; ++q) store(c + q * kWidth, (acc[0][q] + acc[1][q]) + (acc[2][q] + acc[3][q]));
  }

  // The sum of a[k * step]^2, in float64 until the end.
  static CAPE_INLINE scalar square(const scalar* a, int64_t step, int64_t depth) {
    double sums[8] = {};
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) {
      for (int i = 0; i < 8; ++i) sums[i] += double(a[(k + i) * step]) * double(a[(k + i) * step]);
    }
    for (; k < depth; ++k) sums[0] += double(a[k * step]) * double(a[k * step]);
    return scalar(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
  }

  // The smallest tile height that holds n rows, and the largest that n rows fill.
  static int cover(int64_t n) { return n >= kRows ? kRows : n > 4 ? 8 : n > 2 ? 4 : int(n); }
  static int fill(int64_t n) { return n >= kRows ? kRows : n >= 4 ? 4 : n >= 2 ? 2 : 1; }

  // Whether a sum of products of `scalar` is far from where single products overflow or vanish.
  static CAPE_INLINE bool in_range(double sum) {
    const double size = sum < 0.0 ? -sum : sum;
    return sizeof(scalar) == sizeof(double) || (size > 1e-28 && size < 1e300);
  }

  // Sums of products over n numbers (a multiple of kWidth): up to eight terms in the tile's precision, then float64.
  static double dot(const scalar* c, const scalar* e, int64_t n) {
    double sums[kWidth] = {};
    for (int64_t start = 0; start < n; start += 8 * kWidth) {
      const int64_t end = least(n, start + 8 * kWidth);
      Vector acc = {};
      for (int64_t at = start; at < end; at += kWidth) acc += load(c + at) * load(e + at);
      for (int q = 0; q < kWidth; ++q) sums[q] += double(acc[q]);
    }
    double total = 0.0;
    for (int q = 0; q < kWidth; ++q) total += sums[q];
    return total;
  }

  // dst[c * ld_dst + r] = src[r * ld_src + c] for r < rows, c < cols.
  static void transpose(const scalar* src, int64_t ld_src, int64_t rows, int64_t cols, scalar* dst, int64_t ld_dst) {
    int64_t r = 0;
#if CAPE_VECTOR_BYTES == 64
    for (; r + kWidth <= rows; r += kWidth) {
      int64_t c = 0;
      for (; c + kWidth <= cols; c += kWidth)
        transpose_block(src + r * ld_src + c, ld_src, dst + c * ld_dst + r, ld_dst);
      for (; c < cols; ++c) {
        for (int q = 0; q < kWidth; ++q) dst[c * ld_dst + r + q] = src[(r + q) * ld_src + c];
      }
    }
#endif
    for (int64_t c0 = 0; c0 < cols; c0 += 16) {  // blocks whose lines stay in the first-level cache
      const int64_t c1 = least(cols, c0 + 16);
      for (int64_t q = r; q < rows; ++q) {
        for (int64_t c = c0; c < c1; ++c) dst[c * ld_dst + q] = src[q * ld_src + c];
      }
    }
  }

#if CAPE_VECTOR_BYTES == 64
  // A square of kWidth x kWidth, by exchanging ever larger off-diagonal blocks between pairs of vectors.
  static CAPE_INLINE void transpose_block(const scalar* src, int64_t ld_src, scalar* dst, int64_t ld_dst) {
    Vector v[kWidth];
    for (int i = 0; i < kWidth; ++i) v[i] = load(src + i * ld_src);
#pragma GCC unroll 4
    for (int s = 1; s < kWidth; s *= 2) {
      Index low, high;
      for (int q = 0; q < kWidth; ++q) {
        low[q] = (q & s) ? kWidth + (q ^ s) : q;
        high[q] = (q & s) ? kWidth + q : (q | s);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (i & s) continue;
        const Vector a = v[i], b = v[i | s];
        v[i] = __builtin_shuffle(a, b, low);
        v[i | s] = __builtin_shuffle(a, b, high);
      }
    }
    for (int i = 0; i < kWidth; ++i) store(dst + i * ld_dst, v[i]);
  }

 private:
  template <int bytes, int dummy = 0>
  struct Integer {
    typedef int32_t type;
  };
  template <int dummy>
  struct Integer<8, dummy> {
    typedef int64_t type;
  };
  typedef typename Integer<int(sizeof(scalar))>::type Whole;
  typedef Whole Index __attribute__((vector_size(CAPE_VECTOR_BYTES)));

 public:
#endif

  // dst[x * width + y] = src[x * sx + y * sy] for x < depth, y < count; zero up to width.
  static void pack(const scalar* src, int64_t sx, int64_t sy, int64_t depth, int64_t count, int64_t width,
                   scalar* dst) {
    if (sy == 1) {
      if (count == kWidth && width == kWidth) {
        for (int64_t x = 0; x < depth; ++x) store(dst + x * kWidth, load(src + x * sx));
      } else if (count == kCols && width == kCols) {
        for (int64_t x = 0; x < depth; ++x) {
          store(dst + x * kCols, load(src + x * sx));
          store(dst + x * kCols + kWidth, load(src + x * sx + kWidth));
        }
      } else {
        for (int64_t x = 0; x < depth; ++x) {
          for (int64_t y = 0; y < count; ++y) dst[x * width + y] = src[x * sx + y];
        }
      }
    } else if (sx == 1) {
      transpose(src, sy, count, depth, dst, width);
    } else {
      for (int64_t x = 0; x < depth; ++x) {
        for (int64_t y = 0; y < count; ++y) dst[x * width + y] = src[x * sx + y * sy];
      }
    }
    if (count < width) {
      for (int64_t x = 0; x < depth; ++x) {
        for (int64_t y = count; y < width; ++y) dst[x * width + y] = scalar(0);
      }
    }
  }
};

}  // namespace CAPE_ISA
}  // namespace cape

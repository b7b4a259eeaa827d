// One block's tile of a product, C[i][j] = sum_k X(k, i) Y(k, j), held in registers: on tensor cores (MmaTile) or by
// fused multiply-adds (SimtTile). No torch.
//
// Both give the same view of what a thread owns: kRows x kCols numbers at(m, n), which belong to row(m) and col(n) of
// the tile. Operands lie in shared memory; a Fragment reads the numbers that this thread needs.
#pragma once

#include <cape/precision.h>
#include <cape/block.cuh>

namespace cape::cuda {

// A [depth x tile] operand in shared memory with i next to i. The lead keeps tensor-core reads free of bank conflicts
// (four k's times eight i's meet 32 banks) and rows multiples of 16 bytes.
template <int tile, int depth>
struct NextToI {
  static constexpr int kTile = tile, kDepth = depth, kLead = tile + 8;
  static constexpr int kStepK = kLead, kStepI = 1, kSize = depth * kLead;
  static constexpr bool kMinorIsK = false;
};

// The same with k next to k.
template <int tile, int depth>
struct NextToK {
  static constexpr int kTile = tile, kDepth = depth, kLead = depth + 4;
  static constexpr int kStepK = 1, kStepI = kLead, kSize = tile * kLead;
  static constexpr bool kMinorIsK = true;
};

// This thread's numbers of an operand: get(a, b) is X(first_k + a * unit_k, first_i + b * unit_i).
template <typename scalar, int step_k, int step_i>
struct Fragment {
  static constexpr bool kUnroll = false;  // whether `a` must be known to the compiler
  const scalar* first;
  __device__ __forceinline__ scalar get(int a, int b) const { return first[a * step_k + b * step_i]; }
};

// Tensor-core tile. 64 x 64: 4 warps of 32 x 32; 128 x 128: 8 warps of 64 x 32.
template <Precision precision, int tile, int depth>
struct MmaTile {
  using scalar = float;
  static constexpr int kTileRows = tile, kTileCols = tile, kDepth = depth;
  static constexpr int kWarpsAcross = tile / 32, kThreads = 2 * kWarpsAcross * 32;
  static constexpr int kBlocksM = tile / 32, kBlocksN = 4;  // 16 x 8 products per warp
  static constexpr int kRows = 2 * kBlocksM, kCols = 2 * kBlocksN;
  // Blocks that a multiprocessor's registers must hold: fewer for the Gram form, which keeps two tiles.
  static constexpr int kDirectBlocks = tile > 64                         ? 1
                                       : precision == Precision::float32 ? 3
                                                                         : 4,
                       kGramBlocks = tile == 64 ? 3 : 1;

  float sums[kBlocksM][kBlocksN][4] = {};

  static __device__ __forceinline__ int lane_k() { return threadIdx.x % 4; }
  static __device__ __forceinline__ int lane_i() { return threadIdx.x % 32 / 4; }
  static __device__ __forceinline__ int warp_row() { return int(threadIdx.x) / 32 / kWarpsAcross * (tile / 2); }
  static __device__ __forceinline__ int warp_col() { return int(threadIdx.x) / 32 % kWarpsAcross * 32; }
  static __device__ __forceinline__ int row(int m) { return warp_row() + 8 * m + lane_i(); }
  static __device__ __forceinline__ int col(int n) { return warp_col() + n / 2 * 8 + 2 * lane_k() + n % 2; }
  __device__ __forceinline__ float& at(int m, int n) { return sums[m / 2][n / 2][m % 2 * 2 + n % 2]; }

  template <class Layout>
  static __device__ __forceinline__ auto left(const float* shared) {
    const int first = lane_k() * Layout::kStepK + (warp_row() + lane_i()) * Layout::kStepI;
    return Fragment<float, 4 * Layout::kStepK, 8 * Layout::kStepI>{shared + first};
  }
  template <class Layout>
  static __device__ __forceinline__ auto right(const float* shared) {
    const int first = lane_k() * Layout::kStepK + (warp_col() + lane_i()) * Layout::kStepI;
    return Fragment<float, 4 * Layout::kStepK, 8 * Layout::kStepI>{shared + first};
  }

  // sums += X^T Y over one slice of `depth`.
  template <class X, class Y>
  __device__ __forceinline__ void add(const X& x, const Y& y) {
    if constexpr (precision == Precision::bf16) {
      add_bf16(x, y);
    } else {
      // Unrolled, the compiler reads far ahead and spills the Gram form's second tile.
      [[maybe_unused]] constexpr int kUnroll = X::kUnroll ? depth / 8 : 1;
#pragma unroll kUnroll
      for (int k = 0; k < depth / 4; k += 2) add_tf32(x, y, k);
    }
  }

 private:
  struct Split {
    uint32_t high, low;
    __device__ __forceinline__ explicit Split(float value) : high(to_tf32(value)), low(0) {
      if constexpr (precision == Precision::float32) low = to_tf32(value - as_float(high));
    }
    static __device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
  };

  template <class X, class Y>
  __device__ __forceinline__ void add_tf32(const X& x, const Y& y, int k) {
    uint32_t right[kBlocksN][2], right_low[kBlocksN][2];
#pragma unroll
    for (int n = 0; n < kBlocksN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Split split(y.get(k + e, n));
        right[n][e] = split.high;
        right_low[n][e] = split.low;
      }
    }
#pragma unroll
    for (int m = 0; m < kBlocksM; ++m) {
      uint32_t left[4], left_low[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Split split(x.get(k + e / 2, 2 * m + e % 2));
        left[e] = split.high;
        left_low[e] = split.low;
      }
#pragma unroll
      for (int n = 0; n < kBlocksN; ++n) {
        if constexpr (precision == Precision::float32) {
          // Tensor cores add with truncation: a long sum kept inside them drifts by 1e-8 per step, so every step's
          // product joins the float32 sum by an ordinary, rounded addition.
          float step[4] = {};
          mma_tf32(step, left_low, right[n]);
          mma_tf32(step, left, right_low[n]);
          mma_tf32(step, left, right[n]);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[m][n][e] += step[e];
        } else {
          mma_tf32(sums[m][n], left, right[n]);
        }
      }
    }
  }

  // The order of k inside a product is free as long as both operands agree: k and k + 4 make a pair, so that the reads
  // are those of TF32.
  template <class X, class Y>
  __device__ __forceinline__ void add_bf16(const X& x, const Y& y) {
#pragma unroll
    for (int k = 0; k < depth / 4; k += 4) {
      uint32_t right[kBlocksN][2];
#pragma unroll
      for (int n = 0; n < kBlocksN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) right[n][e] = to_bf16x2(y.get(k + 2 * e, n), y.get(k + 2 * e + 1, n));
      }
#pragma unroll
      for (int m = 0; m < kBlocksM; ++m) {
        uint32_t left[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int from = k + e / 2 * 2, i = 2 * m + e % 2;
          left[e] = to_bf16x2(x.get(from, i), x.get(from + 1, i));
        }
#pragma unroll
        for (int n = 0; n < kBlocksN; ++n) mma_bf16(sums[m][n], left, right[n]);
      }
    }
  }
};

// Fused multiply-adds: 16 x 16 threads; for float64, and where a tensor-core tile would be mostly padding.
template <typename scalar_t, int rows, int cols, int depth>
struct SimtTile {
  using scalar = scalar_t;
  static constexpr int kTileRows = rows, kTileCols = cols, kDepth = depth, kThreads = 256;
  static constexpr int kRows = rows / 16, kCols = cols / 16;
  static constexpr int kDirectBlocks = rows * cols > 1024 ? 2 : 3, kGramBlocks = rows * cols > 1024 ? 1 : 3;

  scalar sums[kRows][kCols] = {};

  static __device__ __forceinline__ int row(int m) { return int(threadIdx.x) / 16 + 16 * m; }
  static __device__ __forceinline__ int col(int n) { return int(threadIdx.x) % 16 + 16 * n; }
  __device__ __forceinline__ scalar& at(int m, int n) { return sums[m][n]; }

  template <class Layout>
  static __device__ __forceinline__ auto left(const scalar* shared) {
    return Fragment<scalar, Layout::kStepK, 16 * Layout::kStepI>{shared + row(0) * Layout::kStepI};
  }
  template <class Layout>
  static __device__ __forceinline__ auto right(const scalar* shared) {
    return Fragment<scalar, Layout::kStepK, 16 * Layout::kStepI>{shared + col(0) * Layout::kStepI};
  }

  template <class X, class Y>
  __device__ __forceinline__ void add(const X& x, const Y& y) {
#pragma unroll 8
    for (int k = 0; k < depth; ++k) {
      scalar left[kRows], right[kCols];
#pragma unroll
      for (int m = 0; m < kRows; ++m) left[m] = x.get(k, m);
#pragma unroll
      for (int n = 0; n < kCols; ++n) right[n] = y.get(k, n);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int n = 0; n < kCols; ++n) sums[m][n] += left[m] * right[n];
      }
    }
  }
};

}  // namespace cape::cuda

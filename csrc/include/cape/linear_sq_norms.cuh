// CUDA kernels of || A^T G ||_F^2 per sample, and of row-wise sums of squares. No torch.
//
// The grid runs over (sample x tile); each block leaves one float64 partial at partials[sample * tiles + tile], and
// sum_partials adds them in a fixed order: no atomics, the same bits on every run.
#pragma once

#include <cstdint>

namespace cape::cuda {

constexpr int kTile = 32;      // output tile of both forms: kTile x kTile
constexpr int kDepth = 16;     // slice of the contracted dimension held in shared memory
constexpr int kThreads = 256;  // each thread owns kTile * kTile / kThreads = 4 outputs
constexpr int kOwned = kTile * kTile / kThreads;

// A strided batch of matrices [B, rows, cols] that is only read.
template <typename scalar>
struct BatchView {
  const scalar* data;
  int64_t batch_stride, row_stride, col_stride;
  __device__ scalar at(int64_t b, int64_t i, int64_t j) const {
    return data[b * batch_stride + i * row_stride + j * col_stride];
  }
};

// Sum of one double per thread over the block; the result is valid in thread 0. The order is fixed.
__device__ inline double block_sum(double value) {
  __shared__ double warp_sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / 32; ++w) total += warp_sums[w];
  }
  return total;
}

// acc[k] += sum over the contracted dimension of X[., i0 + row] * Y[., j0 + col] for this thread's outputs.
// contract_rows: the contracted dimension is the rows (A^T G) or the columns (A A^T) of X and Y.
template <bool contract_rows, typename scalar>
__device__ void multiply_tile(const BatchView<scalar>& x, const BatchView<scalar>& y, int64_t b, int64_t i0, int64_t j0,
                              int64_t rows, int64_t cols, int64_t depth, scalar (&acc)[kOwned]) {
  __shared__ scalar xs[kDepth][kTile + 1];
  __shared__ scalar ys[kDepth][kTile + 1];
  const int col = threadIdx.x % kTile, row0 = threadIdx.x / kTile;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    __syncthreads();
    for (int e = threadIdx.x; e < kDepth * kTile; e += kThreads) {
      // Neighbouring threads read neighbouring columns of the matrices.
      const int k = contract_rows ? e / kTile : e % kDepth, i = contract_rows ? e % kTile : e / kDepth;
      const bool in_depth = k0 + k < depth;
      xs[k][i] =
          in_depth && i0 + i < rows ? (contract_rows ? x.at(b, k0 + k, i0 + i) : x.at(b, i0 + i, k0 + k)) : scalar(0);
      ys[k][i] =
          in_depth && j0 + i < cols ? (contract_rows ? y.at(b, k0 + k, j0 + i) : y.at(b, j0 + i, k0 + k)) : scalar(0);
    }
    __syncthreads();
    for (int k = 0; k < kDepth; ++k) {
      const scalar value = ys[k][col];
      for (int q = 0; q < kOwned; ++q) acc[q] += xs[k][row0 + q * (kThreads / kTile)] * value;
    }
  }
}

// Direct form: block (b, tile) squares one kTile x kTile tile of A_b^T G_b. tiles = ceil(d / kTile) * ceil(p / kTile).
template <typename scalar>
__global__ void __launch_bounds__(kThreads)
    linear_direct(BatchView<scalar> a, BatchView<scalar> g, int64_t t, int64_t d, int64_t p, int64_t tiles,
                  double* __restrict__ partials) {
  const int64_t b = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t across = (p + kTile - 1) / kTile;
  scalar acc[kOwned] = {};
  multiply_tile<true>(a, g, b, (tile / across) * kTile, (tile % across) * kTile, d, p, t, acc);
  double sum = 0.0;
  for (int q = 0; q < kOwned; ++q) sum += double(acc[q]) * double(acc[q]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Gram form: block (b, tile) multiplies one tile of A_b A_b^T with that of G_b G_b^T. Only tiles on and below the
// diagonal exist; those below count twice. tiles = n (n + 1) / 2 with n = ceil(t / kTile).
template <typename scalar>
__global__ void __launch_bounds__(kThreads) linear_gram(BatchView<scalar> a, BatchView<scalar> g, int64_t t, int64_t d,
                                                        int64_t p, int64_t tiles, double* __restrict__ partials) {
  const int64_t b = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  int64_t i = int64_t((sqrt(8.0 * double(tile) + 1.0) - 1.0) / 2.0);
  while ((i + 1) * (i + 2) / 2 <= tile) ++i;  // the square root may be off by one
  while (i * (i + 1) / 2 > tile) --i;
  const int64_t j = tile - i * (i + 1) / 2;
  scalar aa[kOwned] = {}, gg[kOwned] = {};
  multiply_tile<false>(a, a, b, i * kTile, j * kTile, t, t, d, aa);
  multiply_tile<false>(g, g, b, i * kTile, j * kTile, t, t, p, gg);
  double sum = 0.0;
  for (int q = 0; q < kOwned; ++q) sum += double(aa[q]) * double(gg[q]);
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = i == j ? sum : 2.0 * sum;
}

// Sum of squares of one slice of a row: block (b, slice) covers kSlice numbers.
constexpr int64_t kSlice = 16 * kThreads;

template <typename scalar>
__global__ void __launch_bounds__(kThreads)
    squares(const scalar* __restrict__ x, int64_t row_stride, int64_t col_stride, int64_t n, int64_t slices,
            double* __restrict__ partials) {
  const int64_t b = blockIdx.x / slices, begin = (blockIdx.x % slices) * kSlice;
  const int64_t end = begin + kSlice < n ? begin + kSlice : n;
  double sum = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const double value = double(x[b * row_stride + i * col_stride]);
    sum += value * value;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// out[b] = max(0, sum of partials[b, :]): one block per sample, fixed order.
__global__ void __launch_bounds__(kThreads)
    sum_partials(const double* __restrict__ partials, int64_t tiles, double* __restrict__ out) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads) sum += partials[int64_t(blockIdx.x) * tiles + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum > 0.0 || sum != sum ? sum : 0.0;
}

}  // namespace cape::cuda

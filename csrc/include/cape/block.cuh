// What every CUDA kernel of CAPE shares: sums over a block in a fixed order, the second stage of the reduction, and
// divisions by numbers that are fixed per launch. No torch.
//
// Kernels leave one float64 partial per (cotangent, sample, tile); sum_partials adds them in a fixed order. There are
// no atomics, so the same input gives the same bits on every run.
#pragma once

#include <cstdint>

#include <cape/ptx.cuh>

namespace cape::cuda {

template <typename T>
__host__ __device__ constexpr T ceil_div(T n, T by) {
  return (n + by - 1) / by;
}

// n / d for 0 <= n < 2^31 by one wide product (Granlund and Montgomery 1994).
struct FastDivision {
  uint32_t divisor = 1, magic = 0x80000001u;
  int shift = 31;

  FastDivision() = default;
  explicit FastDivision(int64_t d) : divisor(uint32_t(d)) {
    int bits = 0;
    while ((int64_t(1) << bits) < d) ++bits;
    shift = 31 + bits;
    magic = uint32_t((uint64_t(1) << shift) / uint64_t(d) + 1);
  }
  __device__ __forceinline__ int operator()(int n) const { return int((uint64_t(uint32_t(n)) * magic) >> shift); }
};

// Sum over the 32 threads of a warp; every thread gets it.
__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum of one number per thread over the block; thread 0 gets it.
template <int kThreads>
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kThreads / 32];
  value = warp_sum(value);
  __syncthreads();  // the sums of an earlier call have been read
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / 32; ++w) total += warp_sums[w];
  }
  return total;
}

// A squared norm is never negative, rounding or not; NaN stays NaN.
__device__ __forceinline__ double clamp_at_zero(double value) { return value < 0.0 ? 0.0 : value; }

constexpr int kSumThreads = 128;

// out[row] = sum of partials[row, 0:count], one block per row; `norm` clamps it at zero.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    sum_partials(const double* __restrict__ partials, int64_t count, bool norm, double* __restrict__ out) {
  const int64_t row = blockIdx.x;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[row * count + i];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) out[row] = norm ? clamp_at_zero(sum) : sum;
}

// Second stage: `rows` sums of `count` partials each. Launch is what runs a kernel (a stream, or the tests' processor).
template <class Launch>
void finish(Launch& launch, const double* partials, int64_t rows, int64_t count, bool norm, double* out) {
  launch.run(sum_partials<kSumThreads>, rows, kSumThreads, 0, partials, count, norm, out);
}

}  // namespace cape::cuda

// CUDA kernel of row-wise sums of squares: every number is read once, 16 bytes at a time where aligned, and squared in
// float64. No torch.
#pragma once

#include <cape/block.cuh>

namespace cape::cuda {

constexpr int kStreamThreads = 256;

// `per` numbers that are read at once.
template <typename scalar, int per>
struct alignas(per * sizeof(scalar)) Pack {
  scalar v[per];
};

template <typename scalar>
constexpr int kPack = 16 / int(sizeof(scalar));

// `lanes` threads (a warp or the block) sum one slice of one row. partials [rows, slices].
template <typename scalar, int lanes, int per>
__global__ void __launch_bounds__(kStreamThreads)
    row_squares(const scalar* __restrict__ x, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t n,
                int64_t slice_size, int64_t slices, double* __restrict__ partials) {
  const int64_t task = int64_t(blockIdx.x) * (kStreamThreads / lanes) + threadIdx.x / lanes;
  const int64_t row = task / slices, begin = task % slices * slice_size;
  const int64_t end = row < rows ? (begin + slice_size < n ? begin + slice_size : n) : 0;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = begin + int64_t(threadIdx.x) % lanes * per; i < end; i += lanes * per) {
    if constexpr (per > 1) {
      const auto pack = *reinterpret_cast<const Pack<scalar, per>*>(x + row * row_stride + i);
#pragma unroll
      for (int e = 0; e < per; ++e) sum += double(pack.v[e]) * double(pack.v[e]);
    } else {
      const double value = double(x[row * row_stride + i * col_stride]);
      sum += value * value;
    }
  }
  sum = lanes == 32 ? warp_sum(sum) : block_sum<kStreamThreads>(sum);
  if (int(threadIdx.x) % lanes == 0 && row < rows) partials[task] = sum;
}

// out [rows] = sum over columns of x [rows, n] squared; rows and n at least one.
template <class Launch, typename scalar>
void sq_norms(Launch& launch, const scalar* x, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t n,
              double* out) {
  constexpr int per = kPack<scalar>;
  constexpr int64_t kShort = 2048, kSlice = 16384;
  const bool wide =
      col_stride == 1 && row_stride % per == 0 && n % per == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const bool warps = n <= kShort;
  const int64_t slices = warps ? 1 : ceil_div(n, kSlice);
  double* const partials = slices == 1 ? out : launch.doubles(rows * slices);
  launch.run(warps  ? wide ? row_squares<scalar, 32, per> : row_squares<scalar, 32, 1>
             : wide ? row_squares<scalar, kStreamThreads, per>
                    : row_squares<scalar, kStreamThreads, 1>,
             ceil_div(rows * slices, int64_t(warps ? kStreamThreads / 32 : 1)), kStreamThreads, 0, x, row_stride,
             col_stride, rows, n, warps ? n : kSlice, slices, partials);
  if (slices > 1) finish(launch, partials, rows, slices, true, out);
}

}  // namespace cape::cuda

// CUDA kernels of pair_sums: per cotangent, sample and channel the sums of G and of G * X, in one pass over both. No
// torch.
#pragma once

#include <algorithm>

#include <cape/sq_norms.cuh>

namespace cape::cuda {

// g [cotangents, batch, rows, channels, length] and x [batch, rows, channels, length] with any strides. Rows and length
// are summed over: `count` numbers per channel.
template <typename scalar>
struct PairProblem {
  const scalar *g, *x;
  int64_t g_cotangent, g_batch, g_row, g_channel, g_step;
  int64_t x_batch, x_row, x_channel, x_step;
  int64_t cotangents, batch, channels, count;
  FastDivision by_length;
};

constexpr int kPairs = 2;     // cotangents that share one reading of x
constexpr int kPairRun = 32;  // numbers added in the tensors' precision before they join the float64 sum
constexpr int kColumns = 32;  // channels of a block of pair_columns
constexpr int kPairRows = kStreamThreads / kColumns;

// Running sums of one thread.
template <typename scalar>
struct PairSums {
  double plain[kPairs] = {}, times[kPairs] = {};
  scalar plain_run[kPairs] = {}, times_run[kPairs] = {};
  int in_run = 0;

  __device__ __forceinline__ void add(int pair, scalar g, scalar x) {
    plain_run[pair] += g;
    times_run[pair] += g * x;
  }
  __device__ __forceinline__ void added(int numbers) {
    if ((in_run += numbers) >= kPairRun) flush();
  }
  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      plain[k] += double(plain_run[k]), times[k] += double(times_run[k]);
      plain_run[k] = times_run[k] = scalar(0);
    }
    in_run = 0;
  }
};

// Numbers of a channel next to each other: `lanes` threads (a warp or the block) per (sample, channel, slice).
// partials [2, cotangents, batch, channels, slices].
template <typename scalar, int lanes, int per>
__global__ void __launch_bounds__(kStreamThreads)
    pair_rows(const PairProblem<scalar> q, int64_t slice_size, int64_t slices, double* __restrict__ partials) {
  const int64_t task = int64_t(blockIdx.x) * (kStreamThreads / lanes) + threadIdx.x / lanes;
  const int64_t place = task / slices, b = place / q.channels, c = place % q.channels;
  const bool active = b < q.batch;
  const int64_t begin = task % slices * slice_size;
  const int64_t end = active ? (begin + slice_size < q.count ? begin + slice_size : q.count) : 0;
  const scalar* const x = q.x + b * q.x_batch + c * q.x_channel;
  const scalar* const g = q.g + b * q.g_batch + c * q.g_channel;
  for (int64_t first = 0; first < q.cotangents; first += kPairs) {
    const bool both = first + 1 < q.cotangents;
    PairSums<scalar> sums;
#pragma unroll 2
    for (int64_t i = begin + int64_t(threadIdx.x) % lanes * per; i < end; i += lanes * per) {
      const int row = q.by_length(int(i)), step = int(i) - row * int(q.by_length.divisor);
      const scalar* const x_at = x + row * q.x_row + step * q.x_step;
      const scalar* const g_at = g + first * q.g_cotangent + row * q.g_row + step * q.g_step;
      using Numbers = Pack<scalar, per>;
      const Numbers xs = *reinterpret_cast<const Numbers*>(x_at), gs = *reinterpret_cast<const Numbers*>(g_at);
      const Numbers more = both ? *reinterpret_cast<const Numbers*>(g_at + q.g_cotangent) : Numbers{};
#pragma unroll
      for (int e = 0; e < per; ++e) sums.add(0, gs.v[e], xs.v[e]), sums.add(1, more.v[e], xs.v[e]);
      sums.added(per);
    }
    sums.flush();
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      const double plain = lanes == 32 ? warp_sum(sums.plain[k]) : block_sum<kStreamThreads>(sums.plain[k]);
      const double times = lanes == 32 ? warp_sum(sums.times[k]) : block_sum<kStreamThreads>(sums.times[k]);
      if (int(threadIdx.x) % lanes == 0 && active && first + k < q.cotangents) {
        const int64_t at = (first + k) * q.batch * q.channels + place;
        partials[at * slices + task % slices] = plain;
        partials[(q.cotangents * q.batch * q.channels + at) * slices + task % slices] = times;
      }
    }
  }
}

// Channels next to each other: a warp reads 32 channels of a row. Block (sample, 32 channels, slice of rows).
template <typename scalar>
__global__ void __launch_bounds__(kStreamThreads)
    pair_columns(const PairProblem<scalar> q, int64_t slice_size, int64_t slices, double* __restrict__ partials) {
  __shared__ double shared[kPairs][2][kPairRows][kColumns];
  const int64_t block = blockIdx.x, slice = block % slices, across = ceil_div(q.channels, int64_t(kColumns));
  const int64_t b = block / slices / across, c = block / slices % across * kColumns + threadIdx.x % kColumns;
  const int lane = int(threadIdx.x) % kColumns, row_lane = int(threadIdx.x) / kColumns;
  const int64_t begin = slice * slice_size, end = begin + slice_size < q.count ? begin + slice_size : q.count;
  const bool active = c < q.channels;
  const scalar* const x = q.x + b * q.x_batch + c * q.x_channel;
  const scalar* const g = q.g + b * q.g_batch + c * q.g_channel;
  for (int64_t first = 0; first < q.cotangents; first += kPairs) {
    const bool both = first + 1 < q.cotangents;
    PairSums<scalar> sums;
#pragma unroll 4
    for (int64_t i = begin + row_lane; active && i < end; i += kPairRows) {
      const int row = q.by_length(int(i)), step = int(i) - row * int(q.by_length.divisor);
      const scalar value = x[row * q.x_row + step * q.x_step];
      const scalar* const g_at = g + first * q.g_cotangent + row * q.g_row + step * q.g_step;
      sums.add(0, *g_at, value);
      if (both) sums.add(1, g_at[q.g_cotangent], value);
      sums.added(1);
    }
    sums.flush();
    __syncthreads();  // the sums of earlier cotangents have been read
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      shared[k][0][row_lane][lane] = sums.plain[k];
      shared[k][1][row_lane][lane] = sums.times[k];
    }
    __syncthreads();
    // Warp w adds column sums of (cotangent, kind) w.
    const int k = row_lane / 2, kind = row_lane % 2;
    if (k < kPairs && active && first + k < q.cotangents) {
      double total = 0.0;
      for (int r = 0; r < kPairRows; ++r) total += shared[k][kind][r][lane];
      const int64_t at = ((int64_t(kind) * q.cotangents + first + k) * q.batch + b) * q.channels + c;
      partials[at * slices + slice] = total;
    }
  }
}

// out [2, cotangents, batch, channels]; every size at least one, count below 2^31.
template <class Launch, typename scalar>
void pair_sums(Launch& launch, const PairProblem<scalar>& q, double* out) {
  constexpr int per = kPack<scalar>;
  const int64_t length = q.by_length.divisor, places = q.batch * q.channels;
  const bool columns = q.channels > 1 && q.g_channel < (length > 1 ? q.g_step : q.g_row);
  const bool warps = !columns && q.count <= 4096;
  const auto fits = [&](int64_t stride) { return stride % per == 0; };
  const auto at_16 = [](const scalar* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wide = !columns && length > 1 && q.g_step == 1 && q.x_step == 1 && fits(length) && at_16(q.g) &&
                    at_16(q.x) && fits(q.g_cotangent) && fits(q.g_batch) && fits(q.g_row) && fits(q.g_channel) &&
                    fits(q.x_batch) && fits(q.x_row) && fits(q.x_channel);
  const int64_t blocks = columns ? q.batch * ceil_div(q.channels, int64_t(kColumns)) : places;
  // Sums are cut where whole ones would leave the device idle.
  int64_t slices = 1;
  if (!warps) {
    const int64_t least = columns ? 128 : 8192;
    slices = std::min(ceil_div(4 * launch.processors(), blocks), ceil_div(q.count, least));
  }
  const int64_t slice_size = ceil_div(ceil_div(q.count, slices), int64_t(per)) * per;
  slices = ceil_div(q.count, slice_size);
  const int64_t rows = 2 * q.cotangents * places;
  double* const partials = slices == 1 ? out : launch.doubles(rows * slices);
  if (columns) {
    launch.run(pair_columns<scalar>, blocks * slices, kStreamThreads, 0, q, slice_size, slices, partials);
  } else {
    launch.run(warps  ? wide ? pair_rows<scalar, 32, per> : pair_rows<scalar, 32, 1>
               : wide ? pair_rows<scalar, kStreamThreads, per>
                      : pair_rows<scalar, kStreamThreads, 1>,
               ceil_div(places * slices, int64_t(warps ? kStreamThreads / 32 : 1)), kStreamThreads, 0, q, slice_size,
               slices, partials);
  }
  if (slices > 1) finish(launch, partials, rows, slices, false, out);
}

}  // namespace cape::cuda

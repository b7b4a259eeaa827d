// The forms of a convolution's norm for the kernels of products.cuh, and its plain dot products. No torch.
#pragma once

#include <cape/conv_operands.cuh>
#include <cape/products.cuh>

namespace cape::cuda {

// k runs over positions, i over (channel, tap), j over outputs. `halo`: through patches of the input.
template <typename scalar, bool halo>
struct ConvDirect {
  ConvData<scalar> c;
  SliceShape s;
  bool wide;

  template <class Tile>
  __device__ __forceinline__ int slices() const {
    return c.frames * int(s.by_slices.divisor);
  }
  template <class Tile>
  __device__ __forceinline__ auto left(int, int unit, int64_t i0) const {
    if constexpr (halo) {
      return PatchBlock<Tile>(c, s, c.x_of(unit), int(i0));
    } else {
      return ColumnBlock<Tile>(c, s, c.x_of(unit), int(i0));
    }
  }
  template <class Tile>
  __device__ __forceinline__ auto right(int cotangent, int unit, int64_t j0) const {
    return GradientBlock<Tile>{c, s, c.g_of(cotangent, unit) + j0 * c.g_channel, int(j0), wide};
  }
  __device__ __forceinline__ int64_t rows() const { return int64_t(c.channels) * c.taps; }
  __device__ __forceinline__ int64_t cols() const { return c.outputs; }
};

// k runs over outputs (right) or over (tap, channel) (left), i and j over positions.
template <typename scalar>
struct ConvGram {
  ConvData<scalar> c;

  template <class Tile>
  __device__ __forceinline__ void left_gram(Tile& tile, int unit, int64_t i0, int64_t j0) const {
    const scalar* const x = c.x_of(unit);
    multiply(tile, WindowBlock<Tile>{c, x, int(i0)}, WindowBlock<Tile>{c, x, int(j0)}, 0,
             c.taps * WindowBlock<Tile>::runs(c), i0 == j0);
  }
  template <class Tile>
  __device__ __forceinline__ int right_slices() const {
    return ceil_div(c.outputs, Tile::kDepth);
  }
  template <class Tile>
  __device__ __forceinline__ auto right(int cotangent, int unit, int64_t i0) const {
    return PixelBlock<Tile>{c.g_of(cotangent, unit), c.g_channel, c.g_frame, c.outputs,      int(i0),
                            c.positions(),           c.frames,    c.wide_g,  c.by_out_pixels};
  }
  __device__ __forceinline__ int64_t positions() const { return c.positions(); }
};

// The same with the left tile gathered from the Gram matrix of pixels, grams [units of this launch, n, n]:
// (U^T U)[t, t'] = sum over taps of (X^T X)[pixel of t under the tap, pixel of t' under it], nothing where either lies
// in the padding. Positions are in raster order and strides positive, so t' <= t never leaves the lower triangle.
template <typename scalar>
struct ConvShiftedGram : ConvGram<scalar> {
  const scalar* grams;
  int first_unit;

  __host__ __device__ int64_t pixels() const { return int64_t(this->c.frames) * this->c.pixels; }

  template <class Tile>
  __device__ __forceinline__ int pixel_slices() const {
    return ceil_div(this->c.channels, Tile::kDepth);
  }
  template <class Tile>
  __device__ __forceinline__ auto pixels_of(int unit, int64_t i0) const {
    const auto& c = this->c;
    return PixelBlock<Tile>{c.x_of(unit),  c.x_channel, c.x_frame, c.channels, int(i0),
                            int(pixels()), c.frames,    c.wide_x,  c.by_pixels};
  }
  template <class Tile>
  __device__ __forceinline__ void left_gram(Tile& tile, int unit, int64_t i0, int64_t j0) const {
    const auto& c = this->c;
    const scalar* const gram = grams + (unit - first_unit) * pixels() * pixels();
    Point row[Tile::kRows], col[Tile::kCols];
    int row_frame[Tile::kRows], col_frame[Tile::kCols];
    const auto place = [&](int64_t t, Point* window, int* frame) {
      *frame = t < c.positions() ? c.by_out_pixels(int(t)) : -1;
      *window = window_of(c, t < c.positions() ? int(t) - *frame * c.out_pixels : 0);
    };
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) place(i0 + Tile::row(m), &row[m], &row_frame[m]);
#pragma unroll
    for (int n = 0; n < Tile::kCols; ++n) place(j0 + Tile::col(n), &col[n], &col_frame[n]);
#pragma unroll 1
    for (int t = 0; t < c.taps; ++t) {
      const Point tap = tap_of(c, t);
      int across[Tile::kCols];
#pragma unroll
      for (int n = 0; n < Tile::kCols; ++n) {
        const int pixel = col_frame[n] < 0 ? -1 : pixel_at(c, col[n], tap);
        across[n] = pixel < 0 ? -1 : col_frame[n] * c.pixels + pixel;
      }
#pragma unroll
      for (int m = 0; m < Tile::kRows; ++m) {
        const int pixel = row_frame[m] < 0 ? -1 : pixel_at(c, row[m], tap);
        const int down = row_frame[m] * c.pixels + pixel;
        const scalar* const from = gram + down * pixels();
#pragma unroll
        for (int n = 0; n < Tile::kCols; ++n) {
          if (pixel >= 0 && across[n] >= 0 && across[n] <= down) tile.at(m, n) += from[across[n]];
        }
      }
    }
  }
};

constexpr int kDotThreads = 256;
constexpr int kDotTaps = 9;  // taps that share one reading of the gradient
constexpr int kDotRun = 32;  // products added in the tensors' precision before they join the float64 sum

// For groups too narrow for tiles: one dot product of an output's gradient with a shifted channel per tap. `lanes`
// threads (32 or the block) share a dot product. Block (cotangent, sample, tile of (output, channel of its group)).
// partials [cotangents, samples, tiles].
template <typename scalar, int lanes>
__global__ void __launch_bounds__(kDotThreads)
    dot_squares(const ConvData<scalar> c, int batch, int tiles, double* __restrict__ partials) {
  constexpr int kTasks = kDotThreads / lanes;
  const int block = int(blockIdx.x), index = block % tiles, rest = block / tiles;
  const int b = rest % batch, cotangent = rest / batch;
  const int64_t task = int64_t(index) * kTasks + int(threadIdx.x) / lanes;
  const int64_t outputs = int64_t(c.outputs) * c.groups;
  const bool active = task < outputs * c.channels;
  const int output = active ? int(task / c.channels) : 0;
  const int channel = output / c.outputs * c.channels + (active ? int(task % c.channels) : 0);
  const scalar* const x = c.x + b * c.x_batch + channel * c.x_channel;
  const scalar* const g = c.g + cotangent * c.g_cotangent + b * c.g_batch + output * c.g_channel;
  double total = 0.0;
#pragma unroll 1
  for (int first = 0; first < c.taps; first += kDotTaps) {
    Point taps[kDotTaps];
    double sums[kDotTaps] = {};
    scalar run[kDotTaps] = {};
#pragma unroll
    for (int q = 0; q < kDotTaps; ++q) taps[q] = tap_of(c, first + q < c.taps ? first + q : 0);
    int in_run = 0;
    const auto flush = [&] {
#pragma unroll
      for (int q = 0; q < kDotTaps; ++q) sums[q] += double(run[q]), run[q] = scalar(0);
      in_run = 0;
    };
    for (int t = int(threadIdx.x) % lanes; active && t < c.positions(); t += lanes) {
      const int frame = c.by_out_pixels(t), position = t - frame * c.out_pixels;
      const Point window = window_of(c, position);
      const scalar gradient = g[frame * c.g_frame + position];
      const scalar* const image = x + frame * c.x_frame;
#pragma unroll
      for (int q = 0; q < kDotTaps; ++q) {
        const int pixel = pixel_at(c, window, taps[q]);
        if (pixel >= 0) run[q] += gradient * image[pixel];
      }
      if (++in_run == kDotRun) flush();
    }
    flush();
#pragma unroll
    for (int q = 0; q < kDotTaps; ++q) {
      const double dot = lanes == 32 ? warp_sum(sums[q]) : block_sum<kDotThreads>(sums[q]);
      if (first + q < c.taps && int(threadIdx.x) % lanes == 0) total += dot * dot;
    }
  }
  total = block_sum<kDotThreads>(total);
  if (threadIdx.x == 0) partials[(int64_t(cotangent) * batch + b) * tiles + index] = total;
}

}  // namespace cape::cuda

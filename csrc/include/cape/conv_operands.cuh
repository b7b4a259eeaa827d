// How a convolution's windows, positions and output gradients reach shared memory; im2col never exists in global
// memory. No torch.
#pragma once

#include <cape/shapes.h>
#include <cape/operands.cuh>

namespace cape::cuda {

// One convolution, seen by kernels. A unit is (sample, group); positions count frames, then output pixels; channels and
// outputs are those of one group. Images are contiguous, everything else has a stride.
template <typename scalar>
struct ConvData {
  const scalar *x, *g;
  int64_t x_batch, x_frame, x_channel;
  int64_t g_cotangent, g_batch, g_frame, g_channel;
  int frames, channels, outputs, groups, taps, pixels, out_pixels;
  int size[3], reach[3], kernel[3], stride[3], padding[3], dilation[3], out[3];  // reach: pixels that windows meet
  bool wide_x, wide_g;  // 16 bytes at a time along an image's pixels
  FastDivision by_groups, by_taps, by_pixels, by_out_pixels, by_out_image, by_out_row, by_kernel_image, by_kernel_row;

  ConvData(const ConvShape& s, const scalar* x_data, const int64_t (&x_strides)[3], const scalar* g_data,
           const int64_t (&g_strides)[4])
      : x(x_data),
        g(g_data),
        x_batch(x_strides[0]),
        x_frame(x_strides[1]),
        x_channel(x_strides[2]),
        g_cotangent(g_strides[0]),
        g_batch(g_strides[1]),
        g_frame(g_strides[2]),
        g_channel(g_strides[3]),
        frames(int(s.frames)),
        channels(int(s.group_channels())),
        outputs(int(s.group_outputs())),
        groups(int(s.groups)),
        taps(int(s.taps())),
        pixels(int(s.pixels())),
        out_pixels(int(s.positions() / s.frames)),
        by_groups(s.groups),
        by_taps(s.taps()),
        by_pixels(s.pixels()),
        by_out_pixels(out_pixels),
        by_out_image(s.out[1] * s.out[2]),
        by_out_row(s.out[2]),
        by_kernel_image(s.kernel[1] * s.kernel[2]),
        by_kernel_row(s.kernel[2]) {
    for (size_t i = 0; i < 3; ++i) {
      size[i] = int(s.size[i]), kernel[i] = int(s.kernel[i]), stride[i] = int(s.stride[i]);
      padding[i] = int(s.padding[i]), dilation[i] = int(s.dilation[i]), out[i] = int(s.out[i]);
      const int64_t end = (s.out[i] - 1) * s.stride[i] + (s.kernel[i] - 1) * s.dilation[i] + 1 - s.padding[i];
      reach[i] = int(std::max<int64_t>(0, std::min(s.size[i], end)));
    }
    constexpr int64_t per = 16 / int64_t(sizeof(scalar));
    wide_x = Side<scalar>::aligned(x, 1, x_batch, x_frame, x_channel);
    wide_g = Side<scalar>::aligned(g, 1, g_batch, g_frame, g_channel) && g_cotangent % per == 0;
  }

  __host__ __device__ int positions() const { return frames * out_pixels; }
  __device__ __forceinline__ const scalar* x_of(int unit) const {
    const int b = by_groups(unit), group = unit - b * groups;
    return x + b * x_batch + int64_t(group) * channels * x_channel;
  }
  __device__ __forceinline__ const scalar* g_of(int cotangent, int unit) const {
    const int b = by_groups(unit), group = unit - b * groups;
    return g + cotangent * g_cotangent + b * g_batch + int64_t(group) * outputs * g_channel;
  }
};

// Three coordinates of a pixel or of a kernel's tap.
struct Point {
  int z, y, x;
};

// Coordinates of `index` in an image whose rows and planes have the given divisions.
__device__ __forceinline__ Point point_of(int index, const FastDivision& by_image, const FastDivision& by_row) {
  const int z = by_image(index), rest = index - z * int(by_image.divisor);
  const int y = by_row(rest);
  return {z, y, rest - y * int(by_row.divisor)};
}

template <typename scalar>
__device__ __forceinline__ Point tap_of(const ConvData<scalar>& c, int tap) {
  const Point p = point_of(tap, c.by_kernel_image, c.by_kernel_row);
  return {p.z * c.dilation[0], p.y * c.dilation[1], p.x * c.dilation[2]};
}

// First pixel (it may lie in the padding) of the window at an output position within a frame.
template <typename scalar>
__device__ __forceinline__ Point window_of(const ConvData<scalar>& c, int position) {
  const Point p = point_of(position, c.by_out_image, c.by_out_row);
  return {p.z * c.stride[0] - c.padding[0], p.y * c.stride[1] - c.padding[1], p.x * c.stride[2] - c.padding[2]};
}

// Index of the pixel at `window` + `tap`, or -1 in the padding and where no window reaches.
template <typename scalar>
__device__ __forceinline__ int pixel_at(const ConvData<scalar>& c, Point window, Point tap) {
  const int z = window.z + tap.z, y = window.y + tap.y, x = window.x + tap.x;
  const bool inside =
      unsigned(z) < unsigned(c.reach[0]) && unsigned(y) < unsigned(c.reach[1]) && unsigned(x) < unsigned(c.reach[2]);
  return inside ? (z * c.size[1] + y) * c.size[2] + x : -1;
}

// X(k, i) = channel k at pixel (or position) i of all frames, from pixel i0.
template <class Tile>
struct PixelBlock {
  using scalar = typename Tile::scalar;
  using Layout = NextToI<Tile::kTileRows, Tile::kDepth>;
  const scalar* data;
  int64_t channel_stride, frame_stride;
  int channels, i0, count, frames;
  bool wide;
  const FastDivision& by_pixels;

  __device__ __forceinline__ int size() const { return Layout::kSize; }
  __device__ __forceinline__ void fill(scalar* to, int slice) const {
    const int k0 = slice * Tile::kDepth;
    const scalar* const from = data + k0 * channel_stride;
    if (frames == 1) {
      fill_block<Layout, Tile::kThreads>(to, from + i0, channel_stride, int64_t(1), channels - k0, count - i0, wide);
      return;
    }
    constexpr int kTile = Tile::kTileRows, kStep = Tile::kThreads / kTile;
    const int i = int(threadIdx.x) % kTile, frame = by_pixels(i0 + i);
    const int64_t offset = frame * frame_stride + (i0 + i - frame * int(by_pixels.divisor));
    for (int k = int(threadIdx.x) / kTile; k < Tile::kDepth; k += kStep) {
      const bool inside = i0 + i < count && k0 + k < channels;
      copy_async<sizeof(scalar)>(to + k * Layout::kStepK + i, inside ? from + offset + k * channel_stride : data,
                                 inside ? int(sizeof(scalar)) : 0);
    }
  }
  __device__ __forceinline__ auto left(const scalar* shared) const { return Tile::template left<Layout>(shared); }
  __device__ __forceinline__ auto right(const scalar* shared) const { return Tile::template right<Layout>(shared); }
};

// X(k, i) = pixel under tap and channel k of the window at position i, from position i0. A slice is one tap and a run
// of channels, so that every thread finds its pixel once.
template <class Tile>
struct WindowBlock {
  using scalar = typename Tile::scalar;
  using Layout = NextToI<Tile::kTileRows, Tile::kDepth>;
  const ConvData<scalar>& c;
  const scalar* data;
  int i0;

  static __host__ __device__ int runs(const ConvData<scalar>& c) { return ceil_div(c.channels, Tile::kDepth); }
  __device__ __forceinline__ int size() const { return Layout::kSize; }
  __device__ __forceinline__ void fill(scalar* to, int slice) const {
    constexpr int kTile = Tile::kTileRows, kStep = Tile::kThreads / kTile;
    const int tap = slice / runs(c), k0 = (slice - tap * runs(c)) * Tile::kDepth;
    const int i = int(threadIdx.x) % kTile, frame = c.by_out_pixels(i0 + i);
    const int pixel = pixel_at(c, window_of(c, i0 + i - frame * c.out_pixels), tap_of(c, tap));
    const bool valid = i0 + i < c.positions() && pixel >= 0;
    const scalar* const from = data + frame * c.x_frame + pixel + k0 * c.x_channel;
    for (int k = int(threadIdx.x) / kTile; k < Tile::kDepth; k += kStep) {
      const bool inside = valid && k0 + k < c.channels;
      copy_async<sizeof(scalar)>(to + k * Layout::kStepK + i, inside ? from + k * c.x_channel : data,
                                 inside ? int(sizeof(scalar)) : 0);
    }
  }
  __device__ __forceinline__ auto left(const scalar* shared) const { return Tile::template left<Layout>(shared); }
  __device__ __forceinline__ auto right(const scalar* shared) const { return Tile::template right<Layout>(shared); }
};

// The direct form runs over slices of rows x cols output positions (at most a tile's depth, within one image), whose
// windows share a patch of the input.
struct SliceShape {
  int rows, cols;              // output positions of a slice
  int down, across;            // slices per image of one output depth
  int patch_rows, patch_cols;  // input pixels under a slice, in shared memory
  int patch;                   // numbers per channel: kernel depth x patch_rows x patch_cols
  int channels;                // channels that a tile of rows can touch
  FastDivision by_cols, by_patch, by_patch_image, by_patch_row, by_slices, by_down_across, by_across;
};

// Where slice `slice` is: its frame and its first output position.
struct SlicePlace {
  int frame, z, y, x;
  __device__ __forceinline__ SlicePlace(const SliceShape& s, int slice) {
    frame = s.by_slices(slice);
    slice -= frame * int(s.by_slices.divisor);
    z = s.by_down_across(slice);
    slice -= z * int(s.by_down_across.divisor);
    y = s.by_across(slice);
    x = (slice - y * s.across) * s.cols;
    y *= s.rows;
  }
};

// Y(k, j) = output gradient of channel j at the slice's k-th position, from channel j0.
template <class Tile>
struct GradientBlock {
  using scalar = typename Tile::scalar;
  using Layout = NextToK<Tile::kTileCols, Tile::kDepth>;
  const ConvData<scalar>& c;
  const SliceShape& s;
  const scalar* data;
  int j0;
  bool wide;

  __device__ __forceinline__ int size() const { return Layout::kSize; }
  __device__ __forceinline__ void fill(scalar* to, int slice) const {
    if (wide) {
      fill_by<16 / int(sizeof(scalar))>(to, slice);
    } else {
      fill_by<1>(to, slice);
    }
  }
  __device__ __forceinline__ auto right(const scalar* shared) const { return Tile::template right<Layout>(shared); }

 private:
  template <int per>
  __device__ __forceinline__ void fill_by(scalar* to, int slice) const {
    constexpr int kMinor = Tile::kDepth / per, kStep = Tile::kThreads / kMinor, kBytes = per * int(sizeof(scalar));
    const SlicePlace place(s, slice);
    const int k = int(threadIdx.x) % kMinor * per, row = s.by_cols(k), col = k - row * s.cols;
    const bool valid = row < s.rows && place.y + row < c.out[1] && place.x + col < c.out[2];
    const int64_t offset =
        place.frame * c.g_frame + ((int64_t(place.z) * c.out[1] + place.y + row) * c.out[2] + place.x + col);
    const scalar* from = data + offset + int(threadIdx.x) / kMinor * c.g_channel;
    for (int j = int(threadIdx.x) / kMinor; j < Tile::kTileCols; j += kStep, from += kStep * c.g_channel) {
      const bool inside = valid && j0 + j < c.outputs;
      copy_async<kBytes>(to + j * Layout::kLead + k, inside ? from : data, inside ? kBytes : 0);
    }
  }
};

// X(k, i) = pixel under channel and tap i (taps next to each other) of the window at the slice's k-th position: windows
// copied one by one.
template <class Tile>
struct ColumnBlock {
  using scalar = typename Tile::scalar;
  using Layout = NextToK<Tile::kTileRows, Tile::kDepth>;
  const ConvData<scalar>& c;
  const SliceShape& s;
  const scalar* data;
  int i0;

  __device__ ColumnBlock(const ConvData<scalar>& conv, const SliceShape& slice, const scalar* from, int first)
      : c(conv), s(slice), data(from), i0(first) {}
  __device__ __forceinline__ int size() const { return Layout::kSize; }
  __device__ __forceinline__ void fill(scalar* to, int slice) const {
    constexpr int kDepth = Tile::kDepth, kStep = Tile::kThreads / kDepth;
    const SlicePlace place(s, slice);
    const int k = int(threadIdx.x) % kDepth, row = s.by_cols(k), col = k - row * s.cols;
    const bool valid = row < s.rows && place.y + row < c.out[1] && place.x + col < c.out[2];
    const Point window{place.z * c.stride[0] - c.padding[0], (place.y + row) * c.stride[1] - c.padding[1],
                       (place.x + col) * c.stride[2] - c.padding[2]};
    for (int i = int(threadIdx.x) / kDepth; i < Tile::kTileRows; i += kStep) {
      const int channel = c.by_taps(i0 + i);
      const int pixel = channel < c.channels ? pixel_at(c, window, tap_of(c, i0 + i - channel * c.taps)) : -1;
      const bool inside = valid && pixel >= 0;
      copy_async<sizeof(scalar)>(to + i * Layout::kLead + k,
                                 inside ? data + place.frame * c.x_frame + channel * c.x_channel + pixel : data,
                                 inside ? int(sizeof(scalar)) : 0);
    }
  }
  __device__ __forceinline__ auto left(const scalar* shared) const { return Tile::template left<Layout>(shared); }
};

// Reads windows out of a patch: the offsets of this thread's rows (channel and tap) and positions lie in registers.
template <class Tile>
struct PatchFragment {
  static constexpr bool kUnroll = true;
  const float* first;
  const int (&row)[Tile::kRows];
  const int (&position)[Tile::kDepth / 4];
  __device__ __forceinline__ float get(int a, int b) const { return first[row[b] + position[a]]; }
};

// The same, with every input pixel under the slice copied once per channel, halo included, and shared by all taps.
template <class Tile>
struct PatchBlock {
  using scalar = float;
  const ConvData<float>& c;
  const SliceShape& s;
  const float* data;
  int first_channel, count;
  int row[Tile::kRows], position[Tile::kDepth / 4];

  __device__ __forceinline__ PatchBlock(const ConvData<float>& conv, const SliceShape& slice, const float* from, int i0)
      : c(conv), s(slice), data(from), first_channel(conv.by_taps(i0)) {
    const int left = c.channels - first_channel;
    count = (left < s.channels ? left : s.channels) * s.patch;
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) {
      const int i = i0 + Tile::row(m), channel = c.by_taps(i);
      const Point tap = point_of(i - channel * c.taps, c.by_kernel_image, c.by_kernel_row);
      const int in_patch = (tap.z * s.patch_rows + tap.y * c.dilation[1]) * s.patch_cols + tap.x * c.dilation[2];
      row[m] = channel < c.channels ? (channel - first_channel) * s.patch + in_patch : 0;  // 0: summed by nobody
    }
#pragma unroll
    for (int a = 0; a < Tile::kDepth / 4; ++a) {
      const int k = Tile::lane_k() + 4 * a, y = s.by_cols(k), x = k - y * s.cols;
      position[a] = y < s.rows ? y * c.stride[1] * s.patch_cols + x * c.stride[2] : 0;  // 0: meets a zero gradient
    }
  }
  __device__ __forceinline__ int size() const { return ceil_div(s.channels * s.patch, 4) * 4; }
  __device__ __forceinline__ void fill(float* to, int slice) const {
    const SlicePlace place(s, slice);
    const float* const from = data + place.frame * c.x_frame + first_channel * c.x_channel;
    const Point corner{place.z * c.stride[0] - c.padding[0], place.y * c.stride[1] - c.padding[1],
                       place.x * c.stride[2] - c.padding[2]};
    for (int e = int(threadIdx.x); e < count; e += Tile::kThreads) {
      const int channel = s.by_patch(e);
      const Point p = point_of(e - channel * s.patch, s.by_patch_image, s.by_patch_row);
      const int pixel = pixel_at(c, corner, {p.z * c.dilation[0], p.y, p.x});
      copy_async<4>(to + e, pixel >= 0 ? from + channel * c.x_channel + pixel : data, pixel >= 0 ? 4 : 0);
    }
  }
  __device__ __forceinline__ PatchFragment<Tile> left(const float* shared) const { return {shared, row, position}; }
};

}  // namespace cape::cuda

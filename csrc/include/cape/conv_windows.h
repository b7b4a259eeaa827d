// One sample of a convolution (1 to 3 spatial dimensions), read window by window without unfolding it. No torch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace cape {

// Sizes of one sample: `frames` images of `channels` x size, kernel taps, and the output positions. Three spatial
// dimensions always; absent ones have size, kernel, stride and dilation 1 and padding 0.
struct ConvShape {
  int64_t frames, channels, outputs, groups;
  std::array<int64_t, 3> size, kernel, stride, padding, dilation, out;

  int64_t positions() const { return frames * out[0] * out[1] * out[2]; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t pixels() const { return size[0] * size[1] * size[2]; }
  int64_t padded(int i) const { return size[i] + 2 * padding[i]; }
  int64_t padded_pixels() const { return padded(0) * padded(1) * padded(2); }
};

// Copy channels [c0, c0 + count) of x [frames, channels, size] to channels-last, zero-padded images
// [frames, padded size, width]: every window then starts `width` numbers that the tiles can read in place.
template <typename scalar>
void channels_last(const ConvShape& s, const scalar* x, int64_t c0, int64_t count, int64_t width, scalar* dst) {
  std::fill(dst, dst + s.frames * s.padded_pixels() * width, scalar(0));
  for (int64_t f = 0; f < s.frames; ++f) {
    for (int64_t z = 0; z < s.size[0]; ++z) {
      for (int64_t y = 0; y < s.size[1]; ++y) {
        const scalar* src = x + (f * s.channels + c0) * s.pixels() + (z * s.size[1] + y) * s.size[2];
        scalar* row = dst + (((f * s.padded(0) + z + s.padding[0]) * s.padded(1) + y + s.padding[1]) * s.padded(2) +
                             s.padding[2]) *
                                width;
        constexpr int64_t kBlock = 16;  // pixels whose lines stay in the first-level cache
        for (int64_t q0 = 0; q0 < s.size[2]; q0 += kBlock) {
          const int64_t q1 = std::min(s.size[2], q0 + kBlock);
          for (int64_t c = 0; c < count; ++c) {
            for (int64_t q = q0; q < q1; ++q) row[q * width + c] = src[c * s.pixels() + q];
          }
        }
      }
    }
  }
}

// Offsets of the windows' first pixel in such images, one per output position.
inline std::vector<int64_t> window_offsets(const ConvShape& s, int64_t width) {
  std::vector<int64_t> offset;
  offset.reserve(size_t(s.positions()));
  for (int64_t f = 0; f < s.frames; ++f)
    for (int64_t z = 0; z < s.out[0]; ++z)
      for (int64_t y = 0; y < s.out[1]; ++y)
        for (int64_t q = 0; q < s.out[2]; ++q)
          offset.push_back(
              (((f * s.padded(0) + z * s.stride[0]) * s.padded(1) + y * s.stride[1]) * s.padded(2) + q * s.stride[2]) *
              width);
  return offset;
}

// Offset of each tap of the kernel from a window's first pixel.
inline std::vector<int64_t> tap_offsets(const ConvShape& s, int64_t width) {
  std::vector<int64_t> offset;
  for (int64_t z = 0; z < s.kernel[0]; ++z)
    for (int64_t y = 0; y < s.kernel[1]; ++y)
      for (int64_t q = 0; q < s.kernel[2]; ++q)
        offset.push_back(((z * s.dilation[0] * s.padded(1) + y * s.dilation[1]) * s.padded(2) + q * s.dilation[2]) *
                         width);
  return offset;
}

// Range of output positions whose pixel at `shift` (tap times dilation minus padding) lies inside [0, size).
inline std::pair<int64_t, int64_t> inside(int64_t shift, int64_t stride, int64_t size, int64_t out) {
  const int64_t low = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
  const int64_t high = size - 1 - shift < 0 ? 0 : std::min(out, (size - 1 - shift) / stride + 1);
  return {std::min(low, high), high};
}

// Unfold channels [c0, c0 + count) to rows [(channel, tap), ld] with one output position per column, zero up to ld.
template <typename scalar>
void unfold_rows(const ConvShape& s, const scalar* x, int64_t c0, int64_t count, int64_t ld, scalar* dst) {
  std::fill(dst, dst + count * s.taps() * ld, scalar(0));
  scalar* row = dst;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t kz = 0; kz < s.kernel[0]; ++kz)
      for (int64_t ky = 0; ky < s.kernel[1]; ++ky)
        for (int64_t kx = 0; kx < s.kernel[2]; ++kx, row += ld) {
          const int64_t sz = kz * s.dilation[0] - s.padding[0], sy = ky * s.dilation[1] - s.padding[1],
                        sx = kx * s.dilation[2] - s.padding[2];
          const auto [z0, z1] = inside(sz, s.stride[0], s.size[0], s.out[0]);
          const auto [y0, y1] = inside(sy, s.stride[1], s.size[1], s.out[1]);
          const auto [q0, q1] = inside(sx, s.stride[2], s.size[2], s.out[2]);
          for (int64_t f = 0; f < s.frames; ++f)
            for (int64_t z = z0; z < z1; ++z)
              for (int64_t y = y0; y < y1; ++y) {
                const scalar* src = x + (f * s.channels + c0 + c) * s.pixels() +
                                    ((z * s.stride[0] + sz) * s.size[1] + y * s.stride[1] + sy) * s.size[2] + sx;
                scalar* to = row + ((f * s.out[0] + z) * s.out[1] + y) * s.out[2];
                for (int64_t q = q0; q < q1; ++q) to[q] = src[q * s.stride[2]];
              }
        }
}

// Sum over (output, channel, tap) of one group of the squared dot products of G's rows with the shifted images: the
// bandwidth-bound way for depthwise and other narrow groups, where tiles would be mostly padding.
template <typename scalar>
double narrow_squares(const ConvShape& s, const scalar* x, const scalar* g, int64_t group) {
  const int64_t out_pixels = s.out[0] * s.out[1] * s.out[2];
  double total = 0.0;
  for (int64_t o = group * s.group_outputs(); o < (group + 1) * s.group_outputs(); ++o)
    for (int64_t c = group * s.group_channels(); c < (group + 1) * s.group_channels(); ++c)
      for (int64_t kz = 0; kz < s.kernel[0]; ++kz)
        for (int64_t ky = 0; ky < s.kernel[1]; ++ky)
          for (int64_t kx = 0; kx < s.kernel[2]; ++kx) {
            const int64_t sz = kz * s.dilation[0] - s.padding[0], sy = ky * s.dilation[1] - s.padding[1],
                          sx = kx * s.dilation[2] - s.padding[2];
            const auto [z0, z1] = inside(sz, s.stride[0], s.size[0], s.out[0]);
            const auto [y0, y1] = inside(sy, s.stride[1], s.size[1], s.out[1]);
            const auto [q0, q1] = inside(sx, s.stride[2], s.size[2], s.out[2]);
            double dot = 0.0;
            for (int64_t f = 0; f < s.frames; ++f)
              for (int64_t z = z0; z < z1; ++z)
                for (int64_t y = y0; y < y1; ++y) {
                  const scalar* xs = x + (f * s.channels + c) * s.pixels() +
                                     ((z * s.stride[0] + sz) * s.size[1] + y * s.stride[1] + sy) * s.size[2] + sx;
                  const scalar* gs = g + (f * s.outputs + o) * out_pixels + (z * s.out[1] + y) * s.out[2];
                  scalar lanes[8] = {};
                  int64_t q = q0;
                  if (s.stride[2] == 1) {
                    for (; q + 8 <= q1; q += 8)
                      for (int64_t k = 0; k < 8; ++k) lanes[k] += xs[q + k] * gs[q + k];
                  }
                  scalar rest = 0;
                  for (; q < q1; ++q) rest += xs[q * s.stride[2]] * gs[q];
                  for (int64_t k = 0; k < 8; ++k) dot += double(lanes[k]);
                  dot += double(rest);
                }
            total += dot * dot;
          }
  return total;
}

}  // namespace cape

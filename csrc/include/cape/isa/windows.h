// Reading a convolution's windows: images blocked by channels, offsets of windows and taps, unfolded rows.
#pragma once

#include <cape/isa/tile.h>
#include <cape/shapes.h>

namespace cape {
namespace CAPE_ISA {

template <typename scalar>
inline void clear(scalar* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = scalar(0);
}

// Channels [c0, c0 + count), count <= kWidth, of x [frames, channels, *size] as images [frames, p0, p1, p2, kWidth]
// with `padding` zeros in front and zeros behind: a window is then read in place, all channels of a pixel at once.
template <typename scalar>
void blocked_images(const ConvShape& s, const scalar* x, int64_t c0, int64_t count, int64_t p0, int64_t p1, int64_t p2,
                    scalar* dst) {
  using T = Tile<scalar>;
  const int64_t line = p2 * T::kWidth;
  for (int64_t f = 0; f < s.frames; ++f) {
    for (int64_t z = 0; z < p0; ++z) {
      for (int64_t y = 0; y < p1; ++y, dst += line) {
        const int64_t from_z = z - s.padding[0], from_y = y - s.padding[1];
        if (from_z < 0 || from_z >= s.size[0] || from_y < 0 || from_y >= s.size[1]) {
          clear(dst, line);
          continue;
        }
        clear(dst, s.padding[2] * T::kWidth);
        const scalar* src = x + (f * s.channels + c0) * s.pixels() + (from_z * s.size[1] + from_y) * s.size[2];
        T::pack(src, 1, s.pixels(), s.size[2], count, T::kWidth, dst + s.padding[2] * T::kWidth);
        clear(dst + (s.padding[2] + s.size[2]) * T::kWidth, (p2 - s.padding[2] - s.size[2]) * T::kWidth);
      }
    }
  }
}

// Offsets of the windows' first pixels in such images (of the convolution's own padded size), one per position.
inline void window_offsets(const ConvShape& s, int64_t width, int64_t* offset) {
  for (int64_t f = 0; f < s.frames; ++f)
    for (int64_t z = 0; z < s.out[0]; ++z)
      for (int64_t y = 0; y < s.out[1]; ++y)
        for (int64_t q = 0; q < s.out[2]; ++q)
          *offset++ =
              (((f * s.padded(0) + z * s.stride[0]) * s.padded(1) + y * s.stride[1]) * s.padded(2) + q * s.stride[2]) *
              width;
}

// Offset of each tap of the kernel from a window's first pixel.
inline void tap_offsets(const ConvShape& s, int64_t width, int64_t* offset) {
  for (int64_t z = 0; z < s.kernel[0]; ++z)
    for (int64_t y = 0; y < s.kernel[1]; ++y)
      for (int64_t q = 0; q < s.kernel[2]; ++q)
        *offset++ = ((z * s.dilation[0] * s.padded(1) + y * s.dilation[1]) * s.padded(2) + q * s.dilation[2]) * width;
}

struct Range {
  int64_t low, high;
};

// Output positions whose pixel at `shift` (tap times dilation minus padding) lies inside [0, size).
inline Range inside(int64_t shift, int64_t stride, int64_t size, int64_t out) {
  const int64_t low = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
  const int64_t high = size - 1 - shift < 0 ? 0 : least(out, (size - 1 - shift) / stride + 1);
  return {least(low, high), high};
}

// Call visit(range z, range y, range q, shift z, shift y, shift q) for every tap, in order.
template <typename Visit>
inline void each_tap(const ConvShape& s, Visit visit) {
  for (int64_t kz = 0; kz < s.kernel[0]; ++kz)
    for (int64_t ky = 0; ky < s.kernel[1]; ++ky)
      for (int64_t kx = 0; kx < s.kernel[2]; ++kx) {
        const int64_t sz = kz * s.dilation[0] - s.padding[0], sy = ky * s.dilation[1] - s.padding[1],
                      sx = kx * s.dilation[2] - s.padding[2];
        visit(inside(sz, s.stride[0], s.size[0], s.out[0]), inside(sy, s.stride[1], s.size[1], s.out[1]),
              inside(sx, s.stride[2], s.size[2], s.out[2]), sz, sy, sx);
      }
}

// Unfold channels [c0, c0 + count) to rows [(channel, tap), positions].
template <typename scalar>
void unfold_rows(const ConvShape& s, const scalar* x, int64_t c0, int64_t count, scalar* dst) {
  const int64_t t = s.positions();
  clear(dst, count * s.taps() * t);
  scalar* row = dst;
  for (int64_t c = 0; c < count; ++c)
    each_tap(s, [&](Range zs, Range ys, Range qs, int64_t sz, int64_t sy, int64_t sx) {
      for (int64_t f = 0; f < s.frames; ++f)
        for (int64_t z = zs.low; z < zs.high; ++z)
          for (int64_t y = ys.low; y < ys.high; ++y) {
            const scalar* src = x + (f * s.channels + c0 + c) * s.pixels() +
                                ((z * s.stride[0] + sz) * s.size[1] + y * s.stride[1] + sy) * s.size[2] + sx;
            scalar* to = row + ((f * s.out[0] + z) * s.out[1] + y) * s.out[2];
            if (s.stride[2] == 1) {
              for (int64_t q = qs.low; q < qs.high; ++q) to[q] = src[q];
            } else {
              for (int64_t q = qs.low; q < qs.high; ++q) to[q] = src[q * s.stride[2]];
            }
          }
      row += t;
    });
}

}  // namespace CAPE_ISA
}  // namespace cape

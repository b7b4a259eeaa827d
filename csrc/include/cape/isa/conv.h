// The squared norm of a convolution's weight gradient for one sample and K cotangents, in every exact form but
// Winograd's (winograd.h). x [frames, channels, *size], g_k [frames, outputs, *out], both contiguous.
#pragma once

#include <cape/isa/linear.h>
#include <cape/isa/windows.h>

namespace cape {
namespace CAPE_ISA {

// Outputs [o, o + count) of G as [positions, width].
template <typename scalar>
void pack_outputs(const ConvShape& s, const scalar* g, int64_t o, int64_t count, int64_t width, scalar* dst) {
  const int64_t pixels = s.out_pixels();
  for (int64_t f = 0; f < s.frames; ++f) {
    Tile<scalar>::pack(g + (f * s.outputs + o) * pixels, 1, pixels, pixels, count, width, dst + f * pixels * width);
  }
}

// Direct form: tiles of the gradient, tap by tap, from windows read in place.
template <typename scalar>
void conv_direct(const ConvShape& s, const scalar* x, const scalar* g, int64_t g_step, Scratch<scalar> scratch,
                 double* total) {
  using T = Tile<scalar>;
  const int64_t t = s.positions(), c = s.group_channels(), p = s.group_outputs();
  const int64_t image = s.frames * s.padded_pixels() * T::kWidth;
  scalar* images = scratch.values;
  scalar* right = images + image * ((c + T::kWidth - 1) / T::kWidth);
  int64_t* windows = scratch.offsets;
  int64_t* taps = windows + t;
  window_offsets(s, T::kWidth, windows);
  tap_offsets(s, T::kWidth, taps);
  alignas(64) scalar tile[T::kRows * T::kCols];
  for (int64_t group = 0; group < s.groups; ++group) {
    for (int64_t b = 0; b * T::kWidth < c; ++b) {
      blocked_images(s, x, group * c + b * T::kWidth, least(T::kWidth, c - b * T::kWidth), s.padded(0), s.padded(1),
                     s.padded(2), images + b * image);
    }
    for (int64_t k = 0; k < s.cotangents; ++k) {
      double sum = 0.0;
      for (int64_t j = 0; j < p; j += T::kCols) {
        const int64_t count = least(T::kCols, p - j);
        const int v = count > T::kWidth ? 2 : 1, width = v * T::kWidth;
        pack_outputs(s, g + k * g_step, group * p + j, count, width, right);
        for (int64_t tap = 0; tap < s.taps(); ++tap) {
          for (int64_t i = 0; i < c; i += T::kRows) {
            const int64_t b = i / T::kWidth;
            const int r = T::cover(least(T::kRows, c - i));
            T::multiply(r, v, images + b * image + taps[tap] + i % T::kWidth, windows, right, width, t, tile);
            sum += T::dot(tile, tile, r * width);
          }
        }
      }
      total[k] += sum;
    }
  }
}

// Gram form over unfolded windows: for few positions.
template <typename scalar>
void conv_gram(const ConvShape& s, const scalar* x, const scalar* g, int64_t g_step, Scratch<scalar> scratch,
               double* total, double* group_total) {
  const int64_t t = s.positions(), c = s.group_channels(), p = s.group_outputs(), pixels = s.out_pixels();
  const LinearShape flat{t, c * s.taps(), p, s.cotangents, 0};
  scalar* rows = scratch.values;
  scalar* outputs = rows + flat.d * t;
  const Scratch<scalar> rest{outputs + s.cotangents * p * t, scratch.offsets};
  for (int64_t group = 0; group < s.groups; ++group) {
    unfold_rows(s, x, group * c, c, rows);
    for (int64_t k = 0; k < s.cotangents; ++k) {
      for (int64_t o = 0; o < p; ++o) {
        for (int64_t f = 0; f < s.frames; ++f) {
          const scalar* from = g + k * g_step + (f * s.outputs + group * p + o) * pixels;
          __builtin_memcpy(outputs + (k * p + o) * t + f * pixels, from,
                           static_cast<unsigned long>(pixels) * sizeof(scalar));
        }
      }
    }
    linear_gram<scalar>(flat, {rows, 1, t}, {outputs, 1, t}, p * t, rest, group_total);
    for (int64_t k = 0; k < s.cotangents; ++k) total[k] += group_total[k];
  }
}

// Shifted Gram form, for windows at every pixel: the Gram matrix of the unfolded windows is a sum of shifted copies of
// that of the pixels, U^T U[t, t'] = sum over taps of X^T X[t + tap, t' + tap]. Positions are numbered on the padded
// grid, so that a shift is one addition; rows and columns that are no output have zeros in G.
template <typename scalar>
void conv_shifted(const ConvShape& s, const scalar* x, const scalar* g, int64_t g_step, Scratch<scalar> scratch,
                  double* total) {
  using T = Tile<scalar>;
  const int64_t c = s.group_channels(), p = s.group_outputs(), grid = s.padded_pixels();
  const int64_t ld = round_up(grid, T::kCols) + T::kCols, widest = c > p ? c : p;
  const int64_t p1 = s.padded(1), p2 = s.padded(2);
  scalar* plane = scratch.values;        // [channel or output][ld]: numbers on the padded grid
  scalar* pixels = plane + widest * ld;  // X^T X, [grid, ld], lower triangle
  scalar* kept = pixels + grid * ld;     // the tiles of U^T U, weighed
  int64_t* offset = scratch.offsets;
  int64_t* taps = offset + widest;
  tap_offsets(s, 1, taps);
  for (int64_t k = 0; k < widest; ++k) offset[k] = k * ld;
  alignas(64) scalar tile[T::kRows * T::kCols];

  // Lay an image [n, *size] out on the grid, its first pixel at `first`.
  const auto lay = [&](const scalar* from, int64_t n, const int64_t* size, int64_t first) {
    clear(plane, n * ld);
    for (int64_t k = 0; k < n; ++k)
      for (int64_t z = 0; z < size[0]; ++z)
        for (int64_t y = 0; y < size[1]; ++y, from += size[2])
          for (int64_t q = 0; q < size[2]; ++q) plane[k * ld + first + (z * p1 + y) * p2 + q] = from[q];
  };
  // Visit the tiles of the lower triangle whose rows are the numbers of an image: take(row, r, column, v).
  const auto visit = [&](const int64_t* size, int64_t first, auto take) {
    for (int64_t z = 0; z < size[0]; ++z)
      for (int64_t y = 0; y < size[1]; ++y)
        for (int64_t q = 0; q < size[2];) {
          const int r = T::fill(size[2] - q);
          const int64_t row = first + (z * p1 + y) * p2 + q;
          for (int64_t column = 0; column < row + r; column += T::kCols) {
            take(row, r, column, tile_columns<scalar>(row, r, column));
          }
          q += r;
        }
  };

  const int64_t origin = (s.padding[0] * p1 + s.padding[1]) * p2 + s.padding[2];
  for (int64_t u = 0; u < grid; ++u) {  // rows of padding; the others are written below
    const int64_t z = u / (p1 * p2) - s.padding[0], y = u / p2 % p1 - s.padding[1], q = u % p2 - s.padding[2];
    const bool real = z >= 0 && z < s.size[0] && y >= 0 && y < s.size[1] && q >= 0 && q < s.size[2];
    if (!real) clear(pixels + u * ld, ld);
  }
  for (int64_t group = 0; group < s.groups; ++group) {
    lay(x + group * c * s.pixels(), c, s.size, origin);
    visit(s.size, origin, [&](int64_t row, int r, int64_t column, int v) {
      T::multiply(r, v, plane + row, offset, plane + column, ld, c, tile);
      for (int i = 0; i < r; ++i) {
        __builtin_memcpy(pixels + (row + i) * ld + column, tile + i * v * T::kWidth,
                         static_cast<unsigned long>(v * T::kWidth) * sizeof(scalar));
      }
    });
    scalar* into = kept;
    visit(s.out, 0, [&](int64_t row, int r, int64_t column, int v) {
      const int width = v * T::kWidth;
      for (int i = 0; i < r; ++i) {
        typename T::Vector sum[2] = {};
        for (int64_t tap = 0; tap < s.taps(); ++tap) {
          const scalar* from = pixels + (row + i + taps[tap]) * ld + column + taps[tap];
          for (int q = 0; q < v; ++q) sum[q] += T::load(from + q * T::kWidth);
        }
        for (int q = 0; q < v; ++q) T::store(into + i * width + q * T::kWidth, sum[q]);
      }
      weigh_triangle(into, row, r, column, width);
      into += r * width;
    });
    for (int64_t k = 0; k < s.cotangents; ++k) {
      lay(g + k * g_step + group * p * s.positions(), p, s.out, 0);
      const scalar* other = kept;
      double sum = 0.0;
      visit(s.out, 0, [&](int64_t row, int r, int64_t column, int v) {
        T::multiply(r, v, plane + row, offset, plane + column, ld, p, tile);
        sum += T::dot(tile, other, r * v * T::kWidth);
        other += r * v * T::kWidth;
      });
      total[k] += sum > 0.0 || sum != sum ? sum : 0.0;
    }
  }
}

// Depthwise: one dot product per channel and tap, a vector of channels at a time.
template <typename scalar, int n>
CAPE_INLINE double channel_taps(const scalar* images, const int64_t* windows, const int64_t* taps, const scalar* g,
                                int64_t t) {
  using T = Tile<scalar>;
  double exact[n * T::kWidth] = {};
  for (int64_t start = 0; start < t; start += 256) {  // short runs in the tile's precision
    typename T::Vector acc[n] = {};
    for (int64_t q = start; q < least(t, start + 256); ++q) {
      const typename T::Vector grad = T::load(g + q * T::kWidth);
      for (int i = 0; i < n; ++i) acc[i] += grad * T::load(images + windows[q] + taps[i]);
    }
    for (int i = 0; i < n; ++i) {
      for (int lane = 0; lane < T::kWidth; ++lane) exact[i * T::kWidth + lane] += double(acc[i][lane]);
    }
  }
  double total = 0.0;
  for (int e = 0; e < n * T::kWidth; ++e) total += exact[e] * exact[e];
  return total;
}

template <typename scalar>
void conv_channelwise(const ConvShape& s, const scalar* x, const scalar* g, int64_t g_step, Scratch<scalar> scratch,
                      double* total) {
  using T = Tile<scalar>;
  const int64_t t = s.positions(), taps = s.taps();
  scalar* images = scratch.values;
  scalar* grads = images + s.frames * s.padded_pixels() * T::kWidth;
  int64_t* windows = scratch.offsets;
  int64_t* at = windows + t;
  window_offsets(s, T::kWidth, windows);
  tap_offsets(s, T::kWidth, at);
  for (int64_t c = 0; c < s.channels; c += T::kWidth) {
    const int64_t count = least(T::kWidth, s.channels - c);
    blocked_images(s, x, c, count, s.padded(0), s.padded(1), s.padded(2), images);
    for (int64_t k = 0; k < s.cotangents; ++k) {
      pack_outputs(s, g + k * g_step, c, count, T::kWidth, grads);
      for (int64_t tap = 0; tap < taps;) {
        if (taps - tap >= 9) {
          total[k] += channel_taps<scalar, 9>(images, windows, at + tap, grads, t), tap += 9;
        } else if (taps - tap >= 3) {
          total[k] += channel_taps<scalar, 3>(images, windows, at + tap, grads, t), tap += 3;
        } else {
          total[k] += channel_taps<scalar, 1>(images, windows, at + tap, grads, t), tap += 1;
        }
      }
    }
  }
}

// Plain dot products of G's rows with the shifted images: for narrow groups, where tiles would be mostly padding.
template <typename scalar>
void conv_narrow(const ConvShape& s, const scalar* x, const scalar* g, int64_t g_step, double* total) {
  const int64_t c = s.group_channels(), p = s.group_outputs();
  for (int64_t k = 0; k < s.cotangents; ++k)
    for (int64_t o = 0; o < s.outputs; ++o)
      for (int64_t i = o / p * c; i < (o / p + 1) * c; ++i)
        each_tap(s, [&](Range zs, Range ys, Range qs, int64_t sz, int64_t sy, int64_t sx) {
          double dot = 0.0;
          for (int64_t f = 0; f < s.frames; ++f)
            for (int64_t z = zs.low; z < zs.high; ++z)
              for (int64_t y = ys.low; y < ys.high; ++y) {
                const scalar* xs = x + (f * s.channels + i) * s.pixels() +
                                   ((z * s.stride[0] + sz) * s.size[1] + y * s.stride[1] + sy) * s.size[2] + sx;
                const scalar* gs =
                    g + k * g_step + (f * s.outputs + o) * s.out_pixels() + (z * s.out[1] + y) * s.out[2];
                scalar lanes[8] = {}, rest = 0;
                int64_t q = qs.low;
                if (s.stride[2] == 1) {
                  for (; q + 8 <= qs.high; q += 8)
                    for (int64_t e = 0; e < 8; ++e) lanes[e] += xs[q + e] * gs[q + e];
                }
                for (; q < qs.high; ++q) rest += xs[q * s.stride[2]] * gs[q];
                for (int64_t e = 0; e < 8; ++e) dot += double(lanes[e]);
                dot += double(rest);
              }
          total[k] += dot * dot;
        });
}

}  // namespace CAPE_ISA
}  // namespace cape

// Scale and shift of a normalization layer for one sample and K cotangents: per channel, the sums over rows and
// positions of G and of G * x^, with x^ = (x - mean) * deviation^-1 formed on the way; then the sum of their squares.
#pragma once

#include <cape/isa/tile.h>
#include <cape/shapes.h>

namespace cape {
namespace CAPE_ISA {

// Sums of g and of g * (x - mean) over s contiguous numbers: short runs in the given precision, then float64.
template <typename scalar>
CAPE_INLINE void run_sums(const scalar* g, const scalar* x, scalar mean, int64_t s, double* shift, double* scale) {
  using T = Tile<scalar>;
  for (int64_t start = 0; start < s; start += 16 * T::kWidth) {
    const int64_t end = least(s, start + 16 * T::kWidth);
    typename T::Vector plain = {}, times = {};
    int64_t i = start;
    for (; i + T::kWidth <= end; i += T::kWidth) {
      const typename T::Vector grad = T::load(g + i);
      plain += grad;
      times += grad * (T::load(x + i) - mean);
    }
    double a = 0.0, b = 0.0;
    for (; i < end; ++i) a += double(g[i]), b += double(g[i]) * double(x[i] - mean);
    for (int q = 0; q < T::kWidth; ++q) a += double(plain[q]), b += double(times[q]);
    *shift += a;
    *scale += b;
  }
}

// g [K][rows, channels, s], x [rows, channels, s]; mean and inverse deviation at row * row_step + channel *
// channel_step (mean may be null: zero). sums: scratch of 2 * channels float64.
template <typename scalar>
void affine_squares(const AffineShape& a, const scalar* x, const scalar* g, int64_t g_step, const scalar* mean,
                    const scalar* inverse, double* sums, double* total) {
  using T = Tile<scalar>;
  double *shift = sums, *scale = sums + a.channels;
  for (int64_t k = 0; k < a.cotangents; ++k, g += g_step) {
    double sum = 0.0;
    if (a.rows == 1 && a.s == 1) {  // one number per channel: nothing to add up
      for (int64_t c = 0; c < a.channels; ++c) {
        const int64_t at = c * a.channel_step;
        const double value = double(g[c]);
        const double hat = double(x[c] - (mean ? mean[at] : scalar(0))) * double(inverse[at]);
        sum += value * value * ((a.shift ? 1.0 : 0.0) + (a.scale ? hat * hat : 0.0));
      }
      total[k] = sum;
      continue;
    }
    for (int64_t c = 0; c < 2 * a.channels; ++c) sums[c] = 0.0;
    if (a.s == 1) {
      constexpr int64_t kRun = 16;  // rows added in the given precision before they join the float64 sums
      for (int64_t c = 0; c < a.channels; c += T::kWidth) {
        const int64_t count = least(T::kWidth, a.channels - c);
        for (int64_t r0 = 0; r0 < a.rows; r0 += kRun) {
          scalar plain[T::kWidth] = {}, times[T::kWidth] = {};
          for (int64_t r = r0; r < least(a.rows, r0 + kRun); ++r) {
            const scalar* gr = g + r * a.channels + c;
            const scalar* xr = x + r * a.channels + c;
            const int64_t at = r * a.row_step + c * a.channel_step;
            if (count == T::kWidth && a.channel_step == 0) {
              const typename T::Vector grad = T::load(gr);
              const scalar m = mean ? mean[at] : scalar(0);
              T::store(plain, T::load(plain) + grad);
              T::store(times, T::load(times) + grad * (T::load(xr) - m) * inverse[at]);
            } else {
              for (int64_t q = 0; q < count; ++q) {
                const int64_t w = at + q * a.channel_step;
                plain[q] += gr[q];
                times[q] += gr[q] * (xr[q] - (mean ? mean[w] : scalar(0))) * inverse[w];
              }
            }
          }
          for (int64_t q = 0; q < count; ++q) shift[c + q] += double(plain[q]), scale[c + q] += double(times[q]);
        }
      }
    } else {
      for (int64_t r = 0; r < a.rows; ++r) {
        for (int64_t c = 0; c < a.channels; ++c) {
          const int64_t from = (r * a.channels + c) * a.s, at = r * a.row_step + c * a.channel_step;
          double plain = 0.0, times = 0.0;
          run_sums(g + from, x + from, mean ? mean[at] : scalar(0), a.s, &plain, &times);
          shift[c] += plain;
          scale[c] += times * double(inverse[at]);
        }
      }
    }
    for (int64_t c = 0; c < a.channels; ++c) {
      sum += (a.shift ? shift[c] * shift[c] : 0.0) + (a.scale ? scale[c] * scale[c] : 0.0);
    }
    total[k] = sum;
  }
}

}  // namespace CAPE_ISA
}  // namespace cape

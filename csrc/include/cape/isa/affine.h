// A normalization layer's backward pass for one sample and K cotangents: per channel, the sums over rows and positions
// of G and of G * x^, with x^ = (x - mean) * deviation^-1 formed on the way, then the sum of their squares; and, where
// wanted, G pulled back to the layer's input in the same pass over memory.
#pragma once

#include <cape/isa/tile.h>
#include <cape/shapes.h>

namespace cape {
namespace CAPE_ISA {

// Where a channel of a row finds its statistics: one number per row (step 0) or per channel (step 1). Null: `none`.
template <typename scalar>
CAPE_INLINE typename Tile<scalar>::Vector spread(const scalar* p, int64_t at, int64_t step, scalar none) {
  const typename Tile<scalar>::Vector zero = {};
  return !p ? zero + none : step ? Tile<scalar>::load(p + at) : zero + p[at];
}

template <typename scalar>
CAPE_INLINE scalar single(const scalar* p, int64_t at, scalar none) {
  return p ? p[at] : none;
}

// Sums of g and of g * (x - mean) over s contiguous numbers, short runs in the given precision, then float64; and
// dx = g * factor unless dx is null.
template <typename scalar>
CAPE_INLINE void run_sums(const scalar* g, const scalar* x, scalar mean, scalar factor, int64_t s, scalar* dx,
                          double* shift, double* scale) {
  using T = Tile<scalar>;
  typename T::Wide plain = {}, times = {};
  int64_t i = 0;
  while (i + T::kWidth <= s) {
    const int64_t end = least(s, i + 16 * T::kWidth);
    typename T::Vector a = {}, b = {};
    for (; i + T::kWidth <= end; i += T::kWidth) {
      const typename T::Vector grad = T::load(g + i);
      a += grad;
      b += grad * (T::load(x + i) - mean);
      if (dx) T::store(dx + i, grad * factor);
    }
    plain += T::widen(a);
    times += T::widen(b);
  }
  double rest = 0.0, products = 0.0;
  for (; i < s; ++i) {
    rest += double(g[i]);
    products += double(g[i]) * double(x[i] - mean);
    if (dx) dx[i] = g[i] * factor;
  }
  *shift += T::sum(plain) + rest;
  *scale += T::sum(times) + products;
}

// One number per channel: nothing to add up before the squares.
template <typename scalar>
double affine_row(const AffineShape& a, const scalar* x, const scalar* g, const scalar* mean, const scalar* inverse,
                  const scalar* weight, scalar* dx) {
  using T = Tile<scalar>;
  const scalar with_scale = a.scale ? scalar(1) : scalar(0), with_shift = a.shift ? scalar(1) : scalar(0);
  typename T::Wide total = {};
  int64_t c = 0;
  for (; c + T::kWidth <= a.channels; c += T::kWidth) {
    const typename T::Vector grad = T::load(g + c),
                             inv = spread(inverse, c * a.channel_step, a.channel_step, scalar(1));
    const typename T::Vector hat = (T::load(x + c) - spread(mean, c * a.channel_step, a.channel_step, scalar(0))) * inv;
    total += T::widen(grad * grad * (with_shift + with_scale * hat * hat));
    if (dx) T::store(dx + c, grad * inv * spread(weight, c, 1, scalar(1)));
  }
  double rest = 0.0;
  for (; c < a.channels; ++c) {
    const scalar inv = inverse[c * a.channel_step];
    const scalar hat = (x[c] - single(mean, c * a.channel_step, scalar(0))) * inv;
    rest += double(g[c]) * double(g[c]) * double(with_shift + with_scale * hat * hat);
    if (dx) dx[c] = g[c] * inv * single(weight, c, scalar(1));
  }
  const double sum = T::sum(total) + rest;
  if (T::in_range(sum)) return sum;
  double wide = 0.0;
  for (c = 0; c < a.channels; ++c) {
    const int64_t at = c * a.channel_step;
    const double hat = double((x[c] - single(mean, at, scalar(0))) * inverse[at]);
    wide += double(g[c]) * double(g[c]) * (double(with_shift) + double(with_scale) * hat * hat);
  }
  return wide;
}

// A row whose statistics are its own (layer norm): its share of the channels' sums, and
// dx = (w g - mean(w g) - x^ mean(w g x^)) * deviation^-1, means over the channels.
template <typename scalar>
CAPE_INLINE void own_row(const AffineShape& a, const scalar* x, const scalar* g, scalar mean, scalar inverse,
                         const scalar* weight, scalar* plain, scalar* times, scalar* dx) {
  using T = Tile<scalar>;
  const int64_t whole = a.channels / T::kWidth * T::kWidth;
  typename T::Vector first = {}, second = {};
  double m1 = 0.0, m2 = 0.0;
  for (int64_t c = 0; c < whole; c += T::kWidth) {
    const typename T::Vector grad = T::load(g + c), hat = (T::load(x + c) - mean) * inverse, product = grad * hat;
    T::store(plain + c, T::load(plain + c) + grad);
    T::store(times + c, T::load(times + c) + product);
    const typename T::Vector w = spread(weight, c, 1, scalar(1));
    first += w * grad;
    second += w * product;
  }
  for (int64_t c = whole; c < a.channels; ++c) {
    const scalar hat = (x[c] - mean) * inverse, w = single(weight, c, scalar(1));
    plain[c] += g[c];
    times[c] += g[c] * hat;
    m1 += double(w * g[c]);
    m2 += double(w * g[c] * hat);
  }
  if (!dx) return;
  const scalar mean1 = scalar((m1 + T::sum(T::widen(first))) / double(a.channels));
  const scalar mean2 = scalar((m2 + T::sum(T::widen(second))) / double(a.channels));
  for (int64_t c = 0; c < whole; c += T::kWidth) {
    const typename T::Vector hat = (T::load(x + c) - mean) * inverse;
    T::store(dx + c, (spread(weight, c, 1, scalar(1)) * T::load(g + c) - mean1 - hat * mean2) * inverse);
  }
  for (int64_t c = whole; c < a.channels; ++c) {
    const scalar hat = (x[c] - mean) * inverse;
    dx[c] = (single(weight, c, scalar(1)) * g[c] - mean1 - hat * mean2) * inverse;
  }
}

// A row with given statistics: its share of the channels' sums, and dx = g * deviation^-1 * w.
template <typename scalar>
CAPE_INLINE void given_row(const AffineShape& a, const scalar* x, const scalar* g, const scalar* mean,
                           const scalar* inverse, const scalar* weight, scalar* plain, scalar* times, scalar* dx) {
  using T = Tile<scalar>;
  const int64_t step = a.channel_step;
  int64_t c = 0;
  for (; c + T::kWidth <= a.channels; c += T::kWidth) {
    const typename T::Vector grad = T::load(g + c), inv = spread(inverse, c * step, step, scalar(1));
    const typename T::Vector hat = (T::load(x + c) - spread(mean, c * step, step, scalar(0))) * inv;
    T::store(plain + c, T::load(plain + c) + grad);
    T::store(times + c, T::load(times + c) + grad * hat);
    if (dx) T::store(dx + c, grad * inv * spread(weight, c, 1, scalar(1)));
  }
  for (; c < a.channels; ++c) {
    const scalar inv = inverse[c * step];
    plain[c] += g[c];
    times[c] += g[c] * (x[c] - single(mean, c * step, scalar(0))) * inv;
    if (dx) dx[c] = g[c] * inv * single(weight, c, scalar(1));
  }
}

// g and dx [K][rows, channels, s], x [rows, channels, s]; mean and inverse deviation at row * row_step + channel *
// channel_step (mean may be null: zero), weight [channels] (null: one); dx null: only the sums. Scratch: sums of
// 2 * K * channels float64, runs of 2 * channels numbers.
template <typename scalar>
void affine(const AffineShape& a, const scalar* x, const scalar* g, int64_t g_step, const scalar* mean,
            const scalar* inverse, const scalar* weight, double* sums, scalar* runs, double* total, scalar* dx) {
  const int64_t each = a.channels;
  if (a.rows == 1 && a.s == 1 && !a.own) {
    for (int64_t k = 0; k < a.cotangents; ++k) {
      total[k] = affine_row(a, x, g + k * g_step, mean, inverse, weight, dx ? dx + k * g_step : nullptr);
    }
    return;
  }
  for (int64_t c = 0; c < 2 * each * a.cotangents; ++c) sums[c] = 0.0;
  if (a.s == 1) {
    constexpr int64_t kRun = 16;  // rows added in the given precision before they join the float64 sums
    scalar *plain = runs, *times = runs + each;
    for (int64_t k = 0; k < a.cotangents; ++k) {
      double *shift = sums + 2 * each * k, *scale = shift + each;
      for (int64_t r0 = 0; r0 < a.rows; r0 += kRun) {
        for (int64_t c = 0; c < 2 * each; ++c) plain[c] = scalar(0);
        for (int64_t r = r0; r < least(a.rows, r0 + kRun); ++r) {
          const int64_t from = r * each, at = r * a.row_step;
          scalar* to = dx ? dx + k * g_step + from : nullptr;
          const scalar* grad = g + k * g_step + from;
          if (a.own) {
            own_row(a, x + from, grad, mean[at], inverse[at], weight, plain, times, to);
          } else {
            given_row(a, x + from, grad, mean ? mean + at : mean, inverse + at, weight, plain, times, to);
          }
        }
        for (int64_t c = 0; c < each; ++c) shift[c] += double(plain[c]);
        for (int64_t c = 0; c < each; ++c) scale[c] += double(times[c]);
      }
    }
  } else {
    for (int64_t r = 0; r < a.rows; ++r) {
      for (int64_t c = 0; c < each; ++c) {
        const int64_t from = (r * each + c) * a.s, at = r * a.row_step + c * a.channel_step;
        const scalar m = mean ? mean[at] : scalar(0), factor = inverse[at] * (weight ? weight[c] : scalar(1));
        for (int64_t k = 0; k < a.cotangents; ++k) {
          double plain = 0.0, times = 0.0;
          run_sums(g + k * g_step + from, x + from, m, factor, a.s, dx ? dx + k * g_step + from : nullptr, &plain,
                   &times);
          sums[2 * each * k + c] += plain;
          sums[2 * each * k + each + c] += times * double(inverse[at]);
        }
      }
    }
  }
  for (int64_t k = 0; k < a.cotangents; ++k) {
    const double *shift = sums + 2 * each * k, *scale = shift + each;
    double sum = 0.0;
    for (int64_t c = 0; c < each; ++c) {
      sum += (a.shift ? shift[c] * shift[c] : 0.0) + (a.scale ? scale[c] * scale[c] : 0.0);
    }
    total[k] = sum;
  }
}

}  // namespace CAPE_ISA
}  // namespace cape

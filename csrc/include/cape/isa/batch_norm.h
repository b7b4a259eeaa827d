// Batch norm of vectors in train mode for one model, rounded as torch rounds it: sums over `chunk` samples in the
// given precision (torch gives each of its threads so many), and over these sums in float64.
#pragma once

#include <cape/isa/tile.h>

#include <cmath>

namespace cape {
namespace CAPE_ISA {

// x, y [rows, channels]; weight and bias may be null; totals: scratch of `channels` float64, parts: of 2 * channels.
template <typename scalar>
void batch_norm(const scalar* x, int64_t rows, int64_t channels, const scalar* weight, const scalar* bias, double eps,
                int64_t chunk, scalar* y, scalar* mean, scalar* inverse, scalar* parts, double* totals) {
  scalar* __restrict part = parts;
  for (int pass = 0; pass < 2; ++pass) {  // means, then sums of squares around them
    for (int64_t c = 0; c < channels; ++c) totals[c] = 0.0;
    for (int64_t start = 0; start < rows; start += chunk) {
      for (int64_t c = 0; c < channels; ++c) part[c] = 0;
      for (int64_t i = start; i < start + chunk && i < rows; ++i) {
        const scalar* __restrict from = x + i * channels;
        if (pass == 0) {
          for (int64_t c = 0; c < channels; ++c) part[c] = from[c] + part[c];
        } else {
          for (int64_t c = 0; c < channels; ++c) part[c] = part[c] + (from[c] - mean[c]) * (from[c] - mean[c]);
        }
      }
      for (int64_t c = 0; c < channels; ++c) totals[c] += double(part[c]);
    }
    if (pass == 0) {
      for (int64_t c = 0; c < channels; ++c) mean[c] = scalar(totals[c] / double(rows));
    }
  }
  scalar* __restrict scale = parts, * __restrict shift = parts + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const scalar variance = scalar(totals[c]) / scalar(rows);
    inverse[c] = scalar(1.0 / std::sqrt(double(variance) + eps));
    scale[c] = inverse[c] * (weight ? weight[c] : scalar(1));
    shift[c] = (bias ? bias[c] : scalar(0)) - mean[c] * scale[c];
  }
  for (int64_t i = 0; i < rows; ++i) {
    const scalar* __restrict from = x + i * channels;
    scalar* __restrict to = y + i * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = from[c] * scale[c] + shift[c];
  }
}

// grad, x, passed [rows, channels]; d_weight and d_bias may be null; parts: scratch of 4 * channels, totals: of
// 2 * channels float64.
template <typename scalar>
void batch_norm_back(const scalar* grad, const scalar* x, int64_t rows, int64_t channels, const scalar* weight,
                     const scalar* mean, const scalar* inverse, int64_t chunk, scalar* passed, scalar* d_weight,
                     scalar* d_bias, scalar* parts, double* totals) {
  scalar* __restrict sum = parts, * __restrict product = parts + channels;
  scalar* __restrict slope = parts + 2 * channels, * __restrict middle = parts + 3 * channels;
  double *sums = totals, *products = totals + channels;
  for (int64_t c = 0; c < 2 * channels; ++c) totals[c] = 0.0;
  for (int64_t start = 0; start < rows; start += chunk) {
    for (int64_t c = 0; c < 2 * channels; ++c) parts[c] = 0;
    for (int64_t i = start; i < start + chunk && i < rows; ++i) {
      const scalar* __restrict from = x + i * channels, * __restrict g = grad + i * channels;
      for (int64_t c = 0; c < channels; ++c) {
        sum[c] = sum[c] + g[c];
        product[c] = product[c] + (from[c] - mean[c]) * g[c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) sums[c] += double(sum[c]), products[c] += double(product[c]);
  }
  const scalar n = scalar(rows);
  for (int64_t c = 0; c < channels; ++c) {
    sum[c] = scalar(sums[c]), product[c] = scalar(products[c]);
    slope[c] = product[c] * inverse[c] * inverse[c] / n;
    middle[c] = sum[c] / n;
    if (d_weight) d_weight[c] = product[c] * inverse[c];
    if (d_bias) d_bias[c] = sum[c];
  }
  for (int64_t i = 0; i < rows; ++i) {
    const scalar* __restrict from = x + i * channels, * __restrict g = grad + i * channels;
    scalar* __restrict to = passed + i * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const scalar away = (from[c] - mean[c]) * slope[c];
      to[c] = (g[c] - middle[c] - away) * inverse[c] * (weight ? weight[c] : scalar(1));
    }
  }
}

}  // namespace CAPE_ISA
}  // namespace cape

// Plain kernels of || A^T G ||_F^2 for one sample, A [T, d] and G [T, p]. No torch, no BLAS.
//
// Two exact forms: direct, the sum of squares of the d x p product A^T G, and Gram, sum_{t,t'} (A A^T o G G^T)[t, t'].
// Neither is larger than min(d * p, T * T), and the cheaper one is chosen by counting multiply-accumulates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cape {

enum class Form { direct, gram };

// Multiply-accumulates of the two forms (the Gram form needs only one triangle of its symmetric matrices).
inline double direct_macs(int64_t t, int64_t d, int64_t p) { return double(t) * double(d) * double(p); }
inline double gram_macs(int64_t t, int64_t d, int64_t p) {
  return 0.5 * double(t) * double(t + 1) * (double(d) + double(p) + 1.0);
}
inline Form choose_form(int64_t t, int64_t d, int64_t p) {
  return gram_macs(t, d, p) < direct_macs(t, d, p) ? Form::gram : Form::direct;
}

// A strided matrix that is only read.
template <typename scalar>
struct MatrixView {
  const scalar* data;
  int64_t row_stride;
  int64_t col_stride;
  scalar operator()(int64_t i, int64_t j) const { return data[i * row_stride + j * col_stride]; }
};

// Sum of squares of n contiguous numbers, in float64 with four accumulators (a fixed order: repeatable bit for bit).
template <typename scalar>
double sum_of_squares(const scalar* x, int64_t n) {
  double acc[4] = {0.0, 0.0, 0.0, 0.0};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int k = 0; k < 4; ++k) acc[k] += double(x[i + k]) * double(x[i + k]);
  }
  for (; i < n; ++i) acc[0] += double(x[i]) * double(x[i]);
  return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

// Inner product of n contiguous numbers, in float64.
template <typename scalar>
double inner_product(const scalar* x, const scalar* y, int64_t n) {
  double acc[4] = {0.0, 0.0, 0.0, 0.0};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int k = 0; k < 4; ++k) acc[k] += double(x[i + k]) * double(y[i + k]);
  }
  for (; i < n; ++i) acc[0] += double(x[i]) * double(y[i]);
  return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

// Direct form; `scratch` is grown to d * p.
template <typename scalar>
double linear_sq_norm_direct(MatrixView<scalar> a, MatrixView<scalar> g, int64_t t, int64_t d, int64_t p,
                             std::vector<scalar>& scratch) {
  scratch.assign(size_t(d * p), scalar(0));
  for (int64_t s = 0; s < t; ++s) {
    for (int64_t i = 0; i < d; ++i) {
      const scalar value = a(s, i);
      scalar* row = scratch.data() + i * p;
      for (int64_t j = 0; j < p; ++j) row[j] += value * g(s, j);
    }
  }
  return sum_of_squares(scratch.data(), d * p);
}

// Gram form; needs no scratch. Clamped at zero: rounding of a vanishing sum must not turn it negative.
template <typename scalar>
double linear_sq_norm_gram(MatrixView<scalar> a, MatrixView<scalar> g, int64_t t, int64_t d, int64_t p) {
  double total = 0.0;
  for (int64_t s = 0; s < t; ++s) {
    for (int64_t r = 0; r <= s; ++r) {
      double aa = 0.0, gg = 0.0;
      for (int64_t i = 0; i < d; ++i) aa += double(a(s, i)) * double(a(r, i));
      for (int64_t j = 0; j < p; ++j) gg += double(g(s, j)) * double(g(r, j));
      total += (r == s ? 1.0 : 2.0) * aa * gg;
    }
  }
  return std::max(total, 0.0);
}

template <typename scalar>
double linear_sq_norm(MatrixView<scalar> a, MatrixView<scalar> g, int64_t t, int64_t d, int64_t p,
                      std::vector<scalar>& scratch) {
  return choose_form(t, d, p) == Form::gram ? linear_sq_norm_gram(a, g, t, d, p)
                                            : linear_sq_norm_direct(a, g, t, d, p, scratch);
}

}  // namespace cape

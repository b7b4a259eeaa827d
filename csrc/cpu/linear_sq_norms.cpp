// CPU kernel of cape::linear_sq_norms: threads over samples, tiles reduced in place, squares accumulated in float64.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include <algorithm>
#include <vector>

#include "cancelled.h"
#include "form.h"
#include "scratch.h"

namespace {

using at::Tensor;

void check_inputs(const Tensor& a, const Tensor& g) {
  TORCH_CHECK(a.dim() == 3 && g.dim() == 4, "linear_sq_norms: a must be [B, T, d] and g [K, B, T, p]; got ", a.sizes(),
              " and ", g.sizes(), ".");
  TORCH_CHECK(a.size(0) == g.size(1) && a.size(1) == g.size(2), "linear_sq_norms: a ", a.sizes(), " and g ", g.sizes(),
              " must agree in B and T.");
  TORCH_CHECK(a.scalar_type() == g.scalar_type(), "linear_sq_norms: a is ", a.scalar_type(), " but g is ",
              g.scalar_type(), ".");
}

// Sum of squares in float64; repeatable bit for bit.
template <typename scalar_t>
double squares(const cape::Kernels<scalar_t>& kernels, const scalar_t* x, int64_t n, int64_t stride) {
  double sums[2] = {0.0, 0.0};
  if (stride == 1) {
    kernels.size_sums(x, n, sums);
  } else {
    for (int64_t i = 0; i < n; ++i) sums[1] += double(x[i * stride]) * double(x[i * stride]);
  }
  return sums[1];
}

// The same in the tensors' own precision, roughly: sixteen sums at once, which a compiler puts into vectors.
template <typename scalar_t>
double rough_squares(const scalar_t* x, int64_t n, int64_t stride) {
  constexpr int64_t kLanes = 16;
  scalar_t sums[kLanes] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += x[i + lane] * x[i + lane];
    }
  }
  for (; i < n; ++i) sums[i % kLanes] += x[i * stride] * x[i * stride];
  double total = 0.0;
  for (const scalar_t sum : sums) total += double(sum);
  return total;
}

// Whether a norm of one sample is what its Gram form's terms left of one another: a [T, d], g [K, T, p].
template <typename scalar_t>
bool cancelled(const cape::LinearShape& s, cape::Strided<scalar_t> a, cape::Strided<scalar_t> g, int64_t g_step,
               const std::vector<double>& total, std::vector<double>& positive) {
  std::fill(positive.begin(), positive.end(), 0.0);
  for (int64_t t = 0; t < s.t; ++t) {
    const double left = rough_squares(a.data + t * a.row, s.d, a.col) + double(s.biases);
    for (int64_t k = 0; k < s.cotangents; ++k) {
      positive[size_t(k)] += left * rough_squares(g.data + k * g_step + t * g.row, s.p, g.col);
    }
  }
  for (int64_t k = 0; k < s.cotangents; ++k) {
    if (total[size_t(k)] < cape::kShareLeft<scalar_t> * positive[size_t(k)]) return true;
  }
  return false;
}

// The CPU always works in the tensors' own precision, whatever lower one is allowed.
Tensor linear_sq_norms(const Tensor& a, const Tensor& g, int64_t biases, c10::string_view, c10::string_view form_name) {
  check_inputs(a, g);
  const int64_t batch = a.size(0), t = a.size(1), d = a.size(2), p = g.size(3), cotangents = g.size(0);
  Tensor out = at::empty({cotangents, batch}, a.options().dtype(at::kDouble));
  double* result = out.mutable_data_ptr<double>();
  if (t == 0 || p == 0 || (d == 0 && biases == 0)) return out.zero_();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "linear_sq_norms", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const cape::LinearShape shape{t, d, p, cotangents, biases};
    cape::Form form = cape::form_of({form_name.data(), form_name.size()});
    const bool chosen = form == cape::Form::automatic;
    if (chosen) form = cape::choose(kernels.tile, shape);
    TORCH_CHECK(form == cape::Form::direct || form == cape::Form::gram, "linear_sq_norms: no form '", form_name, "'.");
    const scalar_t* a_data = a.const_data_ptr<scalar_t>();
    const scalar_t* g_data = g.const_data_ptr<scalar_t>();
    const int64_t grain = t > 1 ? 1 : std::max<int64_t>(1, 32768 / std::max<int64_t>(1, d + cotangents * p));
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      std::vector<double> total(static_cast<size_t>(cotangents)), positive(total);
      const auto scratch = [&](cape::Form one) {
        return cape::scratch<scalar_t>(cape::scratch_of(kernels.tile, one, shape));
      };
      for (int64_t b = begin; b < end; ++b) {
        const scalar_t* ab = a_data + b * a.stride(0);
        const scalar_t* gb = g_data + b * g.stride(1);
        if (t == 1) {  // a rank-one gradient: its norm is a product of norms
          const double left = squares(kernels, ab, d, a.stride(2)) + double(biases);
          for (int64_t k = 0; k < cotangents; ++k) {
            total[size_t(k)] = left * squares(kernels, gb + k * g.stride(0), p, g.stride(3));
          }
        } else {
          const cape::Strided<scalar_t> left{ab, a.stride(1), a.stride(2)}, right{gb, g.stride(2), g.stride(3)};
          kernels.linear(form, shape, left, right, g.stride(0), scratch(form), total.data());
          if (chosen && form == cape::Form::gram && cancelled(shape, left, right, g.stride(0), total, positive)) {
            const auto direct = cape::Form::direct;
            kernels.linear(direct, shape, left, right, g.stride(0), scratch(direct), total.data());
          }
        }
        for (int64_t k = 0; k < cotangents; ++k) result[k * batch + b] = total[size_t(k)];
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) { m.impl("linear_sq_norms", &linear_sq_norms); }

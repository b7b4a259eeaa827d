// CPU kernels of cape::stacked_batch_norm and its backward pass: each thread takes some of the models.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

namespace {

using at::Tensor;

struct Sizes {
  int64_t models, rows, channels, chunk;
};

Sizes check(const Tensor& x) {
  TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "stacked_batch_norm takes contiguous [k, B, C]; got ", x.sizes(), ".");
  const int64_t threads = at::get_num_threads();
  return {x.size(0), x.size(1), x.size(2), std::max<int64_t>(1, (x.size(1) + threads - 1) / threads)};
}

// The models' own numbers [k, C], where there are any.
std::optional<Tensor> rows_of(const char* op, const char* name, const std::optional<Tensor>& values, const Tensor& x) {
  if (!values) return values;
  cape::check_argument(op, name, *values, {x.size(0), x.size(2)}, x);
  return values->contiguous();
}

template <typename scalar>
const scalar* row_of(const std::optional<Tensor>& values, int64_t row, int64_t channels) {
  return values ? values->const_data_ptr<scalar>() + row * channels : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const std::optional<Tensor>& given_weight,
                                              const std::optional<Tensor>& given_bias, double eps) {
  const at::AutoDispatchBelowAutograd guard;
  const Sizes n = check(x);
  const auto weight = rows_of("stacked_batch_norm", "weight", given_weight, x);
  const auto bias = rows_of("stacked_batch_norm", "bias", given_bias, x);
  const Tensor y = at::empty_like(x), mean = at::empty({n.models, n.channels}, x.options());
  const Tensor inverse = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "stacked_batch_norm", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    at::parallel_for(0, n.models, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> parts(2 * n.channels);
      std::vector<double> totals(n.channels);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * n.rows * n.channels;
        kernels.batch_norm(x.const_data_ptr<scalar_t>() + at, n.rows, n.channels,
                           row_of<scalar_t>(weight, i, n.channels), row_of<scalar_t>(bias, i, n.channels), eps, n.chunk,
                           y.mutable_data_ptr<scalar_t>() + at, mean.mutable_data_ptr<scalar_t>() + i * n.channels,
                           inverse.mutable_data_ptr<scalar_t>() + i * n.channels, parts.data(), totals.data());
      }
    });
  });
  return {y, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad_y, const Tensor& x,
                                                       const std::optional<Tensor>& given_weight,
                                                       const Tensor& given_mean, const Tensor& given_inverse) {
  const at::AutoDispatchBelowAutograd guard;
  const Sizes n = check(x);
  const char* name = "stacked_batch_norm_backward";
  cape::check_argument(name, "grad", grad_y, x.sizes(), x);
  const auto weight = rows_of(name, "weight", given_weight, x);
  const Tensor mean = *rows_of(name, "mean", given_mean, x), inverse = *rows_of(name, "inverse", given_inverse, x);
  const Tensor grad = grad_y.contiguous(), passed = at::empty_like(x);
  const Tensor d_weight = at::empty({n.models, n.channels}, x.options()), d_bias = at::empty_like(d_weight);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "stacked_batch_norm_backward", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    at::parallel_for(0, n.models, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> parts(4 * n.channels);
      std::vector<double> totals(2 * n.channels);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i * n.rows * n.channels, row = i * n.channels;
        kernels.batch_norm_back(grad.const_data_ptr<scalar_t>() + at, x.const_data_ptr<scalar_t>() + at, n.rows,
                                n.channels, row_of<scalar_t>(weight, i, n.channels),
                                mean.const_data_ptr<scalar_t>() + row, inverse.const_data_ptr<scalar_t>() + row,
                                n.chunk, passed.mutable_data_ptr<scalar_t>() + at,
                                d_weight.mutable_data_ptr<scalar_t>() + row, d_bias.mutable_data_ptr<scalar_t>() + row,
                                parts.data(), totals.data());
      }
    });
  });
  return {passed, d_weight, d_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) {
  m.impl("stacked_batch_norm", batch_norm);
  m.impl("stacked_batch_norm_backward", batch_norm_backward);
}

// CPU kernels of cape::size_sums and cape::sq_norms: runs of numbers that fit a core's cache, summed in float64.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cape/kernels.h>

#include <algorithm>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kRun = 32768;  // numbers: how a tensor is cut must not depend on the threads

struct Run {
  const void* data;  // of the tensor
  int64_t tensor, begin, end;
};

Tensor size_sums(at::TensorList xs) {
  TORCH_CHECK(!xs.empty(), "size_sums takes one tensor at least.");
  std::vector<Tensor> held;  // in the order in which they lie in memory, which no sum sees
  std::vector<Run> runs;
  for (const Tensor& x : xs) {
    TORCH_CHECK(x.scalar_type() == xs[0].scalar_type(), "size_sums: the tensors must share one dtype.");
    held.push_back(x.is_non_overlapping_and_dense() ? x : x.contiguous());
    for (int64_t begin = 0; begin < x.numel(); begin += kRun) {
      runs.push_back(
          {held.back().const_data_ptr(), int64_t(held.size()) - 1, begin, std::min(x.numel(), begin + kRun)});
    }
  }
  Tensor out = at::zeros({int64_t(xs.size()), 2}, xs[0].options().dtype(at::kDouble));
  std::vector<double> sums(2 * runs.size());
  AT_DISPATCH_FLOATING_TYPES(xs[0].scalar_type(), "size_sums", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    at::parallel_for(0, int64_t(runs.size()), 2, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Run& run = runs[size_t(i)];
        kernels.size_sums(static_cast<const scalar_t*>(run.data) + run.begin, run.end - run.begin, &sums[2 * i]);
      }
    });
  });
  double* result = out.mutable_data_ptr<double>();
  for (size_t i = 0; i < runs.size(); ++i) {
    for (int64_t k = 0; k < 2; ++k) result[2 * runs[i].tensor + k] += sums[2 * i + k];
  }
  return out;
}

Tensor sq_norms(const Tensor& x) {
  TORCH_CHECK(x.dim() == 2, "sq_norms: x must be [N, n]; got ", x.sizes(), ".");
  const Tensor rows = x.contiguous();
  const int64_t batch = x.size(0), n = x.size(1);
  Tensor out = at::empty({batch}, x.options().dtype(at::kDouble));
  double* result = out.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sq_norms", [&] {
    const auto& kernels = cape::kernels<scalar_t>();
    const scalar_t* data = rows.const_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kRun / std::max<int64_t>(n, 1));
    at::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      double sums[2];
      for (int64_t b = begin; b < end; ++b) {
        kernels.size_sums(data + b * n, n, sums);
        result[b] = sums[1];
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(cape, CPU, m) {
  m.impl("size_sums", &size_sums);
  m.impl("sq_norms", &sq_norms);
}
